package nft

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// reach tries a new connection between two places and says whether it was answered.
func (n *network) reach(t *testing.T, proto string, family int, from, to string) bool {
	t.Helper()
	host := n.a
	switch from {
	case "site b", "device b":
		host = n.b
	case "pod 1", "node":
		host = n.in
	case "gateway":
		host = n.gw
	}
	port := uint16(echoPort)
	if to == "service" {
		port = 80
	}
	got := n.try(host, proto, places[from].of(family), netip.AddrPortFrom(places[to].of(family), port))
	if got != "silence" && got != "refused" && !strings.Contains(got, " < ") {
		t.Errorf("%s → %s: %s", from, to, got)
	}
	return strings.Contains(got, " < ")
}

// reached is reach where an answer is expected: a busy machine gets more time for it.
func (n *network) reached(t *testing.T, proto string, family int, from, to string) bool {
	t.Helper()
	for range 5 {
		if n.reach(t, proto, family, from, to) {
			return true
		}
	}
	return false
}

func TestFirewallAccess(t *testing.T) {
	n := newNetwork(t)
	n.setServices(services(servicePorts(0, "pod 1", "pod 2")...))
	everything := []string{"pod 1", "service", "node", "site b", "device b", "world", "gateway", "pool"}
	for access, allowed := range map[netstate.Access][]string{
		0:                       nil,
		netstate.AccessPods:     {"pod 1"},
		netstate.AccessServices: {"service"},
		netstate.AccessNodes:    {"node"},
		netstate.AccessSites:    {"site b"},
		netstate.AccessPods | netstate.AccessServices | netstate.AccessNodes | netstate.AccessSites: {"pod 1", "service", "node", "site b"},
	} {
		n.setFirewall(firewall(access))
		everyFamily(t, func(t *testing.T, family int, proto string) {
			var all sync.WaitGroup
			for _, from := range []string{"device a", "site a"} {
				for _, to := range everything {
					all.Go(func() {
						want := slices.Contains(allowed, to)
						reach := n.reach
						if want {
							reach = n.reached
						}
						if got := reach(t, proto, family, from, to); got != want {
							t.Errorf("access %s: %s → %s answered: %t, want %t", access, from, to, got, want)
						}
					})
				}
			}
			all.Wait()
			if !n.reached(t, proto, family, "pod 1", "device a") || !n.reached(t, proto, family, "gateway", "site b") {
				t.Errorf("access %s: the cluster does not reach tunnels", access)
			}
		})
	}
	if d := n.observe().Dropped; d["denied"] == 0 || d["leak"] != 0 {
		t.Errorf("dropped %v, want denied, and no leak", d)
	}
}

func TestFirewallSources(t *testing.T) {
	n := newNetwork(t)
	all := firewall(netstate.AccessPods)
	n.setFirewall(all)
	everyFamily(t, func(t *testing.T, family int, proto string) {
		if !n.reached(t, proto, family, "device a", "pod 1") {
			t.Fatal("control: device a does not reach pod 1")
		}
		before := n.observe().Dropped["spoofed"]
		if n.reach(t, proto, family, "spoofed", "pod 1") {
			t.Error("a source that belongs to no tunnel was let through")
		}
		if n.observe().Dropped["spoofed"] == before {
			t.Error("not counted as spoofed")
		}
	})
	// The same addresses on the other link: another tunnel's source is no better.
	for i := range all.Tunnels {
		all.Tunnels[i].Link = map[string]string{"cvtwg0": "cvtwg1", "cvtwg1": "cvtwg0"}[all.Tunnels[i].Link]
	}
	all.Pools = nil
	n.setFirewall(all)
	everyFamily(t, func(t *testing.T, family int, proto string) {
		for _, from := range []string{"device a", "site a"} {
			if n.reach(t, proto, family, from, "pod 1") {
				t.Errorf("%s was let in through a link that is not its own", from)
			}
		}
	})
}

