package route_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/route"
)

func TestSecondSetChangesNothing(t *testing.T) {
	h := host(t)
	r := open(t, h)
	if n := apply(t, r, gateway()); n == 0 {
		t.Fatal("the first Set changed nothing")
	}
	observed(t, r, gateway())
	before := dump(h)
	if n := apply(t, r, gateway()); n != 0 {
		t.Errorf("the second Set made %d changes", n)
	}
	if err := r.Detach(); err != nil {
		t.Fatal(err)
	}
	again := open(t, h)
	if n := apply(t, again, gateway()); n != 0 {
		t.Errorf("Set after a restart made %d changes", n)
	}
	observed(t, again, gateway())
	if d := cmp.Diff(before, dump(h)); d != "" {
		t.Errorf("the kernel's state moved:\n%s", d)
	}
}

func TestCloseLeavesNothingAndTouchesNothingForeign(t *testing.T) {
	h := host(t)
	// Foreign neighbours: in our table, with our priorities, with our protocol elsewhere.
	h.IP("link", "set", "cvt0", "down")
	h.IP("route", "add", "10.200.0.0/16", "via", "192.0.2.2", "table", "19600")
	h.IP("-6", "route", "add", "unreachable", "fd02::/48", "metric", "77", "table", "19600")
	h.IP("route", "add", "10.201.0.0/16", "via", "192.0.2.2", "protocol", "196", "table", "77")
	h.IP("rule", "add", "lookup", "19600", "priority", "19602")
	h.IP("rule", "add", "from", "10.0.0.0/8", "lookup", "19600", "priority", "19602")
	h.IP("-6", "rule", "add", "from", "fd00::/8", "lookup", "19600", "priority", "19602")
	h.IP("rule", "add", "lookup", "77", "priority", "77", "protocol", "196")
	h.IP("addr", "add", "198.51.100.1/32", "dev", "eth0")
	h.IP("link", "add", "foreign0", "type", "veth", "peer", "name", "foreign1")
	before := dump(h)

	r := open(t, h)
	s := gateway()
	apply(t, r, s)
	apply(t, r, netstate.State{Links: s.Links, Routes: s.Routes[:2], Rules: s.Rules[1:2]})
	apply(t, r, s)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// The link is another applier's: it stays, up and with its MTU, without our addresses.
	h.IP("link", "set", "cvt0", "down", "mtu", "1500")
	if d := cmp.Diff(before, dump(h)); d != "" {
		t.Errorf("before and after:\n%s", d)
	}
}

func TestForeignRouteInOurPlaceIsReported(t *testing.T) {
	h := host(t)
	h.IP("route", "add", "10.1.0.0/16", "via", "192.0.2.2", "metric", "100", "table", "19600")
	h.IP("-6", "route", "add", "fd01::/48", "via", "2001:db8::2", "metric", "100", "table", "19600")
	r := open(t, h)
	s := gateway()
	_, err := r.SetRoutes(t.Context(), tunnelRoutes("cvt0", "10.1.0.0/16", "fd01::/48"), s.Rules)
	for _, want := range []string{
		"10.1.0.0/16 dev cvt0 metric 100 table 19600: a route that is not ours",
		"fd01::/48 dev cvt0 metric 100 table 19600: a route that is not ours",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	if out := h.Run("ip", "route", "show", "table", "19600"); !strings.Contains(out, "via 192.0.2.2") {
		t.Errorf("the foreign route is gone:\n%s", out)
	}
	have, err := r.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(have.Routes) != 2 || len(have.Rules) != len(s.Rules) {
		t.Errorf("the rest was not applied: %d routes, %d rules", len(have.Routes), len(have.Rules))
	}
}

func TestRefusesWhatIsNotOurs(t *testing.T) {
	h := host(t)
	r := open(t, h)
	if _, err := r.SetLinks(t.Context(), []netstate.Link{{Name: "eth0", Kind: netstate.LinkWireGuard, MTU: 1400}}); err == nil {
		t.Error("a foreign link was accepted")
	}
	in := netstate.Route{Destination: pfx("10.1.0.0/16"), Kind: netstate.RouteUnreachable, Metric: 1, Table: 254}
	if _, err := r.SetRoutes(t.Context(), []netstate.Route{in}, nil); err == nil {
		t.Error("a route in the main table was accepted")
	}
	if _, err := r.SetRoutes(t.Context(), nil, []netstate.Rule{{Family: netstate.IPv4, Priority: 5, Table: netstate.Table}}); err == nil {
		t.Error("a rule outside our priorities was accepted")
	}
	before := dump(h)
	in.Table = netstate.Table
	if _, err := r.SetRoutes(t.Context(), []netstate.Route{in, in}, nil); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("a route wanted twice: %v", err)
	}
	apply(t, r, netstate.State{})
	if d := cmp.Diff(before, dump(h)); d != "" {
		t.Error(d)
	}
}

