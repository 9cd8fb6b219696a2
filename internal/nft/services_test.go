package nft

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// open makes both parts of the table: tunnels may open services, and the ports are given.
func (n *network) open(ports ...netstate.ServicePort) {
	n.t.Helper()
	n.setFirewall(firewall(netstate.AccessServices))
	n.setServices(services(ports...))
}

// backend asks the service over a new connection and returns who answered.
func (n *network) backend(family int, proto string) string {
	n.t.Helper()
	got := "silence"
	for range 3 { // a busy machine gets more time
		if got = n.try(n.a, proto, places["device a"].of(family), netip.AddrPortFrom(places["service"].of(family), 80)); got != "silence" {
			break
		}
	}
	name, _, _ := strings.Cut(got, " < ")
	return name
}

func TestTranslateSpreads(t *testing.T) {
	n := newNetwork(t)
	n.open(servicePorts(0, "pod 1", "pod 2")...)
	everyFamily(t, func(t *testing.T, family int, proto string) {
		got := map[string]int{}
		for range 40 {
			got[n.backend(family, proto)]++
		}
		// One of two in 40 independent draws below 5: once in ten million.
		if len(got) != 2 || got["pod 1"] < 5 || got["pod 2"] < 5 {
			t.Errorf("backends %v, want both about equally", got)
		}
	})
	// The client's address stays; only endpoints outside the pods see the gateway's.
	for _, family := range []int{4, 6} {
		to := netip.AddrPortFrom(places["service"].of(family), 80)
		from := places["device a"].of(family)
		if got := n.try(n.a, "tcp", from, to); !strings.HasSuffix(got, " < "+from.String()) {
			t.Errorf("a pod sees %q, want %s", got, from)
		}
	}
	n.setServices(services(servicePorts(0, "node")...))
	for _, family := range []int{4, 6} {
		to := netip.AddrPortFrom(places["service"].of(family), 80)
		if got, want := n.try(n.a, "udp", places["device a"].of(family), to), "node < "+places["gateway"].of(family).String(); got != want {
			t.Errorf("an endpoint outside the pods: %q, want %q", got, want)
		}
	}
}

// Only what comes from the sources is translated.
func TestTranslateOnlySources(t *testing.T) {
	n := newNetwork(t)
	n.open(servicePorts(0, "pod 1")...)
	s := services(servicePorts(0, "pod 1")...)
	if n.backend(4, "udp") != "pod 1" {
		t.Fatal("control: the service does not answer")
	}
	s.Sources = []string{"cvtwg1"}
	n.setServices(s)
	if got := n.backend(4, "udp"); got != "refused" {
		t.Errorf("from a link that is no source: %q, want refused", got)
	}
}

func TestServiceWithoutBackendIsRejected(t *testing.T) {
	n := newNetwork(t)
	empty := servicePorts(0)
	// An address outside the ranges, without endpoints: not routed out either.
	outside := netstate.ServicePort{Address: netip.MustParseAddr("198.51.100.7"), Protocol: netstate.TCP, Port: 80}
	for _, s := range []netstate.Services{
		services(append(empty, outside)...),
		{Mode: netstate.ServicesProxy, Ranges: services().Ranges, Sources: services().Sources, Ports: append(empty, outside)},
		{}, // not known yet: the firewall's service ranges
	} {
		t.Run("mode "+string(s.Mode), func(t *testing.T) {
			n.setFirewall(firewall(netstate.AccessServices))
			n.setServices(s)
			everyFamily(t, func(t *testing.T, family int, proto string) {
				for _, to := range []string{"service", "unserved"} {
					start := time.Now()
					got := n.try(n.a, proto, places["device a"].of(family), netip.AddrPortFrom(places[to].of(family), 80))
					if got != "refused" || time.Since(start) > patience/2 {
						t.Errorf("%s: %q after %s, want refused at once", to, got, time.Since(start))
					}
				}
			})
			if s.Mode == "" {
				return
			}
			to := netip.AddrPortFrom(outside.Address, 80)
			if got := n.try(n.a, "tcp", places["device a"].of(4), to); got != "refused" {
				t.Errorf("a service address outside the ranges: %q, want refused", got)
			}
		})
	}
	if n.observe().Rejected == 0 {
		t.Error("nothing counted as rejected")
	}
}

