package nft

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// manyServices is the echo service and n-1 others, three endpoints each.
func manyServices(n int) netstate.Services {
	s := services(servicePorts(0, "pod 1", "pod 2")...)
	s.Ranges = prefixes("10.96.0.0/16", "fd06::/112")
	for i := range n - 1 {
		p := netstate.ServicePort{
			Address: netip.AddrFrom4([4]byte{10, 96, byte(1 + i/250), byte(i % 250)}), Protocol: netstate.TCP, Port: 443,
		}
		for k := range 3 {
			p.Endpoints = append(p.Endpoints, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i / 80), byte(i%80*3 + k)}), 8443))
		}
		s.Ports = append(s.Ports, p)
	}
	return s
}

// manyDevices adds n devices, with an address of each family, outside any pool, and 1,000
// sites with two ranges of each family.
func manyDevices(n int) netstate.Firewall {
	f := firewall(netstate.AccessPods | netstate.AccessServices)
	for i := range n {
		f.Tunnels = append(f.Tunnels, device(i))
	}
	for i := range 1000 {
		f.Tunnels = append(f.Tunnels, netstate.Tunnel{
			Name: fmt.Sprintf("site default/s%d", i), Kind: netstate.TunnelSite, Link: "cvtwg0", Access: netstate.AccessPods,
			Prefixes: prefixes(fmt.Sprintf("10.%d.%d.0/25", 200+i/250, i%250), fmt.Sprintf("10.%d.%d.128/25", 200+i/250, i%250), fmt.Sprintf("fd08:%x::/48", i), fmt.Sprintf("fd09:%x::/48", i)),
		})
	}
	return f
}

func device(i int) netstate.Tunnel {
	return netstate.Tunnel{
		Name: fmt.Sprintf("device default/d%d", i), Kind: netstate.TunnelDevice, Link: "cvtwg0", Access: netstate.AccessPods | netstate.AccessServices,
		Prefixes: prefixes(fmt.Sprintf("10.%d.%d.%d/32", 100+i/62500, i/250%250, i%250), fmt.Sprintf("fd07::%x/128", i+1)),
	}
}

// samples are repeated measurements of one thing.
type samples struct {
	wall, cpu []time.Duration // cpu: of this process and of nft(8)
	others    float64         // processors that others kept busy meanwhile
}

// sample measures f n times.
func sample(n int, f func(i int)) samples {
	var s samples
	start, busy, used := time.Now(), busyTime(), ownTime()
	for i := range n {
		at, own := time.Now(), ownTime()
		f(i)
		s.wall, s.cpu = append(s.wall, time.Since(at)), append(s.cpu, ownTime()-own)
	}
	s.others = float64(busyTime()-busy-(ownTime()-used)) / float64(time.Since(start))
	slices.Sort(s.wall)
	slices.Sort(s.cpu)
	return s
}

func median(sorted []time.Duration) time.Duration { return sorted[len(sorted)/2] }

func (s samples) String() string {
	n := len(s.wall) - 1
	return fmt.Sprintf("%s (%s to %s; processor time %s; others kept %.1f processors busy)", median(s.wall), s.wall[0], s.wall[n], median(s.cpu), s.others)
}

// bound holds what was measured to a bound. The median of the processor time must keep it
// whatever else runs on the machine: no neighbour adds to it. The median of the wall time
// must keep it too when the machine had next to nothing else to do; otherwise it says more
// about the neighbours than about this package.
// With the race detector every bound is five times as wide.
func (s samples) bound(t *testing.T, what string, bound time.Duration) {
	t.Helper()
	if raceDetector {
		bound *= 5
	}
	t.Logf("%s: %s", what, s)
	if m := median(s.cpu); m > bound {
		t.Errorf("%s: %s of processor time, want ≤%s", what, m, bound)
	}
	if m := median(s.wall); m > bound && s.others < 0.3 {
		t.Errorf("%s: took %s, want ≤%s", what, m, bound)
	}
}

// ownTime is the processor time that this process and its children that ended have used.
func ownTime() time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		_ = syscall.Getrusage(who, &u)
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}

