package mux

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// chain is a client's socket or TLS connection, a session to a hub, one on to a spoke, and a target's connection, as it is
// in use: relays everywhere, TLS over corked connections between them.
type chain struct {
	client net.Conn
	target *net.TCPConn
	first  *Session // the client's end of the one to the hub
	hub    *Session // its other end
	ended  chan error
}

// tlsSessions is pair over TLS, with little room in the kernel, so that a lot is written in part only.
func tlsSessions(t testing.TB, accept func(*Stream)) (dialer, acceptor *Session) {
	t.Helper()
	c, s := tlsPair(t, true)
	for _, x := range []*tls.Conn{c, s} {
		if err := tcpOf(x).SetWriteBuffer(16 << 10); err != nil {
			t.Fatal(err)
		}
	}
	dialer, acceptor = New(c, Config{Dialer: true}), New(s, Config{Accept: accept})
	t.Cleanup(func() {
		dialer.Close()
		acceptor.Close()
		<-dialer.Done()
		<-acceptor.Done()
	})
	return dialer, acceptor
}

func tcpOf(c net.Conn) *net.TCPConn { return c.(*tls.Conn).NetConn().(*Corked).Conn.(*net.TCPConn) }

// chained makes n chains over the same two sessions.
func chained(t testing.TB, n int) []*chain {
	t.Helper()
	targets, ended := make(chan *net.TCPConn, 1), make(chan error, 3*n)
	var relays atomic.Int64
	relay := func(a, b Conn) {
		defer relays.Add(-1)
		_, _, err := Relay(a, b)
		ended <- err
	}
	relays.Store(int64(3 * n))
	var all []*chain
	t.Cleanup(func() {
		for _, c := range all {
			_, _ = c.client.Close(), c.target.Close()
		}
		waitFor(t, func() bool { return relays.Load() == 0 })
	})
	second, _ := tlsSessions(t, func(st *Stream) {
		a, b := tcpPair(t)
		_ = st.Accept(nil)
		targets <- b
		relay(a, st)
	})
	first, hub := tlsSessions(t, func(st *Stream) {
		on, err := second.Open(nil)
		if err != nil {
			t.Error(err)
			return
		}
		_ = st.Accept(nil)
		relay(st, on)
	})
	for i := range n {
		st, err := first.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		a, client := unixPair(t)
		if i%2 == 1 { // or a client of the hub's own listener
			ours, theirs := tlsPair(t, true)
			_ = tcpOf(ours).SetWriteBuffer(16 << 10)
			a, client = ours, theirs
		}
		go relay(a, st)
		all = append(all, &chain{client: client, target: <-targets, first: first, hub: hub, ended: ended})
	}
	return all
}

func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

func noise(r *rand.Rand, n int) []byte {
	b := make([]byte, 0, n)
	for len(b) < n {
		b = binary.BigEndian.AppendUint64(b, r.Uint64())
	}
	return b
}

// send writes data in pieces of all sizes.
func send(w net.Conn, data []byte, r *rand.Rand) error {
	for len(data) > 0 {
		n := min(len(data), 1+r.IntN(1<<(4+r.IntN(15))))
		if _, err := w.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return w.(Conn).CloseWrite()
}

// receive reads to the end, and pauses now and then, so that everything on the way has to wait.
func receive(c net.Conn, r *rand.Rand) ([]byte, error) {
	var got []byte
	b := make([]byte, 256<<10)
	for {
		n, err := c.Read(b[:1+r.IntN(len(b))])
		got = append(got, b[:n]...)
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		if r.IntN(50) == 0 {
			time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
		}
	}
}

// What goes through arrives as it was sent, both ways at once, whoever is slow.
func TestGivenOn(t *testing.T) {
	for i, c := range chained(t, 4) {
		r := random(uint64(i))
		up, down := noise(r, 3<<20), noise(r, 3<<20)
		errs := make(chan error, 4)
		for k, f := range []func(*rand.Rand) error{
			func(r *rand.Rand) error { return send(c.client, up, r) },
			func(r *rand.Rand) error { return send(c.target, down, r) },
			func(r *rand.Rand) error { return same(c.client, down, r) },
			func(r *rand.Rand) error { return same(c.target, up, r) },
		} {
			r := random(uint64(100 + 10*i + k))
			go func() { errs <- f(r) }()
		}
		for range 4 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		for range 3 {
			if err := <-c.ended; err != nil {
				t.Error(err)
			}
		}
	}
}

func same(c net.Conn, want []byte, r *rand.Rand) error {
	got, err := receive(c, r)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%d bytes arrived, not the %d that were sent", len(got), len(want))
	}
	return err
}