// Route leaves service addresses to whoever routes them: here the world behind the
// default route has the address.
func TestRouteLeavesServicesAlone(t *testing.T) {
	n := newNetwork(t)
	n.own(n.in, "lo", "service")
	n.echo(n.in, "service")
	n.setFirewall(firewall(netstate.AccessServices))
	n.setServices(netstate.Services{Mode: netstate.ServicesRoute, Ranges: services().Ranges, Sources: services().Sources})
	everyFamily(t, func(t *testing.T, family int, proto string) {
		from := places["device a"].of(family)
		if got := n.try(n.a, proto, from, netip.AddrPortFrom(places["service"].of(family), echoPort)); got != "service < "+from.String() {
			t.Errorf("got %q", got)
		}
	})
}

func TestAffinity(t *testing.T) {
	n := newNetwork(t)
	n.open(servicePorts(30, "pod 1", "pod 2")...)
	everyFamily(t, func(t *testing.T, family int, proto string) {
		first := n.backend(family, proto)
		for range 20 {
			if got := n.backend(family, proto); got != first {
				t.Fatalf("first %q, then %q", first, got)
			}
		}
		// The endpoint goes: the other one answers, and is the new affinity also when the
		// first comes back.
		other := map[string]string{"pod 1": "pod 2", "pod 2": "pod 1"}[first]
		n.setServices(services(servicePorts(30, other)...))
		if got := n.backend(family, proto); got != other {
			t.Fatalf("%q answers, want %q", got, other)
		}
		n.setServices(services(servicePorts(30, "pod 1", "pod 2")...))
		for range 20 {
			if got := n.backend(family, proto); got != other {
				t.Fatalf("%q answers after the return of %q, want %q", got, first, other)
			}
		}
	})
	// After the time-out the choice is free again; a shorter one counts from the next
	// connection on.
	n.setServices(services(servicePorts(1, "pod 1", "pod 2")...))
	got := map[string]bool{}
	for range 15 {
		if got[n.backend(4, "udp")] = true; len(got) == 2 {
			return
		}
		time.Sleep(1200 * time.Millisecond)
	}
	t.Errorf("always %v after the time-out (once in 16,384 by chance)", got)
}

// A UDP client that never stops sending moves to a living endpoint.
func TestEndpointRemovedUnderUDPFlow(t *testing.T) {
	n := newNetwork(t)
	n.open(servicePorts(0, "pod 1", "pod 2")...)
	for _, family := range []int{4, 6} {
		n.setServices(services(servicePorts(0, "pod 1", "pod 2")...))
		c, err := n.dial(n.a, "udp", netip.AddrPortFrom(places["device a"].of(family), 0), netip.AddrPortFrom(places["service"].of(family), 80))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		answer, err := ask(c)
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(answer, " < ")
		other := map[string]string{"pod 1": "pod 2", "pod 2": "pod 1"}[first]
		n.setServices(services(servicePorts(0, other)...))
		if answer, err = ask(c); err != nil || !strings.HasPrefix(answer, other) {
			t.Errorf("after %s is gone: %q, %v; want %s", first, answer, err, other)
		}
		// No endpoint, then the first: the same socket gets an answer again.
		n.setServices(services())
		if answer, err = ask(c); err == nil {
			t.Errorf("without endpoints: %q", answer)
		}
		n.setServices(services(servicePorts(0, "pod 1")...))
		_, _ = ask(c) // may report the earlier rejection
		if answer, err = ask(c); err != nil || !strings.HasPrefix(answer, "pod 1") {
			t.Errorf("after the first endpoint came: %q, %v", answer, err)
		}
	}
}

