package route_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/route"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// host is a machine with an underlay link eth0, a default route of each family, and a
// veth cvt0 as a stand-in for a tunnel's link; the router behind eth0 is a host too.
func host(t testing.TB) *labtest.Host {
	t.Helper()
	l := labtest.New(t)
	h, router := l.Host("host"), l.Host("router")
	l.Connect(h, "eth0", "192.0.2.1/24 2001:db8::1/64", router, "eth0", "192.0.2.2/24 2001:db8::2/64")
	h.IP("route", "add", "default", "via", "192.0.2.2")
	h.IP("-6", "route", "add", "default", "via", "2001:db8::2")
	tunnel(h, "cvt0")
	return h
}

// tunnel makes a link with a carrier, as a stand-in for a tunnel's.
func tunnel(h *labtest.Host, name string) {
	h.IP("link", "add", name, "type", "veth", "peer", "name", "peer"+name)
	h.IP("link", "set", name, "up")
	h.IP("link", "set", "peer"+name, "up")
}

// open makes a Route in the host's namespace; it is detached at the end of the test.
func open(t testing.TB, h *labtest.Host) *route.Route {
	t.Helper()
	var r *route.Route
	h.Do(func() (err error) {
		r, err = route.New(route.Options{})
		return err
	})
	t.Cleanup(func() { _ = r.Detach() })
	return r
}

func gatewayRules() []netstate.Rule {
	var rules []netstate.Rule
	for _, f := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		rules = append(rules,
			netstate.Rule{Family: f, Priority: netstate.RulePriorityOuter, Mark: netstate.MarkOuter, MarkMask: netstate.MarkMask, Table: 254},
			netstate.Rule{Family: f, Priority: netstate.RulePriorityProxy, Mark: netstate.MarkProxy, MarkMask: netstate.MarkMask, Table: netstate.ProxyTable},
			netstate.Rule{Family: f, Priority: netstate.RulePriorityTunnel, Table: netstate.Table})
	}
	return rules
}

// tunnelRoutes are a route by link and the unreachable one behind it.
func tunnelRoutes(link string, destinations ...string) []netstate.Route {
	var routes []netstate.Route
	for _, d := range destinations {
		routes = append(routes,
			netstate.Route{Destination: pfx(d), Kind: netstate.RouteUnicast, Link: link, Metric: netstate.MetricTunnel, Table: netstate.Table},
			netstate.Route{Destination: pfx(d), Kind: netstate.RouteUnreachable, Metric: netstate.MetricUnreachable, Table: netstate.Table})
	}
	return routes
}

// gateway is a state with one of everything.
func gateway() netstate.State {
	s := netstate.State{
		Links: []netstate.Link{{
			Name: "cvt0", Kind: netstate.LinkWireGuard, MTU: 1380,
			Addresses: []netip.Prefix{pfx("10.99.0.1/24"), pfx("fd00:99::1/64")},
		}},
		Rules:  gatewayRules(),
		Routes: tunnelRoutes("cvt0", "10.1.0.0/16", "fd01::/48"),
	}
	for _, d := range []string{"0.0.0.0/0", "::/0"} {
		s.Routes = append(s.Routes, netstate.Route{Destination: pfx(d), Kind: netstate.RouteLocal, Link: "lo", Metric: netstate.MetricTunnel, Table: netstate.ProxyTable})
	}
	s.Routes = append(s.Routes,
		netstate.Route{Destination: pfx("10.1.7.0/24"), Kind: netstate.RouteUnicast, Link: "cvt0", Via: netip.MustParseAddr("10.99.0.9"), Source: netip.MustParseAddr("10.99.0.1"), Metric: 7, Table: netstate.Table},
		netstate.Route{Destination: pfx("fd01:0:0:7::/64"), Kind: netstate.RouteUnicast, Link: "cvt0", Via: netip.MustParseAddr("fd00:99::9"), Source: netip.MustParseAddr("fd00:99::1"), Metric: 7, Table: netstate.Table},
		netstate.Route{Destination: pfx("10.1.8.0/24"), Kind: netstate.RouteThrow, Metric: 7, Table: netstate.Table},
		netstate.Route{Destination: pfx("fd01:0:0:8::/64"), Kind: netstate.RouteThrow, Metric: 7, Table: netstate.Table})
	s.Rules = append(s.Rules, netstate.Rule{Family: netstate.IPv4, Priority: netstate.RulePriorityPodsToNodes, UDPPort: 8472, Table: netstate.Table},
		netstate.Rule{Family: netstate.IPv6, Priority: netstate.RulePriorityPodsToNodes, UDPPort: 8472, Table: netstate.Table})
	s.Sort()
	return s
}

// apply sets links, routes and rules and returns the number of changes.
func apply(t testing.TB, r *route.Route, s netstate.State) int {
	t.Helper()
	a, err := r.SetLinks(t.Context(), s.Links)
	if err != nil {
		t.Fatal(err)
	}
	b, err := r.SetRoutes(t.Context(), s.Routes, s.Rules)
	if err != nil {
		t.Fatal(err)
	}
	return a + b
}

// observed fails the test when the kernel does not have exactly want.
func observed(t testing.TB, r *route.Route, want netstate.State) {
	t.Helper()
	have, err := r.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := netstate.Diff(have, want); d != nil {
		t.Fatalf("from the kernel's state to the desired one:\n%s", strings.Join(d, "\n"))
	}
}

// dump is everything that ip(8) shows, one element per line, without link-local and
// multicast entries, and the kernel's own routes to the host's IPv6 addresses, which come on its
// own schedule.
func dump(h *labtest.Host) string {
	out := h.Run("ip", "-o", "addr") + h.Run("ip", "route", "show", "table", "all") + h.Run("ip", "-6", "route", "show", "table", "all") +
		h.Run("ip", "rule") + h.Run("ip", "-6", "rule")
	lines := slices.DeleteFunc(strings.Split(out, "\n"), func(l string) bool {
		return strings.Contains(l, "fe80::") || strings.Contains(l, " ff00::/8 ") || strings.Contains(l, " table local proto kernel metric 0 pref ")
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
