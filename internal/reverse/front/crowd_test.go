package front

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// rounds is how often a test is repeated that a busy machine has spoilt: what the front itself
// does wrong, it does each time.
const rounds = 3

// 5,000 clients that dawdle in every way are cut within 10 s; an honest one from the very
// same address never waits for 2 s.
func TestSlowClients(t *testing.T) {
	load(t, 15_000)
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com", "b.example.com")
	a := newServer(t, "a", &cert, nil)
	path := writeFile(t, t.TempDir(), "routes.yaml", fmt.Sprintf(
		"routes: [{serverName: a.example.com, backends: [{address: %q}]}, {serverName: b.example.com, backends: [{address: %q}]}]", a.address, a.address))
	o := childOptions{Routes: path, Listen: freePort(t), DrainTimeout: time.Second}
	c := startChild(t, o)
	var err error
	for range rounds {
		if err = slowClients(t, ca, o.Listen); err == nil {
			break
		}
		t.Log(err)
	}
	if err != nil {
		t.Errorf("the last of %d rounds: %v", rounds, err)
	}
	t.Logf("front's RSS %d MB", rss(t, c.Process.Pid)>>20)
}

// slowClients is one round: what was not as it should be.
func slowClients(t *testing.T, ca *authority, address string) error {
	t.Helper()
	const clients = 5000
	var slowest, never atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		dawdle(t, address, clients, func(took time.Duration, cut bool) {
			if !cut {
				never.Add(1)
			}
			for {
				old := slowest.Load()
				if int64(took) <= old || slowest.CompareAndSwap(old, int64(took)) {
					return
				}
			}
		})
	}()
	var honest []time.Duration
	var failed []error
	for waiting := true; waiting; {
		select {
		case <-ended:
			waiting = false
		case <-time.After(20 * time.Millisecond):
			begin := time.Now()
			conn, _, err := ca.try(address, "a.example.com")
			honest = append(honest, time.Since(begin))
			if err != nil {
				failed = append(failed, err)
				continue
			}
			_ = conn.Close()
		}
	}
	slices.Sort(honest)
	p99 := honest[len(honest)*99/100]
	t.Logf("%d slow clients: the last was cut after %s; %d honest ones: p50 %s, p99 %s, max %s",
		clients, time.Duration(slowest.Load()).Round(10*time.Millisecond), len(honest),
		honest[len(honest)/2].Round(time.Millisecond/10), p99.Round(time.Millisecond/10), honest[len(honest)-1].Round(time.Millisecond/10))
	switch {
	case len(failed) > 0:
		return fmt.Errorf("%d honest clients were not served, the first: %w", len(failed), failed[0])
	case never.Load() > 0 || time.Duration(slowest.Load()) > 10*time.Second:
		return fmt.Errorf("%d were never cut, the last after %s; want 10 s", never.Load(), time.Duration(slowest.Load()))
	case p99 > 2*time.Second || len(honest) < 100:
		return fmt.Errorf("p99 of %d honest clients is %s, want 2 s", len(honest), p99)
	}
	return nil
}

// dawdle connects so many clients that dawdle, each in one of several ways, and says of each after
// how long it was cut.
func dawdle(t *testing.T, address string, clients int, tell func(took time.Duration, cut bool)) {
	t.Helper()
	whole := helloFor(t, "b.example.com")
	request := []byte("CONNECT b.example.com:443 HTTP/1.1\r\nHost: b.example.com\r\n")
	ways := []func(conn net.Conn){
		func(net.Conn) {},
		func(conn net.Conn) { trickle(conn, whole, 100*time.Millisecond) },
		func(conn net.Conn) { trickle(conn, append(request, make([]byte, 1000)...), 200*time.Millisecond) },
		func(conn net.Conn) { _, _ = conn.Write(whole) },
		func(conn net.Conn) { _, _ = conn.Write(append(request, "\r\n"...)) },
	}
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			conn, err := net.DialTimeout("tcp", address, 10*time.Second)
			if err != nil {
				return // refused
			}
			defer conn.Close()
			begin := time.Now()
			_ = conn.SetDeadline(begin.Add(15 * time.Second))
			go ways[i%len(ways)](conn)
			_, err = io.Copy(io.Discard, conn)
			var timeout net.Error
			tell(time.Since(begin), !errors.As(err, &timeout) || !timeout.Timeout())
		})
		if i%100 == 0 {
			time.Sleep(10 * time.Millisecond) // all of them within a second or two
		}
	}
	wg.Wait()
}

// trickle writes a byte at a time until it is not let.
func trickle(conn net.Conn, b []byte, pause time.Duration) {
	for i := range b {
		if _, err := conn.Write(b[i : i+1]); err != nil {
			return
		}
		time.Sleep(pause)
	}
}

// 1,000 spokes with two connections each come back after a restart of the front within
// 10 s, mutual TLS 1.3 and all; the other front's connections notice nothing.
func TestReconnectStorm(t *testing.T) {
	load(t, 15_000)
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	path := writeFile(t, t.TempDir(), "routes.yaml", fmt.Sprintf("routes: [{serverName: a.example.com, backends: [{address: %q}]}]", a.address))
	first := childOptions{Routes: path, Listen: freePort(t)}
	other := childOptions{Routes: path, Listen: freePort(t)}
	c := startChild(t, first)
	startChild(t, other)
	steady, _, err := ca.try(other.Listen, "a.example.com")
	if err != nil {
		t.Fatal(err)
	}
	defer steady.Close()

	const spokes = 2000 // connections
	ctx, cancel := context.WithCancel(context.Background())
	var connected atomic.Int64
	var wg sync.WaitGroup
	for range spokes {
		wg.Go(func() { spoke(ctx, ca, first.Listen, &connected) })
	}
	t.Cleanup(func() { cancel(); wg.Wait() })
	eventually(t, 60*time.Second, "all spokes are connected", allConnected(&connected, spokes))

	took := time.Hour
	for i := 0; i < rounds && took > 10*time.Second; i++ {
		begin := time.Now()
		_ = c.Process.Kill()
		for range c.done { // until it is closed
		}
		eventually(t, 30*time.Second, "all spokes noticed", allConnected(&connected, 0))
		c = startChild(t, first)
		up := time.Now()
		eventually(t, 60*time.Second, "all spokes are back", allConnected(&connected, spokes))
		took = time.Since(up)
		t.Logf("%d connections of 1,000 spokes are back %s after the front is, %s after it was killed; front's RSS %d MB",
			spokes, took.Round(10*time.Millisecond), time.Since(begin).Round(10*time.Millisecond), rss(t, c.Process.Pid)>>20)
	}
	if took > 10*time.Second {
		t.Errorf("took %s, want 10 s", took)
	}
	if err := echo(steady, []byte("still here")); err != nil {
		t.Errorf("a connection of the other front: %v", err)
	}
}

func allConnected(connected *atomic.Int64, want int64) func() error {
	return func() error {
		if n := connected.Load(); n != want {
			return fmt.Errorf("%d of %d", n, want)
		}
		return nil
	}
}

// spoke keeps one connection up.
func spoke(ctx context.Context, ca *authority, address string, connected *atomic.Int64) {
	client := &tls.Config{ServerName: "a.example.com", RootCAs: ca.pool, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ca.clientCertificate}}
	for ctx.Err() == nil {
		conn, err := (&tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: client}).DialContext(ctx, "tcp", address)
		if err == nil {
			_, err = readLine(conn)
		}
		if err == nil {
			connected.Add(1)
			stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
			_, _ = conn.Read(make([]byte, 1))
			stop()
			connected.Add(-1)
		}
		if conn != nil {
			_ = conn.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}