func TestProxyHandsOverToTheRelay(t *testing.T) {
	n := newNetwork(t)
	n.gw.IP("rule", "add", "fwmark", "0x00c20000/0x00ff0000", "lookup", "19601")
	n.gw.IP("-6", "rule", "add", "fwmark", "0x00c20000/0x00ff0000", "lookup", "19601")
	n.gw.IP("route", "add", "local", "default", "dev", "lo", "table", "19601")
	n.gw.IP("-6", "route", "add", "local", "default", "dev", "lo", "table", "19601")
	n.relay()
	s := services(servicePorts(0, "pod 1")...)
	n.setFirewall(firewall(netstate.AccessServices))
	n.setServices(s)
	translated, err := n.dial(n.a, "tcp", netip.AddrPortFrom(places["device a"].of(4), 0), netip.AddrPortFrom(places["service"].of(4), 80))
	if err != nil {
		t.Fatal(err)
	}
	defer translated.Close()
	s.Mode = netstate.ServicesProxy
	n.setServices(s)
	if got, err := ask(translated); err != nil || !strings.HasPrefix(got, "pod 1") {
		t.Errorf("a connection that was translated before: %q, %v", got, err)
	}
	for _, access := range []netstate.Access{netstate.AccessServices, netstate.AccessPods} {
		n.setFirewall(firewall(access))
		want := "relay"
		if access == netstate.AccessPods {
			want = "silence"
		}
		for _, family := range []int{4, 6} {
			// UDP answers of a relay need a transparent socket each: internal/relay tests them.
			if got := n.backend(family, "tcp"); got != want {
				t.Errorf("IPv%d with access to %s: %q, want %q", family, access, got, want)
			}
		}
	}
}

func TestRestartTakesOver(t *testing.T) {
	n := newNetwork(t)
	f, s := firewall(netstate.AccessServices|netstate.AccessPods), services(servicePorts(3600, "pod 1", "pod 2")...)
	f.Clamps = []netstate.Clamp{{Link: "cvtwg0", MSS4: 1380, MSS6: 1360}}
	n.setFirewall(f)
	n.setServices(s)
	first := n.backend(4, "tcp")
	conn, err := n.dial(n.a, "tcp", netip.AddrPortFrom(places["device a"].of(4), 0), netip.AddrPortFrom(places["service"].of(4), 80))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before := n.gw.Run("nft", "list", "table", "inet", Table)

	n.nft = n.fresh()
	if c := n.setFirewall(f) + n.setServices(s); c != 0 {
		t.Errorf("%d changes by a new process with the same state", c)
	}
	if o := n.observe(); !o.Present || o.Services != 4 || o.Endpoints != 8 {
		t.Errorf("taken over: %+v, want 4 ports with 8 endpoints", o)
	}
	strip := func(s string) string { // time-outs and counters run on
		var out []string
		for _, l := range strings.Split(s, "\n") {
			if !strings.Contains(l, "expires") && !strings.Contains(l, "packets") {
				out = append(out, l)
			}
		}
		return strings.Join(out, "\n")
	}
	if after := n.gw.Run("nft", "list", "table", "inet", Table); strip(after) != strip(before) {
		t.Errorf("the table changed:\n%s\nwas\n%s", after, before)
	}

	// A first Set with another value rewrites the rules, which are no longer known, and
	// leaves the elements: affinity survives.
	n.nft = n.fresh()
	s.Ports = append(s.Ports, netstate.ServicePort{Address: netip.MustParseAddr("10.96.0.2"), Protocol: netstate.TCP, Port: 80, Endpoints: s.Ports[0].Endpoints})
	if c := n.setServices(s); c == 0 || c > 40 {
		t.Errorf("%d changes for one more service", c)
	}
	for range 10 {
		if got := n.backend(4, "tcp"); got != first {
			t.Errorf("affinity to %q lost: %q", first, got)
		}
	}
	if _, err := ask(conn); err != nil {
		t.Errorf("the open connection: %v", err)
	}

	// Rules of another version: rewritten in place.
	n.gw.Run("nft", "flush", "chain", "inet", Table, "fw_from")
	n.gw.Run("nft", "flush", "chain", "inet", Table, "fw_stamp")
	n.gw.Run("nft", "add", "rule", "inet", Table, "fw_stamp", "counter", "comment", "other")
	n.nft = n.fresh()
	if c := n.setFirewall(f) + n.setServices(s); c == 0 {
		t.Error("no change although the rules were others")
	}
	if !n.reached(t, "udp", 4, "device a", "pod 1") || n.reach(t, "udp", 4, "spoofed", "pod 1") {
		t.Error("the rules do not work after they were rewritten")
	}
	if _, err := ask(conn); err != nil {
		t.Errorf("the open connection: %v", err)
	}
}

