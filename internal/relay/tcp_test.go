package relay

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

func TestTCPReachesAnEndpointFromTheGatewaysAddress(t *testing.T) {
	n := newNetwork(t, Options{})
	source := make(chan string, 1)
	handle := func(c *net.TCPConn) {
		source <- addrPort(c.RemoteAddr()).Addr().String()
		echo(c)
	}
	n.serveTCP("10.2.0.2:8080", handle)
	n.serveTCP("[fd02::2]:8080", handle)
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:8080"), port(netstate.TCP, "[fd96::1]:80", "[fd02::2]:8080"))
	for service, want := range map[string]string{"10.96.0.1:80": "10.2.0.1", "[fd96::1]:80": "fd02::1"} {
		c := n.dial("tcp", service)
		if got := ask(t, c, "hello"); got != "hello" {
			t.Errorf("%s answered %q", service, got)
		}
		if got := <-source; got != want {
			t.Errorf("%s: the endpoint sees %s, want %s", service, got, want)
		}
	}
	if s := n.stats(); s.TCP.Open != 2 || s.TCP.Total != 2 || s.TCP.ClientBytes != 10 || s.TCP.EndpointBytes != 10 || s.Listeners != 2 {
		t.Errorf("stats %+v, want 2 connections with 5 bytes each way, 2 listeners", s)
	}
}

// Both sockets of an idle connection have the kernel look for a dead peer.
func TestKeepAlives(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:8080", echo)
	n.serveTCP("[fd02::2]:8080", echo)
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:8080"), port(netstate.TCP, "[fd96::1]:80", "[fd02::2]:8080"))
	for _, service := range []string{"10.96.0.1:80", "[fd96::1]:80"} {
		if got := ask(t, n.dial("tcp", service), "hello"); got != "hello" {
			t.Fatalf("%s answered %q", service, got)
		}
	}
	labtest.Eventually(t, 10*time.Second, "keep-alive timers of two minutes", func() error {
		var timers []string
		for line := range strings.Lines(n.gateway.Run("ss", "-Htno", "state", "established")) {
			if strings.Contains(line, "timer:(keepalive,1min5") {
				timers = append(timers, line)
			}
		}
		if len(timers) != 4 {
			return fmt.Errorf("%d of four sockets have one: %q", len(timers), n.gateway.Run("ss", "-Htno"))
		}
		return nil
	})
}

// Each side may end its direction first, and the other goes on.
func TestHalfCloseIsPassedOnBothWays(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:1", func(c *net.TCPConn) { // answers only after the client's end
		all, _ := io.ReadAll(c)
		_, _ = fmt.Fprintf(c, "read %d", len(all))
	})
	serverSaw := make(chan string, 1)
	n.serveTCP("10.2.0.2:2", func(c *net.TCPConn) { // ends first, then reads on
		_, _ = io.WriteString(c, "bye")
		_ = c.CloseWrite()
		all, _ := io.ReadAll(c)
		serverSaw <- string(all)
	})
	n.set(port(netstate.TCP, "10.96.0.1:1", "10.2.0.2:1"), port(netstate.TCP, "10.96.0.1:2", "10.2.0.2:2"))

	c := asTCP(n.dial("tcp", "10.96.0.1:1"))
	payload := bytes.Repeat([]byte("x"), 300_000)
	if _, err := c.Write(payload); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "read 300000" {
		t.Errorf("after the client's end: %q, %v", got, err)
	}

	c = asTCP(n.dial("tcp", "10.96.0.1:2"))
	if got, err := io.ReadAll(c); err != nil || string(got) != "bye" {
		t.Errorf("the server's end: %q, %v", got, err)
	}
	time.Sleep(50 * time.Millisecond)
	if _, err := io.WriteString(c, "still here"); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if got := <-serverSaw; got != "still here" {
		t.Errorf("after its own end the server saw %q", got)
	}
	n.eventuallyOpen(0)
}

