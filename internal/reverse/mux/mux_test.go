package mux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is two sessions over loopback; streams that the dialer opens are given to accept.
func pair(t testing.TB, config Config, accept func(*Stream)) (dialer, acceptor *Session) {
	t.Helper()
	a, b := tcpPair(t)
	config.Dialer, config.Accept = true, nil
	dialer = New(a, config)
	config.Dialer, config.Accept = false, accept
	acceptor = New(b, config)
	t.Cleanup(func() {
		dialer.Close()
		acceptor.Close()
		<-dialer.Done()
		<-acceptor.Done()
	})
	return dialer, acceptor
}

// opened opens a stream that is accepted at once, and returns both ends.
func opened(t testing.TB, config Config) (s *Session, ours, theirs *Stream) {
	t.Helper()
	accepted := make(chan *Stream, 1)
	s, _ = pair(t, config, func(st *Stream) { _ = st.Accept([]byte("yes")); accepted <- st })
	ours, err := s.Open([]byte("header"))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := ours.Answer(t.Context()); err != nil || string(b) != "yes" {
		t.Fatalf("%q, %v", b, err)
	}
	theirs = <-accepted
	if string(theirs.Header()) != "header" {
		t.Fatalf("header %q", theirs.Header())
	}
	return s, ours, theirs
}

func TestHalfCloseBothWays(t *testing.T) {
	s, a, b := opened(t, Config{})
	_, _ = a.Write([]byte("ping"))
	_ = a.CloseWrite()
	if got, err := io.ReadAll(b); err != nil || string(got) != "ping" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := a.Write([]byte("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("write behind the end: %v", err)
	}
	_, _ = b.Write([]byte("pong"))
	_ = b.CloseWrite()
	if got, err := io.ReadAll(a); err != nil || string(got) != "pong" {
		t.Errorf("%q, %v", got, err)
	}
	if n := s.Streams(); n != 0 {
		t.Errorf("%d streams are left", n)
	}
}

func TestResetCarriesAReason(t *testing.T) {
	s, _ := pair(t, Config{}, func(st *Stream) { st.Reset([]byte("no such thing")) })
	st, err := s.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.Answer(t.Context())
	var reset *ResetError
	if !errors.As(err, &reset) || string(reset.Reason) != "no such thing" {
		t.Errorf("%v", err)
	}
	if _, err := st.Read(make([]byte, 1)); !errors.As(err, &reset) {
		t.Errorf("read: %v", err)
	}
	_ = st.Close()
}

// What was received before a cut can be read; then comes an error, never io.EOF.
func TestLostSessionIsNoEnd(t *testing.T) {
	s, a, b := opened(t, Config{})
	_, _ = b.Write([]byte("half"))
	buf := make([]byte, 4)
	if _, err := io.ReadFull(a, buf); err != nil {
		t.Fatal(err)
	}
	_, _ = b.Write([]byte("rest"))
	waitFor(t, func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.in.size == 4 })
	b.Session().Close()
	<-s.Done()
	if _, err := io.ReadFull(a, buf); err != nil || string(buf) != "rest" {
		t.Errorf("%q, %v", buf, err)
	}
	if _, err := a.Read(buf); !errors.Is(err, ErrSessionLost) {
		t.Errorf("%v", err)
	}
	if _, err := s.Open(nil); !errors.Is(err, ErrSessionLost) {
		t.Errorf("open: %v", err)
	}
}

