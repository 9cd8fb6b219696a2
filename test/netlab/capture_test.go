package netlab

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// capture counts the packets on a link, both ways.
type capture struct {
	stop  func()
	total atomic.Int64
	clear atomic.Int64 // from or to an inner range
	mu    sync.Mutex
	first labtest.Packet // of those in clear
	count func(labtest.Packet)
}

// sniff starts a capture on a link of a host; count, if not nil, sees every packet.
func sniff(t testing.TB, h *labtest.Host, link string, count func(labtest.Packet)) *capture {
	t.Helper()
	c := &capture{count: count}
	c.stop = labtest.Sniff(t, h, link, c.note)
	return c
}

func (c *capture) note(p labtest.Packet) {
	c.total.Add(1)
	if c.count != nil {
		c.count(p)
	}
	if !within(p.Src, inner) && !within(p.Dst, inner) {
		return
	}
	if c.clear.Add(1) == 1 {
		c.mu.Lock()
		c.first = p
		c.mu.Unlock()
	}
}

// leaks watches links of the underlay for packets in clear.
type leaks struct {
	n        *network
	captures map[string]*capture
}

// watchLeaks starts a capture on each of the internet's links that are named.
func (n *network) watchLeaks(links ...string) *leaks {
	n.t.Helper()
	l := &leaks{n: n, captures: map[string]*capture{}}
	for _, link := range links {
		l.captures[link] = sniff(n.t, n.internet, link, nil)
	}
	return l
}

// none ends the captures: tunnels ran over every link, nothing was seen in clear, and the
// same filter catches a packet that is sent in clear on purpose.
func (l *leaks) none() {
	t := l.n.t
	t.Helper()
	time.Sleep(50 * time.Millisecond)
	for link, c := range l.captures {
		c.mu.Lock()
		got, total := c.clear.Load(), c.total.Load()
		t.Logf("link %s: %d packets in clear of %d", link, got, total)
		if got != 0 || total == 0 {
			t.Errorf("link %s: %d packets in clear of %d, want 0 of some; the first: %s → %s, protocol %d", link, got, total, c.first.Src, c.first.Dst, c.first.Protocol)
		}
		c.mu.Unlock()
	}
	for link, c := range l.captures {
		l.control(link, c)
		c.stop()
	}
}

// control sends one packet of each family in clear out of the internet's link.
func (l *leaks) control(link string, c *capture) {
	t, h := l.n.t, l.n.internet
	t.Helper()
	before := c.clear.Load()
	for _, to := range []string{"10.244.9.9", "fd00:10:244:9::9"} {
		prefix := "/32"
		if netip.MustParseAddr(to).Is6() {
			prefix = "/128"
		}
		h.IP("route", "replace", to+prefix, "dev", link)
		mac := "02:00:00:00:00:01"
		h.IP("neigh", "replace", to, "lladdr", mac, "dev", link)
		conn, err := dial(h, "udp", "", at(to, port), time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("in clear"))
		_ = conn.Close()
		h.IP("route", "del", to+prefix, "dev", link)
	}
	labtest.Eventually(t, time.Second, "the capture on "+link+" sees a packet in clear", func() error {
		if c.clear.Load() < before+2 {
			return errors.New("not seen")
		}
		return nil
	})
}