// While nobody reads one stream, and its window is full, others over the same sessions go on.
func TestGivenOnPastAStalledOne(t *testing.T) {
	all := chained(t, 2)
	stalled, c := all[0], all[1]
	go func() { _, _ = io.Copy(stalled.target, endless{}) }()
	go func() { _, _ = io.Copy(stalled.client, endless{}) }()
	time.Sleep(100 * time.Millisecond)
	go func() { _, _ = io.Copy(struct{ io.Writer }{c.target}, c.target) }()
	_ = c.client.SetDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 100<<10)
	for i := range 30 {
		n := 1 + i*3000
		go func() { _, _ = c.client.Write(b[:n]) }()
		if _, err := io.ReadFull(c.client, make([]byte, n)); err != nil {
			t.Fatalf("echo %d: %v", i, err)
		}
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// What came before a session was lost is given on.
func TestGivenOnBeforeTheEnd(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	for range 10 {
		c := chained(t, 1)[0]
		c.hub.mu.Lock() // its reader waits with the first frame, and finds the end with the last one
		if _, err := c.client.Write(data); err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() bool {
			_, out := c.first.Bytes()
			c.first.mu.Lock()
			defer c.first.mu.Unlock()
			return out == uint64(len(data)) && !c.first.writing && !c.first.pending()
		})
		_ = tcpOf(c.first.conn).CloseWrite()
		time.Sleep(10 * time.Millisecond)
		c.hub.mu.Unlock()
		got, err := io.ReadAll(c.target)
		if !bytes.Equal(got, data) || err == nil {
			t.Fatalf("%d of %d bytes arrived, and then %v", len(got), len(data), err)
		}
	}
}

// However a connection ends, and whenever, all that carried it end.
func TestGivenOnUntilTheEnd(t *testing.T) {
	r := random(1)
	for round := range 12 {
		all := chained(t, 8)
		for i, c := range all {
			for _, x := range []net.Conn{c.client, c.target} {
				if r.IntN(4) > 0 {
					go func() { _, _ = io.Copy(struct{ io.Writer }{x}, endless{}) }()
				}
				if r.IntN(4) > 0 {
					go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{x}) }()
				}
			}
			after, how := time.Duration(r.IntN(3000))*time.Microsecond, (round+i)%4
			go func() {
				time.Sleep(after)
				switch how {
				case 0:
					_ = c.client.Close()
				case 1:
					_ = c.target.Close()
				case 2:
					_, _ = c.target.SetLinger(0), c.target.Close()
				case 3:
					_, _ = c.client.(Conn).CloseWrite(), c.target.CloseWrite()
				}
				time.Sleep(20 * time.Millisecond) // an end alone leaves the other direction as it is
				_, _ = c.client.Close(), c.target.Close()
			}()
		}
		if round%3 == 2 {
			time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
			all[0].first.Close()
		}
		cut := false
		deadline := time.After(20 * time.Second)
		for i := range 3 * len(all) {
			select {
			case err := <-all[0].ended:
				cut = cut || err != nil
			case <-deadline:
				t.Fatalf("round %d: %d of %d relays have not ended", round, 3*len(all)-i, 3*len(all))
			}
		}
		if !cut {
			t.Errorf("round %d: no connection was cut", round)
		}
	}
}

// A TLS client that pauses before the end gets all of it, whether it has ended before or not: what is still to be
// written when the target has ended, and TLS's own end behind it, wait for the client as long as it takes.
func TestGivenOnToWhoPauses(t *testing.T) {
	for _, first := range []bool{true, false} {
		for _, pause := range []time.Duration{0, 6 * time.Second} { // crypto/tls would wait for 5 s
			t.Run(fmt.Sprintf("ends first: %v, pauses for %s", first, pause), func(t *testing.T) {
				t.Parallel()
				c := chained(t, 2)[1]
				client := c.client.(*tls.Conn)
				_ = tcpOf(client).SetReadBuffer(8 << 10) // the rest waits at the hub
				if first {
					_ = client.CloseWrite()
				}
				want := noise(random(1), 100<<10)
				go func() { _, _ = c.target.Write(want); _ = c.target.CloseWrite() }()
				time.Sleep(pause)
				if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
				}
				_ = client.CloseWrite()
				for range 3 {
					if err := <-c.ended; err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}