func TestAddressesBecomeExactlyTheWantedOnes(t *testing.T) {
	h := host(t)
	r := open(t, h)
	set := func(addrs ...string) netstate.State {
		t.Helper()
		s := netstate.State{Links: []netstate.Link{{Name: "cvt0", Kind: netstate.LinkWireGuard, MTU: 1400}}}
		for _, a := range addrs {
			s.Links[0].Addresses = append(s.Links[0].Addresses, pfx(a))
		}
		s.Sort()
		apply(t, r, s)
		observed(t, r, s)
		if n := apply(t, r, s); n != 0 {
			t.Errorf("%v: the second Set made %d changes", addrs, n)
		}
		return s
	}
	set("10.99.0.1/24", "10.99.0.2/24", "fd00:99::1/64")
	set("10.99.0.2/24", "10.99.0.3/24", "fd00:99::1/64") // the primary goes and would take its secondaries along
	set("10.99.0.2/16", "fd00:99::1/128")                // an IPv6 address changes its length
	s := set("10.99.0.2/16", "fd00:99::1/128")
	h.IP("addr", "flush", "dev", "cvt0")
	h.IP("link", "set", "cvt0", "down", "mtu", "1500")
	if n := apply(t, r, s); n != 4 {
		t.Errorf("repair made %d changes, want 4: two addresses, MTU, up", n)
	}
	if out := h.Run("ip", "link", "show", "cvt0"); !strings.Contains(out, "mtu 1400") || !strings.Contains(out, "UP") {
		t.Error(out)
	}
	set()
}

func TestUnreachableBehindTheTunnelHolds(t *testing.T) {
	h := host(t)
	r := open(t, h)
	s := gateway()
	apply(t, r, s)
	lookup := func(dst string) string {
		out, err := h.Try("ip", "route", "get", dst)
		if err != nil {
			return err.Error()
		}
		return out
	}
	for _, what := range []struct {
		name    string
		do      []string
		tunnel  bool
		recover bool
	}{
		{name: "steady", tunnel: true},
		{name: "down", do: []string{"link", "set", "cvt0", "down"}},
		{name: "deleted", do: []string{"link", "delete", "cvt0"}},
	} {
		if what.do != nil {
			h.IP(what.do...)
		}
		for _, dst := range []string{"10.1.2.3", "fd01::3"} {
			got := lookup(dst)
			if what.tunnel && !strings.Contains(got, "dev cvt0") {
				t.Errorf("%s: %s does not go into the tunnel: %s", what.name, dst, got)
			}
			if !what.tunnel && !strings.Contains(got, "No route to host") {
				t.Errorf("%s: %s is not unreachable: %s", what.name, dst, got)
			}
		}
	}
	// A missing link is told of; everything else stands.
	_, err := r.SetLinks(t.Context(), s.Links)
	if links, rest := route.Missing(err); !slices.Equal(links, []string{"cvt0"}) || rest != nil {
		t.Errorf("missing %v, rest %v", links, rest)
	}
	_, err = r.SetRoutes(t.Context(), s.Routes, s.Rules)
	if links, rest := route.Missing(err); !slices.Equal(links, []string{"cvt0"}) || rest != nil {
		t.Errorf("missing %v, rest %v", links, rest)
	}
	tunnel(h, "cvt0")
	if n := apply(t, r, s); n == 0 {
		t.Error("nothing was repaired")
	}
	observed(t, r, s)
	if got := lookup("10.1.2.3"); !strings.Contains(got, "dev cvt0") {
		t.Error(got)
	}
}

