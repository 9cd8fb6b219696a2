package route_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// betweenNodes leads to two other nodes by a link of ours, as encryption between nodes does.
func betweenNodes(link string) netstate.State {
	s := netstate.State{Links: []netstate.Link{{
		Name: link, Kind: netstate.LinkWireGuard, MTU: 1400, Addresses: []netip.Prefix{pfx("192.0.2.1/32"), pfx("2001:db8::1/128")},
	}}}
	for _, d := range []string{"192.0.2.8/32", "192.0.2.9/32", "198.51.100.9/32", "2001:db8::8/128", "2001:db8::9/128"} {
		s.Routes = append(s.Routes, netstate.Route{
			Destination: pfx(d), Kind: netstate.RouteUnicast, Link: link, Metric: netstate.MetricTunnel, Table: netstate.EncryptionTable,
		})
	}
	for _, f := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		s.Rules = append(s.Rules,
			netstate.Rule{Family: f, Priority: netstate.RulePriorityOuter, Mark: netstate.MarkOuter, MarkMask: netstate.MarkNodeMask, Table: 254},
			netstate.Rule{Family: f, Priority: netstate.RulePriorityBetweenNodes, Table: netstate.EncryptionTable})
	}
	s.Sort()
	return s
}

// allRoutes are the lines of all routes, without those that the kernel makes by itself.
func allRoutes(h *labtest.Host) []string {
	var out []string
	for l := range strings.Lines(h.Run("ip", "-o", "-4", "route", "show", "table", "all") + h.Run("ip", "-o", "-6", "route", "show", "table", "all")) {
		if !strings.Contains(l, "table local") && !strings.HasPrefix(l, "fe80:") && !strings.HasPrefix(l, "multicast ") {
			out = append(out, strings.Join(strings.Fields(strings.ReplaceAll(l, "\\", " ")), " "))
		}
	}
	slices.Sort(out)
	return out
}

// What others have put onto our link leads over the link underneath afterwards, with all that it
// had, and outlives ours. The rest stays as it is.
func TestForeignRoutesMove(t *testing.T) {
	h := host(t)
	r := open(t, h)
	apply(t, r, betweenNodes("cvt0"))
	move := []string{
		// What Cilium's autoDirectNodeRoutes=true makes.
		"10.7.1.0/24 via 192.0.2.9 dev cvt0 proto kernel",
		"fd07:1::/64 via 2001:db8::9 dev cvt0 proto kernel",
		"10.7.2.0/24 via 192.0.2.9 dev cvt0 proto bird metric 77 src 192.0.2.1 mtu 1300 table 77",
		"fd07:2::/64 via 2001:db8::9 dev cvt0 proto bird metric 77 src 2001:db8::1 mtu 1300 table 77",
		"10.7.3.0/24 via 192.0.2.9 dev cvt0 onlink",
		"10.7.4.0/24 proto static nexthop via 192.0.2.8 dev eth0 weight 2 nexthop via 192.0.2.9 dev cvt0 weight 3",
		"fd07:4::/64 proto static nexthop via 2001:db8::8 dev eth0 weight 2 nexthop via 2001:db8::9 dev cvt0 weight 3",
	}
	stay := []string{
		"10.7.5.0/24 dev cvt0",
		"10.7.6.0/24 via 198.51.100.9 dev cvt0", // underneath it is behind a router
		"fd07:6::/64 via fe80::9 dev cvt0",
		"10.7.7.0/24 via 192.0.2.8 dev eth0",
	}
	for _, x := range slices.Concat(move, stay) {
		h.IP(append([]string{"route", "add"}, strings.Fields(x)...)...)
	}
	h.IP("route", "append", "10.7.7.0/24", "via", "192.0.2.9", "dev", "cvt0") // never looked at; the first one is another's
	var want []string
	for _, l := range allRoutes(h) {
		if slices.ContainsFunc(move, func(x string) bool { return strings.HasPrefix(l, strings.Fields(x)[0]+" ") }) {
			l = strings.ReplaceAll(l, " dev cvt0", " dev eth0")
		}
		want = append(want, l)
	}
	slices.Sort(want)

	for i, n := range []int{len(move), 0} {
		moved, err := r.MoveForeign(t.Context(), "cvt0")
		if err != nil || moved != n {
			t.Errorf("time %d: %d routes moved, %v; want %d", i+1, moved, err, n)
		}
		if d := cmp.Diff(want, allRoutes(h)); d != "" {
			t.Fatalf("time %d, want and have:\n%s", i+1, d)
		}
	}
	if n := apply(t, r, betweenNodes("cvt0")); n != 0 {
		t.Errorf("%d of our own routes changed", n)
	}

	h.IP("link", "del", "cvt0")
	for _, x := range move {
		d := strings.Fields(x)[0]
		if got := strings.Join(allRoutes(h), "\n"); !strings.Contains(got, d+" ") {
			t.Errorf("the route to %s has gone with our link:\n%s", d, got)
		}
	}
	if moved, err := r.MoveForeign(t.Context(), "cvt0"); moved != 0 || err != nil {
		t.Errorf("without the link: %d routes moved, %v", moved, err)
	}
}

// A next hop that is looked up from another table than the main one is hidden by what other rules lead to; it is
// a neighbour all the same. And a next hop that stands there already is there once.
func TestForeignRoutesMoveWhereTheirNextHopIsHidden(t *testing.T) {
	h := host(t)
	r := open(t, h)
	s := betweenNodes("cvt0")
	for _, x := range s.Routes {
		s.Routes = append(s.Routes, netstate.Route{Destination: x.Destination, Kind: netstate.RouteUnreachable, Metric: netstate.MetricUnreachable, Table: x.Table})
	}
	apply(t, r, s)
	routes := map[string]string{
		"10.7.1.0/24": "via 192.0.2.9 dev cvt0 table 77",
		"fd07:1::/64": "via 2001:db8::9 dev cvt0 table 77",
		"10.7.2.0/24": "nexthop via 192.0.2.9 dev eth0 nexthop via 192.0.2.9 dev cvt0 onlink",
	}
	for d, x := range routes {
		h.IP(strings.Fields("route add " + d + " " + x)...)
	}
	if n, err := r.MoveForeign(t.Context(), "cvt0"); n != len(routes) || err != nil {
		t.Errorf("%d routes moved, %v; want %d", n, err, len(routes))
	}
	for d, x := range routes {
		hop := strings.Fields(strings.TrimPrefix(x, "nexthop "))[1]
		i := slices.IndexFunc(allRoutes(h), func(l string) bool { return strings.HasPrefix(l, d+" ") })
		if got := allRoutes(h)[i]; strings.Count(got, "via "+hop+" dev eth0") != 1 || strings.Contains(got, "cvt0") {
			t.Errorf("%s leads there: %s", d, got)
		}
	}
}