// A connection that a pod opened must not let a foreign source answer, and one that was
// open when a device went or lost its access is cut.
func TestFirewallCutsOpenConnections(t *testing.T) {
	n := newNetwork(t)
	f := firewall(netstate.AccessPods)
	n.setFirewall(f)
	everyFamily(t, func(t *testing.T, family int, proto string) {
		n.setFirewall(f)
		c, err := n.dial(n.a, proto, netip.AddrPortFrom(places["device a"].of(family), 0), netip.AddrPortFrom(places["pod 1"].of(family), echoPort))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := ask(c); err != nil {
			t.Fatalf("control: %v", err)
		}
		if changed := n.setFirewall(firewall(netstate.AccessNodes)); changed == 0 {
			t.Error("no change")
		}
		if got, err := ask(c); err == nil {
			t.Errorf("answered after the access was taken away: %s", got)
		}
	})
}

func TestFirewallLeak(t *testing.T) {
	n := newNetwork(t)
	f := firewall(netstate.AccessPods)
	n.setFirewall(f)
	for _, family := range []int{4, 6} {
		to := places["device a"].of(family)
		if !n.reached(t, "udp", family, "gateway", "device a") || !n.reached(t, "udp", family, "pod 1", "device a") {
			t.Fatal("control: device a is not reached")
		}
		// The route is gone: the packet would follow the default route.
		n.gw.IP("route", "del", to.String(), "dev", "cvtwg0")
		before := n.observe().Dropped["leak"]
		seen := n.capture("eth0", "dst host "+to.String()+" and udp port 7", func() {
			n.reach(t, "udp", family, "gateway", "device a")
			n.reach(t, "udp", family, "pod 1", "device a")
		})
		if strings.Contains(seen, "10.0.0.1.") || strings.Contains(seen, "fd00::1.") {
			t.Errorf("left in the clear: %s", seen)
		}
		if got := n.observe().Dropped["leak"] - before; got < 2 {
			t.Errorf("%d counted as leak, want both", got)
		}
		// The same without a device: an address of the pool.
		unused := map[int]string{4: "172.18.0.77", 6: "fd02::77"}[family]
		before = n.observe().Dropped["leak"]
		n.try(n.gw, "udp", places["gateway"].of(family), netip.AddrPortFrom(netip.MustParseAddr(unused), 9))
		if n.observe().Dropped["leak"] == before {
			t.Error("an unused address of the pool left through the default route")
		}
	}
}

// capture returns what tcpdump saw leave a link of the gateway during f.
func (n *network) capture(link, filter string, f func()) string {
	n.t.Helper()
	labtest.Require(n.t, "tcpdump")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := n.gw.Command(ctx, "tcpdump", "--immediate-mode", "-l", "-n", "-i", link, "-Q", "out", filter)
	var out strings.Builder
	cmd.Stdout = &out
	stderr, err := cmd.StderrPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.gw.Start(cmd); err != nil {
		n.t.Fatal(err)
	}
	b := make([]byte, 4096)
	for text := ""; !strings.Contains(text, "listening on"); {
		m, err := stderr.Read(b)
		if err != nil {
			n.t.Fatalf("tcpdump: %v: %s", err, text)
		}
		text += string(b[:m])
	}
	f()
	time.Sleep(100 * time.Millisecond)
	cancel()
	_ = cmd.Wait()
	return out.String()
}

func TestFirewallHost(t *testing.T) {
	n := newNetwork(t)
	f := firewall(netstate.AccessPods)
	n.setFirewall(f)
	for _, family := range []int{4, 6} {
		if !n.ping(n.a, places["device a"].of(family), places["gateway"].of(family)) {
			t.Error("no echo from the gateway")
		}
		if n.ping(n.a, places["spoofed"].of(family), places["gateway"].of(family)) {
			t.Error("echo to a spoofed source")
		}
		if n.reach(t, "tcp", family, "device a", "gateway") || n.reach(t, "udp", family, "device a", "pool") {
			t.Error("the host answers what is not allowed")
		}
		if !n.reached(t, "tcp", family, "gateway", "pool") {
			t.Error("the host does not reach its own address in the pool")
		}
	}
	f = firewall(netstate.AccessNodes)
	f.Nodes = prefixes("10.0.0.1/32", "fd00::1/128")
	n.setFirewall(f)
	everyFamily(t, func(t *testing.T, family int, proto string) {
		if !n.reached(t, proto, family, "device a", "gateway") {
			t.Error("access to nodes does not cover the host, which is one")
		}
		if n.reach(t, proto, family, "device a", "pool") {
			t.Error("access to nodes covers an address that is none of a node's")
		}
	})
}