// While routes move between links and metrics, and kinds change, no lookup may ever find
// the default route.
func TestNoGapWhileRoutesChange(t *testing.T) {
	h := host(t)
	tunnel(h, "cvt1")
	r := open(t, h)
	probe := open(t, h)
	alone := func(link string) []netstate.Route { // with nothing behind it
		return slices.DeleteFunc(tunnelRoutes(link, "10.1.0.0/16", "fd01::/48"), func(x netstate.Route) bool { return x.Kind == netstate.RouteUnreachable })
	}
	states := []netstate.State{
		{Rules: gatewayRules(), Routes: tunnelRoutes("cvt0", "10.1.0.0/16", "fd01::/48")},
		{Rules: gatewayRules(), Routes: tunnelRoutes("cvt1", "10.1.0.0/16", "fd01::/48")},
		{Rules: gatewayRules(), Routes: alone("cvt0")},
		{Rules: gatewayRules(), Routes: alone("cvt1")},
		{Rules: gatewayRules(), Routes: alone("cvt0")},
		{Rules: gatewayRules(), Routes: tunnelRoutes("cvt1", "10.1.2.0/24", "fd01::/64")},
	}
	other := netstate.State{Rules: gatewayRules(), Routes: tunnelRoutes("cvt0", "10.1.0.0/16", "fd01::/48")}
	for i := range other.Routes {
		other.Routes[i].Metric = 4100 - other.Routes[i].Metric // unicast 4000, unreachable 100
	}
	states = append(states, other)
	apply(t, r, states[0])
	ctx, cancel := context.WithCancel(t.Context())
	leaks := make(chan string, 1)
	go func() {
		defer close(leaks)
		for ctx.Err() == nil {
			for _, dst := range []string{"10.1.2.3", "fd01::3"} {
				u, err := routeGet(probe, dst)
				if err == nil && u.Link == "eth0" {
					leaks <- fmt.Sprintf("%s by %s", dst, u.Link)
					return
				}
			}
		}
	}()
	for i := range 200 {
		apply(t, r, states[i%len(states)])
	}
	cancel()
	if leak, ok := <-leaks; ok {
		t.Errorf("a lookup found the default route: %s", leak)
	}
}

// A process that is killed in the middle must leave ranges closed rather than open.
func TestUnreachableComesFirstAndGoesLast(t *testing.T) {
	h := host(t)
	r := open(t, h)
	updates, done := make(chan netlink.RouteUpdate, 64), make(chan struct{})
	h.Do(func() error { return netlink.RouteSubscribe(updates, done) })
	defer func() {
		close(done)
		for range updates { // closed when the goroutine behind it has ended
		}
	}()
	next := func(n int) (got []string) {
		t.Helper()
		for len(got) < n {
			select {
			case u := <-updates:
				if u.Table != netstate.Table {
					continue
				}
				got = append(got, fmt.Sprintf("%s %s", map[uint16]string{unix.RTM_NEWROUTE: "add", unix.RTM_DELROUTE: "delete"}[u.Type],
					map[int]string{unix.RTN_UNICAST: "unicast", unix.RTN_UNREACHABLE: "unreachable"}[u.Route.Type]))
			case <-time.After(2 * time.Second):
				t.Fatalf("only %v", got)
			}
		}
		return got
	}
	s := netstate.State{Routes: tunnelRoutes("cvt0", "10.1.0.0/16", "fd01::/48")}
	apply(t, r, s)
	if got, want := next(4), []string{"add unreachable", "add unreachable", "add unicast", "add unicast"}; !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
	apply(t, r, netstate.State{})
	if got, want := next(4), []string{"delete unicast", "delete unicast", "delete unreachable", "delete unreachable"}; !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

func TestThousandRoutes(t *testing.T) {
	h := host(t)
	r := open(t, h)
	s := netstate.State{Rules: gatewayRules()}
	for i := range 1000 {
		s.Routes = append(s.Routes, tunnelRoutes("cvt0", fmt.Sprintf("10.%d.%d.0/24", i/250, i%250), fmt.Sprintf("fd%02d:%d::/32", i/250, i%250))...)
	}
	s.Sort()
	start := time.Now()
	n := apply(t, r, s)
	added := time.Since(start)
	start = time.Now()
	if again := apply(t, r, s); again != 0 {
		t.Errorf("the second Set made %d changes", again)
	}
	unchanged := time.Since(start)
	start = time.Now()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d routes: added in %s, compared in %s, removed in %s", n, added, unchanged, time.Since(start))
	if emulated := os.Getenv("CULVERT_KERNEL") == "1"; !emulated && (added > 3*time.Second || unchanged > added) {
		t.Error("too slow")
	}
}