// Whatever happened to the table, the next Set makes it whole.
func TestRepair(t *testing.T) {
	n := newNetwork(t)
	f, s := firewall(netstate.AccessServices|netstate.AccessPods), services(servicePorts(0, "pod 1")...)
	n.setFirewall(f)
	n.setServices(s)
	for _, damage := range [][]string{
		{"delete", "table", "inet", Table},
		{"flush", "table", "inet", Table},
		{"flush", "map", "inet", Table, "svc_eps4"},
	} {
		t.Run(strings.Join(damage, " "), func(t *testing.T) {
			n.gw.Run("nft", damage...)
			if damage[1] == "map" {
				n.nft = n.fresh() // a running one trusts the elements
			}
			if c := n.setFirewall(f) + n.setServices(s); c == 0 {
				t.Error("no change")
			}
			everyFamily(t, func(t *testing.T, family int, proto string) {
				if !n.reached(t, proto, family, "device a", "service") || n.reach(t, proto, family, "spoofed", "pod 1") {
					t.Error("not repaired")
				}
			})
		})
	}
}

func TestCloseLeavesNothingAndForeignTablesAlone(t *testing.T) {
	n := newNetwork(t)
	n.gw.Run("nft", "add table inet foreign; add chain inet foreign c { type filter hook forward priority 0; policy accept; }; add rule inet foreign c counter comment \"theirs\"; add table ip culvert-guard")
	before := n.gw.Run("nft", "-s", "list", "ruleset")
	n.setFirewall(firewall(netstate.AccessPods))
	n.setServices(services(servicePorts(5, "pod 1")...))
	if n.gw.Run("nft", "-s", "list", "ruleset") == before {
		t.Fatal("nothing was set")
	}
	// What concerns no tunnel passes, also to service addresses.
	if got := n.try(n.gw, "udp", places["gateway"].of(4), netip.AddrPortFrom(places["world"].of(4), echoPort)); !strings.HasPrefix(got, "world") {
		t.Errorf("foreign traffic: %q", got)
	}
	for range 2 {
		n.gw.Do(func() error { return n.nft.Close() })
	}
	if after := n.gw.Run("nft", "-s", "list", "ruleset"); after != before {
		t.Errorf("left behind:\n%s", after)
	}
}

// relay stands in for internal/relay: it answers every TCP connection that TPROXY hands
// it with its name.
func (n *network) relay() {
	for _, at := range []string{"127.0.0.1", "::1"} {
		l := n.transparent(netip.AddrPortFrom(netip.MustParseAddr(at), netstate.RelayPort))
		n.t.Cleanup(func() { _ = l.Close() })
		labtest.Serve(l, func(c net.Conn) {
			_, _ = c.Read(make([]byte, 1))
			_, _ = c.Write([]byte("relay < "))
		})
	}
}

// Marks of others: the packet's stays as it is, and the connection's is
// theirs from the translation on.
func TestTranslateLeavesMarksAlone(t *testing.T) {
	n := newNetwork(t)
	n.gw.Run("nft", `table inet foreign {
		counter first {}
		counter kept {}
		counter clean {}
		counter lost {}
		chain tag { type filter hook prerouting priority -160; iifname "cvtwg0" meta mark set 0x12005678; }
		chain seen { type filter hook forward priority 10;
			iifname "cvtwg0" ct state new counter name first
			iifname "cvtwg0" ct state new meta mark 0x12005678 counter name kept
			iifname "cvtwg0" ct state new ct mark 0 counter name clean
			iifname "cvtwg0" ct state new ct mark set 7
			ct direction reply ct mark != 7 counter name lost
		}
	}`)
	for _, affinity := range []int{0, 60} {
		n.open(servicePorts(affinity, "pod 1", "pod 2")...)
		everyFamily(t, func(t *testing.T, family int, proto string) {
			for range 3 {
				if got := n.backend(family, proto); !strings.HasPrefix(got, "pod") {
					t.Fatalf("no answer: %q", got)
				}
			}
		})
	}
	count := func(name string) string {
		out := n.gw.Run("nft", "list", "counter", "inet", "foreign", name)
		_, out, _ = strings.Cut(out, "packets ")
		out, _, _ = strings.Cut(out, " ")
		return out
	}
	first := count("first")
	if first == "0" {
		t.Error("no first packets are seen")
	}
	for name, want := range map[string]string{"kept": first, "clean": first, "lost": "0"} {
		if got := count(name); got != want {
			t.Errorf("%s packets are %q, want %s", got, name, want)
		}
	}
}
