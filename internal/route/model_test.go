package route_test

import (
	"cmp"
	"context"
	"flag"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/route"
)

// Whatever sequence of desired states, restarts and foreign meddling comes: after a Set
// the kernel has exactly what is wanted, the next Set changes nothing, lookups go where a
// naive model says, and foreign state stays.
func TestAnySequenceAgainstANaiveModel(t *testing.T) {
	checks := "25"
	if os.Getenv("CULVERT_KERNEL") == "1" {
		checks = "2" // the virtual machine is emulated
	}
	for name, value := range map[string]string{"rapid.checks": checks, "rapid.nofailfile": "true"} {
		if err := flag.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	h := host(t)
	tunnel(h, "cvt1")
	h.IP("route", "add", "10.1.0.0/16", "via", "192.0.2.2", "metric", "9", "table", "19600")
	h.IP("rule", "add", "from", "10.9.0.0/16", "lookup", "19600", "priority", "19602")
	rapid.Check(t, func(rt *rapid.T) {
		// A context of its own: rapid's ends with each check.
		ctx := context.Background()
		r := open(t, h)
		defer func() { _ = r.Detach() }()
		for range rapid.IntRange(2, 6).Draw(rt, "steps") {
			switch rapid.IntRange(0, 3).Draw(rt, "meddle") {
			case 1:
				_ = r.Detach()
				r = open(t, h)
			case 2: // takes its routes along
				h.IP("link", "set", "cvt1", "down")
				h.IP("link", "set", "cvt1", "up")
			case 3:
				_ = h.Host.IP("route", "flush", "table", "19600", "proto", "196", "root", "10.1.0.0/16")
				_ = h.Host.IP("-6", "route", "del", "fd01::/48", "table", "19600")
				_ = h.Host.IP("rule", "del", "priority", "19602", "protocol", "196")
			}
			want := netstate.State{Routes: drawRoutes(rt), Rules: drawRules(rt)}
			want.Sort()
			if _, err := r.SetRoutes(ctx, want.Routes, want.Rules); err != nil {
				rt.Fatal(err)
			}
			have, err := r.Observe(ctx)
			if err != nil {
				rt.Fatal(err)
			}
			have.Links = nil
			for i, x := range want.Routes {
				if x.Metric == 0 && x.Destination.Addr().Is6() {
					want.Routes[i].Metric = 1024
				}
			}
			want.Sort()
			if d := netstate.Diff(have, want); d != nil {
				rt.Fatalf("kernel to desired:\n%s", strings.Join(d, "\n"))
			}
			if n, err := r.SetRoutes(ctx, want.Routes, want.Rules); n != 0 || err != nil {
				rt.Fatalf("the second Set: %d changes, %v", n, err)
			}
			lookups(rt, r, want)
		}
	})
	if out := h.Run("ip", "route", "show", "table", "19600"); !strings.Contains(out, "10.1.0.0/16 via 192.0.2.2 dev eth0 metric 9") {
		t.Errorf("the foreign route is gone:\n%s", out)
	}
	if out := h.Run("ip", "rule"); !strings.Contains(out, "from 10.9.0.0/16 lookup 19600") {
		t.Errorf("the foreign rule is gone:\n%s", out)
	}
}

// drawRoutes draws at most one route per table, destination and metric.
func drawRoutes(rt *rapid.T) []netstate.Route {
	var routes []netstate.Route
	for _, d := range []string{"10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "fd01::/48", "fd01:0:0:2::/64", "fd01:0:0:2::3/128"} {
		for _, metric := range []int{0, netstate.MetricTunnel, netstate.MetricUnreachable} {
			x := netstate.Route{Destination: pfx(d), Metric: metric, Table: netstate.Table}
			switch rapid.IntRange(0, 5).Draw(rt, "kind") {
			case 0, 1:
				x.Kind, x.Link = netstate.RouteUnicast, rapid.SampledFrom([]string{"cvt0", "cvt1"}).Draw(rt, "link")
			case 2:
				x.Kind = netstate.RouteUnreachable
			case 3:
				x.Kind = netstate.RouteThrow
			default:
				continue
			}
			routes = append(routes, x)
		}
	}
	return routes
}

func drawRules(rt *rapid.T) []netstate.Rule {
	rules := []netstate.Rule{}
	for _, w := range gatewayRules() {
		switch rapid.IntRange(0, 3).Draw(rt, "rule") {
		case 0:
			continue
		case 1:
			w.Mark, w.MarkMask = netstate.MarkProxy, netstate.MarkMask
		}
		rules = append(rules, w)
	}
	return rules
}

// lookups asks the kernel where packets go and compares with the longest prefix, of that
// the lowest metric.
func lookups(rt *rapid.T, r *route.Route, want netstate.State) {
	for _, dst := range []string{"10.1.2.3", "10.1.2.4", "10.1.3.1", "fd01:0:0:2::3", "fd01:0:0:2::4", "fd01:0:0:3::1"} {
		a := netip.MustParseAddr(dst)
		tunnelRule := slices.ContainsFunc(want.Rules, func(x netstate.Rule) bool {
			return x.Family == netstate.FamilyOf(a) && x.Table == netstate.Table && x.Mark == 0
		})
		expect := "eth0"
		routes := slices.Clone(want.Routes)
		if a.Is4() { // the foreign one, see above
			routes = append(routes, netstate.Route{Destination: pfx("10.1.0.0/16"), Kind: netstate.RouteUnicast, Link: "eth0", Metric: 9})
		}
		routes = slices.DeleteFunc(routes, func(x netstate.Route) bool { return !x.Destination.Contains(a) })
		slices.SortFunc(routes, func(x, y netstate.Route) int {
			return cmp.Or(cmp.Compare(y.Destination.Bits(), x.Destination.Bits()), cmp.Compare(x.Metric, y.Metric))
		})
		if tunnelRule && len(routes) > 0 {
			switch routes[0].Kind {
			case netstate.RouteUnicast:
				expect = routes[0].Link
			case netstate.RouteUnreachable:
				expect = "no route to host"
			}
		}
		got, err := routeGet(r, dst)
		if err != nil {
			got.Link = err.Error()
		}
		if got.Link != expect {
			rt.Fatalf("%s: goes to %s, want %s", dst, got.Link, expect)
		}
	}
}
