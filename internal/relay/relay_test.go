package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

func TestSecondSetChangesNothing(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:80", echo)
	a := port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80", "10.2.0.3:80")
	b := port(netstate.UDP, "[fd96::1]:53", "[fd02::2]:53")
	if got := n.set(a, b); got != 4 {
		t.Errorf("first Set changed %d, want 2 ports and 2 listeners", got)
	}
	c := n.dial("tcp", "10.96.0.1:80")
	a.Endpoints[0], a.Endpoints[1] = a.Endpoints[1], a.Endpoints[0]
	if got := n.set(b, a); got != 0 {
		t.Errorf("second Set changed %d", got)
	}
	a.AffinitySeconds = 5
	if got := n.set(b, a); got != 1 {
		t.Errorf("affinity of one port changed %d", got)
	}
	_ = c
	if got := n.set(a); got != 2 {
		t.Errorf("one port and its listener less changed %d", got)
	}
	// SCTP is not relayed, and needs no socket.
	if got := n.set(a, port(netstate.SCTP, "10.96.0.1:9")); got != 0 {
		t.Errorf("an SCTP port changed %d", got)
	}
}

func TestOtherModesAndCloseEndEverything(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:80", echo)
	n.serveTCP("10.2.0.2:81", func(c *net.TCPConn) { // sends more than anyone reads
		_, _ = io.Copy(c, zeros{})
	})
	n.serveUDP("10.2.0.2:53", echoUDP)
	ports := []netstate.ServicePort{
		port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80"),
		port(netstate.TCP, "10.96.0.1:81", "10.2.0.2:81"),
		port(netstate.TCP, "10.96.0.1:82", "10.2.0.99:82"), // a dial that takes long
		port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53"),
	}
	before := n.resources()
	for what, end := range map[string]func(){
		"mode Translate": func() {
			if got := n.call(request{Set: &netstate.Services{Mode: netstate.ServicesTranslate, Ports: ports}}).Changed; got != 6 {
				t.Errorf("leaving the mode changed %d, want 4 ports and 2 listeners", got)
			}
		},
		"no mode": func() { n.call(request{Set: &netstate.Services{}}) },
	} {
		t.Run(what, func(t *testing.T) {
			n.set(ports...)
			conns := n.openSome()
			end()
			expectEnded(t, conns)
			labtest.Eventually(t, 2*time.Second, "descriptors and goroutines as before", func() error {
				return sameResources(before, n.resources())
			})
		})
	}
	n.set(ports...)
	conns := n.openSome()
	start := time.Now()
	n.call(request{Close: true}) // looks for leaked goroutines
	if d := time.Since(start); d > time.Second {
		t.Errorf("Close took %s", d)
	}
	expectEnded(t, conns)
	after := n.call(request{Close: true})
	if after.Descriptors > before.Descriptors {
		t.Errorf("descriptors %d → %d after Close", before.Descriptors, after.Descriptors)
	}
	if _, err := n.try(request{Set: &netstate.Services{Mode: netstate.ServicesProxy, Ports: ports}}); err == nil {
		t.Error("Set after Close succeeded")
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// openSome opens an idle, a stalled and a dialling connection, and a UDP session.
func (n *network) openSome() []net.Conn {
	n.t.Helper()
	idle, stalled := n.dial("tcp", "10.96.0.1:80"), n.dial("tcp", "10.96.0.1:81")
	ask(n.t, idle, "x")
	dialling, udp := n.dial("tcp", "10.96.0.1:82"), n.dial("udp", "10.96.0.1:53")
	ask(n.t, udp, "x")
	time.Sleep(200 * time.Millisecond)
	return []net.Conn{idle, stalled, dialling}
}

func expectEnded(t *testing.T, conns []net.Conn) {
	t.Helper()
	for i, c := range conns {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("connection %d: %v, want a reset", i, err)
		}
	}
}

func TestLimits(t *testing.T) {
	n := newNetwork(t, Options{MaxConnections: 5, MaxConnectionsPerSource: 3, MaxSessions: 5, MaxSessionsPerSource: 3})
	n.serveTCP("10.2.0.2:80", echo)
	n.serveUDP("10.2.0.2:53", echoUDP)
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80"), port(netstate.UDP, "10.96.0.1:53", "10.2.0.2:53"))
	open := func(protocol, source, service string, count int) (conns []net.Conn) {
		for range count {
			c, err := n.tryDial(protocol, source, service)
			if err != nil {
				t.Fatal(err)
			}
			ask(t, c, "x")
			conns = append(conns, c)
		}
		return conns
	}
	first := open("tcp", "10.1.0.2", "10.96.0.1:80", 3)
	n.expectReset("10.1.0.2", "10.96.0.1:80") // over the source's limit
	open("tcp", "10.1.0.3", "10.96.0.1:80", 2)
	n.expectReset("10.1.0.3", "10.96.0.1:80") // over the total
	s := n.stats().TCP
	if s.Open != 5 || s.Refused[RefusedSourceLimit] != 1 || s.Refused[RefusedLimit] != 1 {
		t.Errorf("TCP stats %+v", s)
	}
	_ = first[0].Close()
	n.eventuallyOpen(4)
	open("tcp", "10.1.0.3", "10.96.0.1:80", 1)

	open("udp", "10.1.0.2", "10.96.0.1:53", 3)
	over := func(source string) {
		c, err := n.tryDial("udp", source, "10.96.0.1:53")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("x"))
		expectSilence(t, c)
	}
	over("10.1.0.2")
	open("udp", "10.1.0.3", "10.96.0.1:53", 2)
	over("10.1.0.3")
	if s := n.stats().UDP; s.Open != 5 || s.Refused[RefusedSourceLimit] != 1 || s.Refused[RefusedLimit] != 1 {
		t.Errorf("UDP stats %+v", s)
	}
}

