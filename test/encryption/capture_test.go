package encryption

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// capture counts the packets on a link, both ways.
type capture struct {
	where string
	mu    sync.Mutex
	all   map[labtest.Packet]int
}

func sniff(t testing.TB, h *labtest.Host, link string) *capture {
	t.Helper()
	c := &capture{where: h.Name + " " + link, all: map[labtest.Packet]int{}}
	labtest.Sniff(t, h, link, func(p labtest.Packet) {
		p.Length = 0 // alike, however long
		c.mu.Lock()
		defer c.mu.Unlock()
		c.all[p]++
	})
	return c
}

func text(p labtest.Packet) string {
	return fmt.Sprintf("%s:%d → %s:%d protocol %d icmp %d", p.Src, p.SPort, p.Dst, p.DPort, p.Protocol, p.ICMP)
}

// watch is captures at both ends of every wire.
type watch struct {
	c    *cluster
	ends []*capture
}

func (c *cluster) watch() *watch {
	c.t.Helper()
	w := &watch{c: c}
	for _, n := range c.nodes {
		w.ends = append(w.ends, sniff(c.t, n.Host, "eth0"), sniff(c.t, c.fabric, n.port))
	}
	return w
}

// plain counts the packets in clear at every end, and lists some.
func (w *watch) plain() (counts []int, first string) {
	time.Sleep(50 * time.Millisecond)
	var some []string
	for _, end := range w.ends {
		end.mu.Lock()
		n := 0
		for p, times := range end.all {
			if w.c.inClear(p) {
				n += times
				some = append(some, end.where+": "+text(p))
			}
		}
		end.mu.Unlock()
		counts = append(counts, n)
	}
	slices.Sort(some)
	return counts, strings.Join(some[:min(len(some), 6)], "; ")
}

// encrypted counts WireGuard's packets at every end.
func (w *watch) encrypted() (counts []int) {
	for _, end := range w.ends {
		end.mu.Lock()
		n := 0
		for p, times := range end.all {
			if p.Protocol == unix.IPPROTO_UDP && p.DPort == wgPort && p.SPort == wgPort {
				n += times
			}
		}
		end.mu.Unlock()
		counts = append(counts, n)
	}
	return counts
}

// none sees that nothing went over any wire in clear.
func (w *watch) none(what string) {
	w.c.t.Helper()
	counts, first := w.plain()
	w.c.t.Logf("%s: in clear %v, encrypted %v at %d ends", what, counts, w.encrypted(), len(w.ends))
	for _, n := range counts {
		if n > 0 {
			w.c.t.Errorf("%s: packets in clear: %s", what, first)
			return
		}
	}
}

// plenty sees that the same filter catches packets at every end.
func (w *watch) plenty(what string) {
	w.c.t.Helper()
	counts, _ := w.plain()
	w.c.t.Logf("%s: in clear %v", what, counts)
	for i, n := range counts {
		if n < 10 {
			w.c.t.Errorf("%s: %s caught %d packets in clear, want plenty: the filter proves nothing", what, w.ends[i].where, n)
		}
	}
}

func (w *watch) forget() {
	for _, end := range w.ends {
		end.mu.Lock()
		clear(end.all)
		end.mu.Unlock()
	}
}

// inClear tells whether a packet is the cluster's and should have been encrypted.
func (c *cluster) inClear(p labtest.Packet) bool {
	pod := func(a netip.Addr) bool {
		return slices.ContainsFunc(c.podRanges, func(r netip.Prefix) bool { return r.Contains(a) })
	}
	if pod(p.Src) || pod(p.Dst) {
		return true
	}
	node := func(a netip.Addr) bool {
		return slices.ContainsFunc(c.nodes, func(n *node) bool { return slices.Contains(n.model.Addresses, a) })
	}
	if !c.model.NodeEncryption.AllTraffic || !node(p.Src) || !node(p.Dst) {
		return false
	}
	switch {
	case p.Protocol == unix.IPPROTO_UDP && p.DPort == wgPort && p.SPort == wgPort:
		return false
	case p.Protocol == unix.IPPROTO_ICMPV6 && p.ICMP >= 133 && p.ICMP <= 137:
		return false
	case p.Protocol == unix.IPPROTO_TCP && (p.DPort == apiPort && p.Dst == c.nodes[0].model.Addresses[0] || p.SPort == apiPort && p.Src == c.nodes[0].model.Addresses[0]):
		return false
	}
	return true
}