// busyTime is the time that the machine's processors were busy: all of the first line of
// /proc/stat but "idle" and "iowait", in ticks of 10 ms.
func busyTime() time.Duration {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(b), "\n")
	var sum time.Duration
	for i, f := range strings.Fields(line) {
		ticks, err := strconv.Atoi(f)
		if err == nil && i != 4 && i != 5 && i <= 8 { // guest time is part of user time
			sum += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return sum
}

func TestPerformanceServices(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: takes several seconds")
	}
	l := labtest.New(t, "nft")
	few, many := newNetworkIn(t, l, "few"), newNetworkIn(t, l, "many")
	few.setFirewall(firewall(netstate.AccessServices))
	many.setFirewall(firewall(netstate.AccessServices))
	few.setServices(manyServices(10))
	s := manyServices(10000)
	same := func(int) {
		if c := many.setServices(s); c != 0 {
			t.Errorf("second Set: %d changes", c)
		}
	}
	sample(1, func(int) { many.setServices(s) }).bound(t, "10,000 services × 3 endpoints loaded", 5*time.Second)
	sample(5, same).bound(t, "the same again", 50*time.Millisecond)
	sample(25, func(i int) {
		p := &s.Ports[5000]
		p.Endpoints = slices.Clone(p.Endpoints)
		p.Endpoints[1] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(100 + i)}), 8443)
		if c := many.setServices(s); c == 0 || c > 6 {
			t.Errorf("one endpoint replaced: %d changes, want at most 6", c)
		}
	}).bound(t, "one endpoint changed", 50*time.Millisecond)
	many.nft = many.fresh()
	sample(1, same).bound(t, "taken over by a new process", 5*time.Second)
	for _, proto := range []string{"udp", "tcp"} {
		// Alternating, so that both see the same neighbours on the machine.
		var a, b []time.Duration
		for range 1500 {
			a = append(a, few.firstPacket(proto))
			b = append(b, many.firstPacket(proto))
		}
		slices.Sort(a)
		slices.Sort(b)
		ratio := float64(median(b)) / float64(median(a))
		t.Logf("first packet over %s: 10 services %s, 10,000 services %s, ratio %.3f", proto, median(a), median(b), ratio)
		if ratio > 1.10 {
			t.Errorf("first packet over %s: %.3f times that with 10 services, want ≤1.10", proto, ratio)
		}
	}
}

// firstPacket is the time of a new connection's first round trip.
func (n *network) firstPacket(proto string) time.Duration {
	n.t.Helper()
	from, to := netip.AddrPortFrom(places["device a"].of(4), 0), netip.AddrPortFrom(places["service"].of(4), 80)
	var took time.Duration
	n.a.Do(func() error {
		start := time.Now()
		var c net.Conn
		var err error
		if proto == "tcp" {
			c, err = net.DialTCP("tcp", net.TCPAddrFromAddrPort(from), net.TCPAddrFromAddrPort(to))
		} else {
			c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(from), net.UDPAddrFromAddrPort(to))
		}
		if err != nil {
			return err
		}
		defer c.Close()
		if proto == "udp" {
			start = time.Now()
			_ = c.SetDeadline(start.Add(2 * time.Second))
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
			if _, err := c.Read(make([]byte, 64)); err != nil {
				return err
			}
		}
		took = time.Since(start)
		return nil
	})
	return took
}

func TestPerformanceFirewall(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: takes several seconds")
	}
	n := newNetwork(t)
	f := manyDevices(10000)
	set := func(least, most int) {
		if c := n.setFirewall(f); c < least || c > most {
			t.Errorf("%d changes, want %d to %d", c, least, most)
		}
	}
	more := func(tunnels ...netstate.Tunnel) {
		f.Tunnels = append(f.Tunnels, tunnels...)
		slices.SortFunc(f.Tunnels, func(a, b netstate.Tunnel) int { return strings.Compare(a.Name, b.Name) })
	}
	more()
	const what = "10,000 devices and 1,000 sites: "
	sample(1, func(int) { n.setFirewall(f) }).bound(t, what+"loaded", 5*time.Second)
	sample(5, func(int) { set(0, 0) }).bound(t, what+"the same again", 50*time.Millisecond)
	// A list per step, as the planner makes them; making them is not measured.
	lists := [][]netstate.Tunnel{f.Tunnels}
	for i := range 15 {
		f.Tunnels = slices.Clone(f.Tunnels)
		more(device(10000 + i))
		lists = append(lists, f.Tunnels)
	}
	sample(30, func(i int) { // up and down again
		f.Tunnels = lists[15-max(i-14, 14-i)]
		set(1, 10)
	}).bound(t, what+"one device comes or goes", 50*time.Millisecond)
	sample(15, func(i int) {
		f.Tunnels = append(f.Tunnels, netstate.Tunnel{Name: "site x/y", Kind: netstate.TunnelSite, Link: "cvtwg0", Prefixes: prefixes(fmt.Sprintf("10.210.%d.0/24", i))})
		set(1, 10)
	}).bound(t, what+"one site more", 100*time.Millisecond)
	n.nft = n.fresh()
	sample(1, func(int) { set(0, 0) }).bound(t, what+"taken over by a new process", time.Second)
	n.nft = n.fresh()
	f.Tunnels = f.Tunnels[:len(f.Tunnels)-1]
	sample(1, func(int) { n.setFirewall(f) }).bound(t, what+"taken over with one site less", 3*time.Second)
	if !n.reached(t, "udp", 4, "device a", "pod 1") || n.reach(t, "udp", 4, "spoofed", "pod 1") {
		t.Error("the rules do not work")
	}
}