func waitFor(t testing.TB, f func() bool) {
	t.Helper()
	for range 1000 {
		if f() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("not within 5 s")
}

// A writer stops when its reader does not read, and no other stream minds.
func TestCreditIsPerStream(t *testing.T) {
	accepted := make(chan *Stream, 2)
	s, _ := pair(t, Config{}, func(st *Stream) { _ = st.Accept(nil); accepted <- st })
	open := func() (*Stream, *Stream) {
		st, err := s.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		return st, <-accepted
	}
	stalled, unread := open()
	_ = stalled.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	n, err := stalled.Write(make([]byte, 64<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) || n != initialWindow {
		t.Errorf("%d bytes went to a reader that does not read, %v", n, err)
	}
	a, b := open()
	want := bytes.Repeat([]byte("x"), 8<<20)
	go func() { _, _ = a.Write(want); _ = a.CloseWrite() }()
	if got, err := io.ReadAll(b); err != nil || len(got) != len(want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if b.window <= initialWindow {
		t.Errorf("the window of a reader that keeps up is still %d", b.window)
	}
	// Credit that was given goes back when a stream is gone.
	_, _, _, _ = stalled.Close(), unread.Close(), a.Close(), b.Close()
	waitFor(t, func() bool {
		x := b.Session()
		x.mu.Lock()
		defer x.mu.Unlock()
		return x.widened == 0 && len(x.streams) == 0 && x.theirs == 0
	})
}

// A window becomes as wide as the path needs it.
func TestWindowFollowsThePath(t *testing.T) {
	const ms = time.Millisecond
	for _, x := range []struct {
		window    int
		took, rtt time.Duration
		want      bool
	}{
		{initialWindow, 7 * ms, 0, true},
		{initialWindow, 9 * ms, 0, false},
		{2 * initialWindow, ms, 0, false},
		{2 * initialWindow, ms / 2, ms / 10, false},
		{2 * initialWindow, ms / 3, ms / 10, true},
		{maxWindow / 2, 150 * ms, 40 * ms, true},
		{maxWindow / 2, 170 * ms, 40 * ms, false},
		{maxWindow, ms, 40 * ms, false},
	} {
		if got := wider(x.window, x.took, x.rtt); got != x.want {
			t.Errorf("half of %d bytes in %s, round trip %s: wider %v, want %v", x.window, x.took, x.rtt, got, x.want)
		}
	}
	var s Session
	for i, x := range []struct{ rtt, least time.Duration }{{40 * ms, 40 * ms}, {10 * ms, 10 * ms}, {100 * ms, 10*ms + 10*ms/32}, {9 * ms, 9 * ms}} {
		if s.measured(int64(x.rtt)); s.leastRTT() != x.least || s.RTT() != x.rtt {
			t.Errorf("round trip %d: the least is %s and the last %s, want %s and %s", i, s.leastRTT(), s.RTT(), x.least, x.rtt)
		}
	}
	for range 100 { // five minutes of pings
		s.measured(int64(100 * ms))
	}
	if s.leastRTT() != 100*ms {
		t.Errorf("a path that has become longer: %s", s.leastRTT())
	}
}

// A peer that sends more than it was allowed is cut off.
func TestTooMuchIsCutOff(t *testing.T) {
	a, b := tcpPair(t)
	s := New(b, Config{Accept: func(st *Stream) { _ = st.Accept(nil) }})
	defer s.Close()
	var raw []byte
	raw = wire.Frame{Type: wire.FrameOpen, Stream: 1}.Append(raw)
	for range initialWindow/wire.MaxData + 2 {
		raw = append(wire.Frame{Type: wire.FrameData, Length: wire.MaxData, Stream: 1}.Append(raw), make([]byte, wire.MaxData)...)
	}
	go func() { _, _ = a.Write(raw) }()
	select {
	case <-s.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("still connected")
	}
	if !errors.Is(s.Err(), wire.ErrFrame) {
		t.Errorf("%v", s.Err())
	}
}

func TestSilenceEndsASession(t *testing.T) {
	a, b := tcpPair(t)
	s := New(a, Config{Dialer: true, Keepalive: 500 * time.Millisecond, DeadAfter: 2 * time.Second})
	defer s.Close()
	go func() { _, _ = io.Copy(io.Discard, b) }() // alive as a host, but silent
	began := time.Now()
	<-s.Done()
	if took := time.Since(began); !errors.Is(s.Err(), ErrSilent) || took > 3*time.Second {
		t.Errorf("%v after %s", s.Err(), took)
	}
}

func TestKeepaliveKeepsAlive(t *testing.T) {
	a, b := tcpPair(t)
	x := New(a, Config{Dialer: true, Keepalive: 500 * time.Millisecond, DeadAfter: 3 * time.Second})
	y := New(b, Config{})
	defer x.Close()
	defer y.Close()
	select {
	case <-x.Done():
		t.Errorf("ended: %v", x.Err())
	case <-time.After(4 * time.Second):
	}
	if x.RTT() <= 0 {
		t.Error("no round-trip time was measured")
	}
}

func TestGoAway(t *testing.T) {
	s, a, b := opened(t, Config{})
	b.Session().GoAway()
	waitFor(t, func() bool { return !s.Usable() })
	if _, err := s.Open(nil); !errors.Is(err, ErrGoingAway) {
		t.Errorf("%v", err)
	}
	_, _ = a.Write([]byte("still"))
	buf := make([]byte, 5)
	if _, err := io.ReadFull(b, buf); err != nil || string(buf) != "still" {
		t.Errorf("%q, %v", buf, err)
	}
}

func TestAnswerEndsWithItsContext(t *testing.T) {
	s, _ := pair(t, Config{}, func(st *Stream) {
		stop := make(chan struct{})
		st.OnEnd(func() { close(stop) })
		<-stop // until the opener gives up
		_ = st.Close()
	})
	st, err := s.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := st.Answer(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	_ = st.Close()
	waitFor(t, func() bool { return s.Streams() == 0 })
}

// Random writes on many streams in both directions arrive in order and complete, through
// every way of copying.
func TestRandomTraffic(t *testing.T) {
	s, _ := pair(t, Config{}, func(st *Stream) {
		_ = st.Accept(nil)
		_, _ = st.WriteTo(st) // an echo
		_ = st.CloseWrite()
	})
	var wg sync.WaitGroup
	for seed := range uint64(24) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			data := make([]byte, r.IntN(2<<20))
			for i := range data {
				data[i] = byte(r.Uint32())
			}
			st, err := s.Open(nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer st.Close()
			go func() {
				for rest := data; len(rest) > 0; {
					n := min(len(rest), 1+r.IntN(1<<uint(1+r.IntN(18))))
					if _, err := st.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
				_ = st.CloseWrite()
			}()
			var got bytes.Buffer
			var failed error
			if seed%2 == 0 {
				_, failed = st.WriteTo(&got)
			} else {
				_, failed = io.Copy(&got, struct{ io.Reader }{st})
			}
			if failed != nil || !bytes.Equal(got.Bytes(), data) {
				t.Errorf("stream %d: %d of %d bytes, %v", seed, got.Len(), len(data), failed)
			}
		})
	}
	wg.Wait()
}

// Relay joins every pair of kinds of connection.
func TestRelayKinds(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	kinds := map[string]func() (Conn, net.Conn){
		"tcp":    func() (Conn, net.Conn) { a, b := tcpPair(t); return a, b },
		"tls":    func() (Conn, net.Conn) { a, b := tlsPair(t, true); return a, b },
		"unix":   func() (Conn, net.Conn) { return unixPair(t) },
		"stream": func() (Conn, net.Conn) { _, a, b := opened(t, Config{}); return a, b },
	}
	for left, l := range kinds {
		for right, r := range kinds {
			t.Run(left+"-"+right, func(t *testing.T) {
				a, client := l()
				b, server := r()
				done := make(chan error, 1)
				go func() {
					there, back, err := Relay(a, b)
					if there != int64(len(data)) || back != int64(len(data)) {
						err = errors.Join(err, fmt.Errorf("counted %d and %d of %d bytes", there, back, len(data)))
					}
					done <- err
				}()
				go func() { // the server sends back what it got, after its end
					got, _ := io.ReadAll(server)
					_, _ = server.Write(got)
					_ = server.(Conn).CloseWrite()
				}()
				go func() { _, _ = client.Write(data); _ = client.(Conn).CloseWrite() }()
				got, err := io.ReadAll(client)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
				_, _ = client.Close(), server.Close()
			})
		}
	}
}

// A reset is about what comes, not about what was written before it.
func TestResetComesBehindData(t *testing.T) {
	for range 50 {
		_, a, b := opened(t, Config{})
		data := bytes.Repeat([]byte("x"), 200<<10)
		if _, err := b.Write(data); err != nil {
			t.Fatal(err)
		}
		b.Reset([]byte("enough"))
		got, err := io.ReadAll(a)
		var reset *ResetError
		if len(got) != len(data) || !errors.As(err, &reset) || string(reset.Reason) != "enough" {
			t.Fatalf("%d of %d bytes, %v", len(got), len(data), err)
		}
		_ = a.Close()
	}
}

// A target that sends its answer and then resets, while its client still talks: every
// byte that reached us before the reset arrives.
func TestAnswerBeforeAResetArrives(t *testing.T) {
	answer := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	for range 20 {
		relays := make(chan error, 2)
		target := make(chan *net.TCPConn, 1)
		s, _ := pair(t, Config{}, func(st *Stream) {
			a, b := tcpPair(t)
			target <- b
			_ = st.Accept(nil)
			_, _, err := Relay(a, st)
			relays <- err
		})
		st, err := s.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		a, client := unixPair(t)
		go func() { _, _, err := Relay(a, st); relays <- err }()
		server := <-target
		go func() { // the client never stops talking
			for {
				if _, err := client.Write([]byte("more")); err != nil {
					return
				}
				time.Sleep(100 * time.Microsecond)
			}
		}()
		_, _ = server.Write(answer)
		raw, err := server.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() (sent bool) { // and acknowledged
			_ = raw.Control(func(fd uintptr) {
				n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
				sent = err == nil && n == 0
			})
			return sent
		})
		_ = server.SetLinger(0)
		_ = server.Close()
		got := make([]byte, len(answer))
		if n, err := io.ReadFull(client, got); err != nil || !bytes.Equal(got, answer) {
			t.Fatalf("%d of %d bytes, %v", n, len(answer), err)
		}
		_ = client.Close()
		if first, second := <-relays, <-relays; first == nil && second == nil {
			t.Error("a reset is taken for an end")
		}
	}
}

func unixPair(t testing.TB) (Conn, net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a.(*net.UnixConn), b
}

// FuzzSession feeds a session anything: it ends with an error or goes on, and leaves
// nothing behind.
func FuzzSession(f *testing.F) {
	open := wire.Frame{Type: wire.FrameOpen, Stream: 1}.Append(nil)
	f.Add(open)
	f.Add(append(wire.Frame{Type: wire.FrameData, Length: 3, Stream: 1}.Append(open), "abc"...))
	f.Add(wire.Frame{Type: wire.FrameFin, Stream: 1}.Append(wire.Frame{Type: wire.FrameFin, Stream: 1}.Append(open)))
	f.Add(append(wire.Frame{Type: wire.FrameCredit, Length: 4, Stream: 1}.Append(open), 0xff, 0xff, 0xff, 0xff))
	f.Add(append(wire.Frame{Type: wire.FramePing, Length: 8}.Append(nil), "12345678"...))
	f.Add(wire.Frame{Type: wire.FrameGoAway}.Append(nil))
	f.Add(wire.Frame{Type: wire.FrameOpen, Stream: 2}.Append(nil)) // ours
	f.Fuzz(func(t *testing.T, b []byte) {
		near, far := net.Pipe()
		s := New(near, Config{Accept: func(st *Stream) {
			_ = st.Accept(nil)
			_, _ = st.WriteTo(io.Discard)
			_ = st.Close()
		}})
		drained := make(chan struct{})
		go func() { _, _ = io.Copy(io.Discard, far); close(drained) }()
		_, _ = far.Write(b)
		_ = far.Close()
		<-s.Done()
		<-drained
		if s.Err() == nil {
			t.Error("ended without an error")
		}
	})
}