func TestFirewallMasquerade(t *testing.T) {
	n := newNetwork(t)
	f := firewall(netstate.AccessPods | netstate.AccessSites)
	for _, masquerade := range []bool{false, true} {
		f.Masquerade = masquerade
		n.setFirewall(f)
		everyFamily(t, func(t *testing.T, family int, proto string) {
			from := places["device a"].of(family)
			want := from
			if masquerade {
				want = places["gateway"].of(family)
			}
			if got := n.try(n.a, proto, from, netip.AddrPortFrom(places["pod 1"].of(family), echoPort)); got != "pod 1 < "+want.String() {
				t.Errorf("masquerade %t: %q, want source %s", masquerade, got, want)
			}
			if got := n.try(n.a, proto, from, netip.AddrPortFrom(places["site b"].of(family), echoPort)); got != "site b < "+from.String() {
				t.Errorf("masquerade %t: a site sees %q, want %s", masquerade, got, from)
			}
		})
	}
}

func TestFirewallClamp(t *testing.T) {
	n := newNetwork(t)
	f := firewall(netstate.AccessPods)
	measure := func(family int, from, to, flags string) int {
		t.Helper()
		out := n.capture("any", "tcp[tcpflags] & tcp-syn != 0 or (ip6 and tcp)", func() {
			if !n.reached(t, "tcp", family, from, to) {
				t.Fatalf("%s does not reach %s", from, to)
			}
		})
		low := 1 << 16
		for _, line := range strings.Split(out, "\n") {
			_, rest, ok := strings.Cut(line, "mss ")
			if !ok || !strings.Contains(line, flags) {
				continue
			}
			if v, err := strconv.Atoi(rest[:strings.IndexAny(rest, ",]")]); err == nil {
				low = min(low, v)
			}
		}
		return low
	}
	mss := func(family int, from, to, flags string) (low int) {
		t.Helper()
		for range 5 { // tcpdump may be late on a busy machine
			if low = measure(family, from, to, flags); low < 1<<16 {
				break
			}
		}
		return low
	}
	const syn, synAck = "Flags [S]", "Flags [S.]"
	for _, family := range []int{4, 6} {
		native := map[int]int{4: 1460, 6: 1440}[family]
		for _, c := range []struct {
			clamp netstate.Clamp
			want  int
		}{
			{netstate.Clamp{}, native},
			{netstate.Clamp{Link: "cvtwg0", MSS4: 1300, MSS6: 1280}, map[int]int{4: 1300, 6: 1280}[family]},
			{netstate.Clamp{Link: "cvtwg0", MSS4: 9000, MSS6: 9000}, native},
		} {
			f.Clamps = nil
			if c.clamp.Link != "" {
				f.Clamps = []netstate.Clamp{c.clamp}
			}
			n.setFirewall(f)
			for _, way := range [][2]string{{"device a", "pod 1"}, {"pod 1", "device a"}} {
				if got := mss(family, way[0], way[1], syn); got != c.want {
					t.Errorf("IPv%d %v clamp %v: SYN has %d, want %d", family, way, c.clamp, got, c.want)
				}
				if got := mss(family, way[0], way[1], synAck); got != c.want {
					t.Errorf("IPv%d %v clamp %v: SYN/ACK has %d, want %d", family, way, c.clamp, got, c.want)
				}
			}
		}
	}
}
