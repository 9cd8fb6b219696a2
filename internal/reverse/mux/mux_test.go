package mux

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

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
