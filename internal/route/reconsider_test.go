package route_test

import (
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/route"
)

// sender is an open socket to one address, of which both links know the neighbour.
type sender struct {
	t    *testing.T
	conn *net.UDPConn
	seen atomic.Int32 // packets to the address over cvt0
}

func newSender(t *testing.T, h *labtest.Host, to string) *sender {
	t.Helper()
	s := &sender{t: t}
	for _, link := range []string{"eth0", "cvt0"} {
		h.IP("neigh", "add", to, "lladdr", "02:00:00:00:00:09", "dev", link, "nud", "permanent")
	}
	address := netip.AddrPortFrom(netip.MustParseAddr(to), 4000)
	h.Do(func() (err error) {
		s.conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(address))
		return err
	})
	t.Cleanup(func() { _ = s.conn.Close() })
	labtest.Sniff(t, h, "cvt0", func(p labtest.Packet) {
		if p.Dst == address.Addr() && p.DPort == 4000 {
			s.seen.Add(1)
		}
	})
	return s
}

// tunnelled tells whether the next packet leaves over cvt0.
func (s *sender) tunnelled() bool {
	s.t.Helper()
	before := s.seen.Load()
	if _, err := s.conn.Write([]byte("x")); err != nil {
		s.t.Fatal(err)
	}
	for range 20 {
		if s.seen.Load() > before {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

// notices counts the routes in the main table that come and go and lead nowhere.
func notices(t *testing.T, h *labtest.Host) *atomic.Int32 {
	t.Helper()
	updates, done, count := make(chan netlink.RouteUpdate, 1000), make(chan struct{}), new(atomic.Int32)
	h.Do(func() error { return netlink.RouteSubscribe(updates, done) })
	t.Cleanup(func() { close(done) })
	go func() {
		for u := range updates {
			if u.Table == unix.RT_TABLE_MAIN && u.Route.Type == unix.RTN_THROW {
				count.Add(1)
			}
		}
	}()
	return count
}

// An open IPv6 socket takes a new route, and all of them take a new rule, with the next packet; and
// for one new route it is not every destination that is looked up again.
func TestSocketsFollow(t *testing.T) {
	h := host(t)
	var r *route.Route
	h.Do(func() (err error) {
		r, err = route.New(route.Options{FollowedLink: "cvt0"})
		return err
	})
	t.Cleanup(func() { _ = r.Detach() })
	const old, late = "2001:db8::9", "2001:db8::a"
	a, b := newSender(t, h, old), newSender(t, h, late)
	h.IP("-6", "route", "add", "throw", "2001:db8::4000:0:0:b", "proto", "196") // left by a process that was killed

	s := betweenNodes("cvt0")
	rules := s.Rules
	s.Rules = nil
	apply(t, r, s)
	if a.tunnelled() || b.tunnelled() {
		t.Fatal("no rule leads to the tunnel, and packets take it")
	}
	s.Rules = rules
	count := notices(t, h)
	if n := apply(t, r, s); n != len(rules) {
		t.Fatalf("%d changes for %d rules", n, len(rules))
	}
	if !a.tunnelled() {
		t.Error("after a rule came: still by the old way")
	}
	if b.tunnelled() {
		t.Fatal("no route leads through the tunnel, and packets take it")
	}
	expect := func(what string, want int32) {
		t.Helper()
		time.Sleep(200 * time.Millisecond) // the kernel has told of them; the test may not have heard yet
		if n := count.Swap(0); n != want {
			t.Errorf("%s: %d notices, want %d", what, n, want)
		}
	}
	expect("rules of two routes", 4) // one came and went for each IPv6 route
	s.Routes = append(s.Routes, netstate.Route{
		Destination: pfx(late + "/128"), Kind: netstate.RouteUnicast, Link: "cvt0", Metric: netstate.MetricTunnel, Table: netstate.EncryptionTable,
	})
	s.Sort()
	if n := apply(t, r, s); n != 1 {
		t.Fatalf("%d changes for one route", n)
	}
	if !b.tunnelled() || !a.tunnelled() {
		t.Error("after a route came: still by the old way")
	}
	expect("one route", 3) // one was left and went, one came and went
	if n := apply(t, r, s); n != 0 {
		t.Errorf("nothing new: %d changes", n)
	}
	expect("nothing new", 0)
}