// 1,000 connections at a time, 10,000 opened and closed, each carrying bytes; then file
// descriptors and goroutines are where they were.
func TestTenThousandConnectionsLeaveNothing(t *testing.T) {
	const total, atOnce = 10_000, 1_000
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:80", echo)
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80"))
	before := n.resources()
	payload := string(make([]byte, 40<<10)) // enough to be spliced
	start := time.Now()
	for range total / atOnce {
		conns := n.dialMany(atOnce, "10.96.0.1:80")
		if s := n.stats().TCP; s.Open > atOnce {
			t.Errorf("%d open", s.Open)
		}
		each(t, conns, func(c net.Conn) error {
			go func() { _, _ = io.WriteString(c, payload); _ = asTCP(c).CloseWrite() }()
			got, err := io.ReadAll(c)
			if err == nil && len(got) != len(payload) {
				err = fmt.Errorf("%d bytes back", len(got))
			}
			return errors.Join(err, c.Close())
		})
	}
	t.Logf("%d connections in %s", total, time.Since(start))
	n.eventuallyOpen(0)
	if s := n.stats().TCP; s.Total != total {
		t.Errorf("%d relayed, want %d", s.Total, total)
	}
	// Unused pipes go within two rounds of the sweep.
	labtest.Eventually(t, 4*time.Second, "descriptors and goroutines as before", func() error {
		return sameResources(before, n.resources())
	})
}

// Idle connections cost two descriptors and little memory, also after bulk data.
func TestIdleConnectionsAreCheap(t *testing.T) {
	const count, bulk = 1000, 100
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:80", echo)
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80"))
	before := n.resources()
	conns := n.dialMany(count, "10.96.0.1:80")
	exchange := func(size int) func(net.Conn) error {
		return func(c net.Conn) error {
			go func() { _, _ = c.Write(make([]byte, size)) }()
			_, err := io.CopyN(io.Discard, c, int64(size))
			return err
		}
	}
	each(t, conns, exchange(1))
	after := n.resources()
	fds := after.Descriptors - before.Descriptors
	rss := (int64(after.RSSBytes) - int64(before.RSSBytes)) / count
	inGo := (int64(after.GoBytes) - int64(before.GoBytes)) / count
	t.Logf("per idle connection: %.2f descriptors, %.1f KiB resident, %.1f KiB of heap and stacks",
		float64(fds)/count, float64(rss)/1024, float64(inGo)/1024)
	if fds != 2*count {
		t.Errorf("%d descriptors for %d connections", fds, count)
	}
	if inGo > 32<<10 { // resident memory is another with the race detector
		t.Errorf("%d bytes per connection", inGo)
	}
	each(t, conns[:bulk], exchange(1<<20))
	each(t, conns, exchange(1))
	labtest.Eventually(t, 4*time.Second, "no pipe is held", func() error {
		if fds := n.resources().Descriptors - before.Descriptors; fds != 2*count {
			return fmt.Errorf("%d descriptors for %d connections", fds, count)
		}
		return nil
	})
}

// A Set that could not open its socket tells so, and the next one tries again.
func TestSetTriesAgainAfterAFailure(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:80", echo)
	n.serveTCP("[fd02::2]:80", echo)
	var other net.Listener
	n.gateway.Do(func() (err error) {
		other, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", netstate.RelayPort))
		return err
	})
	defer other.Close()
	services := netstate.Services{Mode: netstate.ServicesProxy, Ports: []netstate.ServicePort{
		port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80"), port(netstate.TCP, "[fd96::1]:80", "[fd02::2]:80"),
	}}
	_, err := n.try(request{Set: &services})
	if err == nil || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "127.0.0.1:19605") {
		t.Fatalf("port taken: %v", err)
	}
	if got := ask(t, n.dial("tcp", "[fd96::1]:80"), "x"); got != "x" {
		t.Errorf("IPv6 answered %q although only IPv4 failed", got)
	}
	_ = other.Close()
	if got := n.call(request{Set: &services}).Changed; got != 1 {
		t.Errorf("the second Set changed %d, want the one listener", got)
	}
	if got := ask(t, n.dial("tcp", "10.96.0.1:80"), "x"); got != "x" {
		t.Errorf("IPv4 answered %q", got)
	}
}

func sameResources(before, after reply) error {
	if after.Descriptors > before.Descriptors || after.Goroutines > before.Goroutines {
		return fmt.Errorf("descriptors %d → %d, goroutines %d → %d",
			before.Descriptors, after.Descriptors, before.Goroutines, after.Goroutines)
	}
	return nil
}

// dialMany opens connections on one visit to the client's namespace.
func (n *network) dialMany(count int, address string) []net.Conn {
	n.t.Helper()
	conns := make([]net.Conn, count)
	n.client.Do(func() error {
		for i := range conns {
			c, err := net.DialTimeout("tcp", address, 5*time.Second)
			if err != nil {
				return err
			}
			conns[i] = c
		}
		return nil
	})
	n.t.Cleanup(func() {
		for _, c := range conns {
			_ = c.Close()
		}
	})
	return conns
}

// each runs f for all connections at once.
func each(t *testing.T, conns []net.Conn, f func(net.Conn) error) {
	t.Helper()
	var wg sync.WaitGroup
	errs := make([]error, len(conns))
	for i, c := range conns {
		wg.Go(func() {
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			errs[i] = f(c)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