// A reset on one side is a reset on the other, not an orderly end.
func TestResetIsPassedOnBothWays(t *testing.T) {
	n := newNetwork(t, Options{})
	n.serveTCP("10.2.0.2:1", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		tcpconn.Reset(c)
	})
	saw := make(chan error, 1)
	n.serveTCP("10.2.0.2:2", func(c *net.TCPConn) {
		_, _ = c.Write([]byte("x"))
		_, err := c.Read(make([]byte, 1))
		saw <- err
	})
	n.set(port(netstate.TCP, "10.96.0.1:1", "10.2.0.2:1"), port(netstate.TCP, "10.96.0.1:2", "10.2.0.2:2"))
	c := n.dial("tcp", "10.96.0.1:1")
	_, _ = c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client sees %v, want a reset", err)
	}
	c = n.dial("tcp", "10.96.0.1:2")
	_, _ = c.Read(make([]byte, 1))
	tcpconn.Reset(asTCP(c))
	if err := <-saw; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the endpoint sees %v, want a reset", err)
	}
	n.eventuallyOpen(0)
}

// The same while the other side sends: the kernel may tell of the reset only who writes.
func TestResetWhileTheOtherSends(t *testing.T) {
	n := newNetwork(t, Options{})
	send := func(c net.Conn) {
		for {
			if _, err := c.Write([]byte("more")); err != nil {
				return
			}
		}
	}
	ended := func(c *tcpconn.Conn) error {
		_, err := c.Read(make([]byte, 1))
		if errors.Is(err, io.EOF) { // its own write may have been told of the reset
			return c.Ended()
		}
		return err
	}
	halfRead, saw := make(chan struct{}), make(chan error)
	n.serveTCP("10.2.0.2:1", func(c *net.TCPConn) {
		_, _ = c.Write([]byte("half"))
		<-halfRead
		tcpconn.Reset(c)
	})
	n.serveTCP("10.2.0.2:2", func(tcp *net.TCPConn) {
		c := tcpconn.New(tcp)
		go send(c)
		_, _ = io.ReadFull(c, make([]byte, 4))
		halfRead <- struct{}{}
		saw <- ended(c)
		_ = c.Close()
	})
	n.set(port(netstate.TCP, "10.96.0.1:1", "10.2.0.2:1"), port(netstate.TCP, "10.96.0.1:2", "10.2.0.2:2"))
	for i := range 100 {
		c := tcpconn.New(asTCP(n.dial("tcp", "10.96.0.1:1")))
		go send(c)
		_, _ = io.ReadFull(c, make([]byte, 4))
		halfRead <- struct{}{}
		if err := ended(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("connection %d: the client sees an end (%v), want a reset", i, err)
		}
		_ = c.Close()
		other := n.dial("tcp", "10.96.0.1:2")
		_, _ = other.Write([]byte("half"))
		<-halfRead
		tcpconn.Reset(asTCP(other))
		if err := <-saw; !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("connection %d: the endpoint sees an end (%v), want a reset", i, err)
		}
	}
	n.eventuallyOpen(0)
}

func TestHundredMegabytesBothWaysAtOnce(t *testing.T) {
	const size = 100 << 20
	n := newNetwork(t, Options{})
	type sum = [sha256.Size]byte
	exchange := func(c *net.TCPConn, seed uint64) (sent, received sum, err error) {
		done := make(chan error, 1)
		out, in := sha256.New(), sha256.New()
		go func() {
			src := io.LimitReader(rand.NewChaCha8([32]byte{byte(seed)}), size)
			_, err := io.Copy(c, io.TeeReader(src, out))
			done <- errors.Join(err, c.CloseWrite())
		}()
		got, err := io.Copy(in, c)
		if err == nil && got != size {
			err = fmt.Errorf("%d bytes instead of %d", got, size)
		}
		err = errors.Join(err, <-done)
		return sum(out.Sum(nil)), sum(in.Sum(nil)), err
	}
	type result struct {
		sent, received sum
		err            error
	}
	server := make(chan result, 1)
	for _, a := range []string{"10.2.0.2:1", "[fd02::2]:1"} {
		n.serveTCP(a, func(c *net.TCPConn) {
			s, r, err := exchange(c, 2)
			server <- result{s, r, err}
		})
	}
	n.set(port(netstate.TCP, "10.96.0.1:1", "10.2.0.2:1"), port(netstate.TCP, "[fd96::1]:1", "[fd02::2]:1"))
	for _, service := range []string{"10.96.0.1:1", "[fd96::1]:1"} {
		sent, received, err := exchange(asTCP(n.dial("tcp", service)), 1)
		other := <-server
		if err := errors.Join(err, other.err); err != nil {
			t.Fatalf("%s: %v", service, err)
		}
		if sent != other.received || received != other.sent {
			t.Errorf("%s: the bytes differ", service)
		}
	}
	if s := n.stats().TCP; s.ClientBytes != 2*size || s.EndpointBytes != 2*size {
		t.Errorf("counted %d and %d bytes, want %d each", s.ClientBytes, s.EndpointBytes, 2*size)
	}
}

