package relay

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

func echoUDP(c net.PacketConn, from net.Addr, b []byte) { _, _ = c.WriteTo(b, from) }

func nameUDP(s string) func(net.PacketConn, net.Addr, []byte) {
	return func(c net.PacketConn, from net.Addr, _ []byte) { _, _ = c.WriteTo([]byte(s), from) }
}

// expectSilence wants no datagram within 200 ms.
func expectSilence(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	b := make([]byte, 100)
	if k, err := c.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %q, %v; want silence", b[:k], err)
	}
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
}

func TestUDPReachesAnEndpoint(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveUDP("10.2.0.2:5353", echoUDP)
	n.serveUDP("[fd02::2]:5353", echoUDP)
	n.set(port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:5353"), port(netstate.UDP, "[fd96::1]:53", "[fd02::2]:5353"))
	long := strings.Repeat("long", 2000) // fragments
	for _, service := range []string{"10.96.0.1:53", "[fd96::1]:53"} {
		// The client's socket is connected: it takes replies from the service's address only.
		c := n.dial("udp", service)
		for _, s := range []string{"one", "two", long} {
			if got := ask(t, c, s); got != s {
				t.Errorf("%s answered %q", service, got)
			}
		}
		if _, err := c.Write(nil); err != nil { // an empty datagram is one
			t.Fatal(err)
		}
		if k, err := c.Read(make([]byte, 10)); k != 0 || err != nil {
			t.Errorf("answer to an empty datagram: %d bytes, %v", k, err)
		}
	}
	if s := n.stats().UDP; s.Open != 2 || s.Total != 2 || s.ClientBytes != uint64(2*(6+len(long))) || s.EndpointBytes != s.ClientBytes {
		t.Errorf("stats %+v, want 2 sessions, 8006 bytes each", s)
	}
}

// One request may have any number of replies, and none of another client's.
func TestOneRequestManyReplies(t *testing.T) {
	const burst = 50
	n := newNetwork(t, Options{})
	n.serveUDP("10.2.0.2:53", func(c net.PacketConn, from net.Addr, b []byte) {
		for i := range burst {
			_, _ = c.WriteTo(fmt.Appendf(nil, "%s %d", b, i), from)
		}
	})
	n.set(port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53"))
	a, b := n.dial("udp", "10.96.0.1:53"), n.dial("udp", "10.96.0.1:53")
	for c, who := range map[net.Conn]string{a: "a", b: "b"} {
		if _, err := c.Write([]byte(who)); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 100)
	for c, who := range map[net.Conn]string{a: "a", b: "b"} {
		for i := range burst {
			k, err := c.Read(buf)
			if want := fmt.Sprintf("%s %d", who, i); err != nil || string(buf[:k]) != want {
				t.Fatalf("reply %q, %v; want %q", buf[:k], err, want)
			}
		}
	}
}

func TestUDPSessionFollowsTheEndpoints(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveUDP("10.2.0.2:53", nameUDP("two"))
	n.serveUDP("10.2.0.3:53", nameUDP("three"))
	n.set(port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53"))
	c := n.dial("udp", "10.96.0.1:53")
	if got := ask(t, c, "?"); got != "two" {
		t.Fatalf("%q answered", got)
	}
	n.set(port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53", "10.2.0.3:53"))
	for range 20 {
		if got := ask(t, c, "?"); got != "two" {
			t.Fatalf("a session moved to %q although its endpoint is still there", got)
		}
	}
	n.set(port(netstate.UDP, "10.96.0.1:53", "10.2.0.3:53"))
	if got := ask(t, c, "?"); got != "three" {
		t.Fatalf("%q answered after its endpoint was removed", got)
	}
	n.set(port(netstate.UDP, "10.96.0.1:53"))
	if _, err := c.Write([]byte("?")); err != nil {
		t.Fatal(err)
	}
	expectSilence(t, c)
	n.eventuallyOpen(0)
	if s := n.stats().UDP; s.Refused[RefusedNoEndpoint] != 1 {
		t.Errorf("stats %+v, want one datagram refused for want of an endpoint", s)
	}
}

// An endpoint whose port is closed (ICMP) costs its session, and further sessions go
// elsewhere for a while.
func TestUDPEndpointThatRefusesIsLeft(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveUDP("10.2.0.2:53", nameUDP("two"))
	n.set(port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53", "10.2.0.3:53")) // .3 is closed
	labtest.Eventually(t, 5*time.Second, "a session meets the closed port", func() error {
		if _, err := n.dial("udp", "10.96.0.1:53").Write([]byte("?")); err != nil {
			return err
		}
		if n.stats().UDP.Refused[RefusedUnreachable] == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	for range 30 {
		if got := ask(t, n.dial("udp", "10.96.0.1:53"), "?"); got != "two" {
			t.Fatalf("%q answered", got)
		}
	}
}

func TestUDPAffinity(t *testing.T) {
	n := newNetwork(t, Options{})
	p := port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53", "10.2.0.3:53", "10.2.0.4:53")
	for _, e := range p.Endpoints {
		n.serveUDP(e.String(), nameUDP(e.String()))
	}
	p.AffinitySeconds = 60
	n.set(p)
	first := ask(t, n.dial("udp", "10.96.0.1:53"), "?")
	for range 20 {
		if got := ask(t, n.dial("udp", "10.96.0.1:53"), "?"); got != first {
			t.Fatalf("%s after %s", got, first)
		}
	}
	p.AffinitySeconds = 0
	n.set(p)
	seen := map[string]bool{}
	for range 60 {
		seen[ask(t, n.dial("udp", "10.96.0.1:53"), "?")] = true
	}
	if len(seen) != 3 {
		t.Errorf("without affinity only %v answered", seen)
	}
}

func TestIdleSessionsEnd(t *testing.T) {
	n := newNetwork(t, Options{SessionTimeout: 300 * time.Millisecond})
	n.serveUDP("10.2.0.2:53", echoUDP)
	n.set(port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53"))
	before := n.resources()
	busy, idle := n.dial("udp", "10.96.0.1:53"), n.dial("udp", "10.96.0.1:53")
	ask(t, idle, "x")
	for range 20 {
		ask(t, busy, "x")
		time.Sleep(50 * time.Millisecond)
	}
	if s := n.stats().UDP; s.Open != 1 || s.Total != 2 {
		t.Errorf("stats %+v, want the busy session only", s)
	}
	if got := ask(t, idle, "again"); got != "again" {
		t.Errorf("%q", got)
	}
	n.eventuallyOpen(0)
	if after := n.resources(); after.Descriptors > before.Descriptors || after.Goroutines > before.Goroutines {
		t.Errorf("descriptors %d → %d, goroutines %d → %d", before.Descriptors, after.Descriptors, before.Goroutines, after.Goroutines)
	}
}