// expectReset opens a connection and wants it to be reset promptly.
func (n *network) expectReset(source, service string) {
	n.t.Helper()
	start := time.Now()
	c, err := n.tryDial("tcp", source, service)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
		n.t.Errorf("%s: %v, want a reset", service, err)
	}
	if d := time.Since(start); d > 500*time.Millisecond {
		n.t.Errorf("%s: the reset took %s", service, d)
	}
}

func TestWhatCannotBeServedIsReset(t *testing.T) {
	n := newNetwork(t, Options{})
	n.set(port(netstate.TCP, "10.96.0.1:80"), // no endpoint
		port(netstate.TCP, "10.96.0.2:80", "10.2.0.2:9", "10.2.0.3:9"), // nobody listens
		port(netstate.TCP, "[fd96::1]:80"))
	n.expectReset("", "10.96.0.1:80")
	n.expectReset("", "10.96.0.2:80")
	n.expectReset("", "10.96.0.3:80") // unknown
	n.expectReset("", "[fd96::1]:80")
	n.eventuallyOpen(0)
	got := n.stats().TCP
	for reason, want := range map[Reason]uint64{RefusedNoEndpoint: 2, RefusedUnreachable: 1, RefusedUnknown: 1, RefusedLimit: 0} {
		if got.Refused[reason] != want {
			t.Errorf("refused as %s: %d, want %d", reason, got.Refused[reason], want)
		}
	}
	if got.Total != 0 {
		t.Errorf("%d connections counted as relayed", got.Total)
	}
}

func TestAnotherEndpointIsTriedWhenOneFails(t *testing.T) {
	n := newNetwork(t, Options{DialTimeout: 200 * time.Millisecond})
	n.serveTCP("10.2.0.2:80", name("two"))
	// 10.2.0.3 refuses, 10.2.0.99 does not exist.
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80", "10.2.0.3:80", "10.2.0.99:80"))
	for range 10 {
		if got, err := io.ReadAll(n.dial("tcp", "10.96.0.1:80")); err != nil || string(got) != "two" {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

func TestConnectionsAreSpreadAndFollowTheEndpoints(t *testing.T) {
	n := newNetwork(t, Options{})
	for _, a := range []string{"2", "3", "4"} {
		n.serveTCP("10.2.0."+a+":80", func(c *net.TCPConn) { _, _ = io.WriteString(c, a); echo(c) })
	}
	ask1 := func() (net.Conn, string) {
		c := n.dial("tcp", "10.96.0.1:80")
		b := make([]byte, 1)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		return c, string(b)
	}
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80", "10.2.0.3:80"))
	seen := map[string]net.Conn{}
	for range 40 {
		c, who := ask1()
		seen[who] = c
	}
	if len(seen) != 2 || seen["2"] == nil || seen["3"] == nil {
		t.Fatalf("connections went to %v, want 2 and 3", seen)
	}
	if c := n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.3:80", "10.2.0.4:80")); c != 1 {
		t.Errorf("one changed port counted as %d", c)
	}
	if got := ask(t, seen["2"], "on"); got != "on" {
		t.Errorf("the connection to the removed endpoint answered %q", got)
	}
	for range 40 {
		if _, who := ask1(); who == "2" {
			t.Fatal("a new connection went to the removed endpoint")
		}
	}
	// The service goes: its connections end.
	n.set(port(netstate.TCP, "10.96.0.2:80", "10.2.0.3:80"))
	for who, c := range seen {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("connection to %s of the removed service: %v, want a reset", who, err)
		}
	}
}

func TestClientAffinity(t *testing.T) {
	n := newNetwork(t, Options{})
	var endpoints []string
	for _, a := range []string{"10.2.0.2:80", "10.2.0.3:80", "10.2.0.4:80"} {
		n.serveTCP(a, name(a))
		endpoints = append(endpoints, a)
	}
	p := port(netstate.TCP, "10.96.0.1:80", endpoints...)
	p.AffinitySeconds = 1
	n.set(p)
	who := func() string {
		b, err := io.ReadAll(n.dial("tcp", "10.96.0.1:80"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	first := who()
	for range 30 {
		if got := who(); got != first {
			t.Fatalf("%s after %s within the affinity's time", got, first)
		}
	}
	// Its endpoint goes: another one, and that one sticks.
	rest := strings.Fields(strings.ReplaceAll(strings.Join(endpoints, " "), first, ""))
	p = port(netstate.TCP, "10.96.0.1:80", rest...)
	p.AffinitySeconds = 1
	n.set(p)
	second := who()
	for range 30 {
		if got := who(); got != second || got == first {
			t.Fatalf("%s after %s, %s is gone", got, second, first)
		}
	}
	// Its time passes: after 12 tries with one of two at random it is the same with 1/4096.
	other := false
	for range 12 {
		time.Sleep(1050 * time.Millisecond)
		if other = who() != second; other {
			break
		}
	}
	if !other {
		t.Errorf("always %s although the affinity's time has passed", second)
	}
}

// A client that does not read stops its endpoint, at a bounded amount of memory.
func TestSlowReaderStopsTheSender(t *testing.T) {
	const conns = 20
	n := newNetwork(t, Options{})
	var sent atomic.Int64
	n.serveTCP("10.2.0.2:80", func(c *net.TCPConn) {
		b := make([]byte, 1<<20)
		for {
			k, err := c.Write(b)
			sent.Add(int64(k))
			if err != nil {
				return
			}
		}
	})
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80"))
	before := n.resources()
	for range conns {
		n.dial("tcp", "10.96.0.1:80")
	}
	last := int64(-1)
	labtest.Eventually(t, 10*time.Second, "the endpoint is stopped", func() error {
		time.Sleep(300 * time.Millisecond)
		now := sent.Load()
		defer func() { last = now }()
		if now != last {
			return fmt.Errorf("%d bytes more", now-last)
		}
		return nil
	})
	after := n.resources()
	grown := int64(after.RSSBytes) - int64(before.RSSBytes)
	t.Logf("%.1f MB taken per connection that nobody reads; the relay grew by %d KiB", float64(last)/conns/1e6, grown>>10)
	// Two kernels' socket buffers (tcp_rmem and tcp_wmem allow some 10 MB each way by
	// default) and a pipe.
	if last/conns > 48<<20 {
		t.Errorf("%d bytes taken per connection", last/conns)
	}
	if grown > 8<<20 {
		t.Errorf("the relay grew by %d bytes for %d stalled connections", grown, conns)
	}
}

func TestIdleConnectionsEnd(t *testing.T) {
	n := newNetwork(t, Options{IdleTimeout: 400 * time.Millisecond})
	n.serveTCP("10.2.0.2:80", echo)
	n.set(port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80"))
	busy, idle := n.dial("tcp", "10.96.0.1:80"), n.dial("tcp", "10.96.0.1:80")
	start := time.Now()
	done := make(chan time.Duration, 1)
	go func() {
		_, _ = idle.Read(make([]byte, 1))
		done <- time.Since(start)
	}()
	for time.Since(start) < 1200*time.Millisecond {
		ask(t, busy, "x")
		time.Sleep(50 * time.Millisecond)
	}
	if d := <-done; d < 350*time.Millisecond || d > 800*time.Millisecond {
		t.Errorf("idle connection ended after %s, want 400 ms and a quarter", d)
	}
}

func (n *network) eventuallyOpen(want int) {
	n.t.Helper()
	labtest.Eventually(n.t, 3*time.Second, "connections and sessions open", func() error {
		if s := n.stats(); s.TCP.Open+s.UDP.Open != want {
			return fmt.Errorf("%d TCP, %d UDP; want %d", s.TCP.Open, s.UDP.Open, want)
		}
		return nil
	})
}
