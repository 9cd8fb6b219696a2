package mux

import (
	"crypto/tls"
	"errors"
	"io"
	"math"
	"sync/atomic"
	"testing"
	"time"
)

// What a silence is, by looks at the clock that come in time, and by such that come late.
func TestSilence(t *testing.T) {
	type look struct{ now, heard, want float64 } // seconds
	for name, looks := range map[string][]look{
		"nothing comes":              {{0, 0, 0}, {1, 0, 1}, {2, 0, 2}, {3.1, 0, 3.1}, {4.1, 0, 4.1}},
		"something comes":            {{1, 0, 1}, {2, 1.5, 0.5}, {3, 1.5, 1.5}},
		"stood still":                {{1, 0, 1}, {21, 0, 0}, {22, 0, 3}, {23, 0, 4}},
		"stood still, then it comes": {{1, 0, 1}, {21, 0, 0}, {22, 21.5, 0.5}},
		"it came first":              {{1, 0, 1}, {21, 20.5, 0}, {22, 20.5, 1}},
		"silent for long before":     {{1, 0, 1}, {2, 0, 2}, {12, 0, 0}, {13, 0, 4}},
		"stands still all the time":  {{1, 0, 1}, {3, 0, 0}, {5, 0, 3}, {7, 0, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			var q silence
			for i, x := range looks {
				if got := q.look(seconds(x.now), seconds(x.heard)); got.Round(time.Millisecond) != seconds(x.want) {
					t.Errorf("look %d, at %v s: %s, want %v s", i, x.now, got, x.want)
				}
			}
		})
	}
}

func seconds(s float64) time.Duration { return time.Duration(math.Round(1000*s)) * time.Millisecond }

// A machine that stood still for longer than a path may be silent finds its paths alive: what came
// meanwhile was not read yet. One that is silent from then on is found out as soon as any.
func TestStandingStillIsNoSilence(t *testing.T) {
	a, b := tcpPair(t)
	var now atomic.Int64
	s := newSession(a, Config{Dialer: true, DeadAfter: 8 * time.Second}, time.Now(), func() time.Duration { return time.Duration(now.Load()) })
	defer s.Close()
	other := New(b, Config{})
	defer other.Close()
	pass := func(d time.Duration) {
		now.Add(int64(d))
		s.tick()
	}
	pass(time.Second)
	pass(20 * time.Second)
	if err := s.Err(); err != nil {
		t.Fatalf("it is taken for dead before anything was read: %v", err)
	}
	pass(time.Second)
	before := s.Heard()
	other.Ping()
	waitFor(t, func() bool { return s.Heard().After(before) })
	for i := range 7 {
		pass(time.Second)
		if err := s.Err(); err != nil {
			t.Fatalf("after %d s of silence: %v", i+1, err)
		}
	}
	pass(time.Second)
	if err := s.Err(); !errors.Is(err, ErrSilent) {
		t.Errorf("after 8 s of silence: %v", err)
	}
}

// Whatever arrives is a sign of life, also when it is not yet a record of TLS.
func TestPartOfARecordIsASignOfLife(t *testing.T) {
	serverConfig, clientConfig := testTLS(t)
	a, b := tcpPair(t)
	client, server := tls.Client(a, clientConfig), tls.Server(Cork(b), serverConfig)
	failed := make(chan error, 1)
	go func() { failed <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-failed); err != nil {
		t.Fatal(err)
	}
	var now atomic.Int64
	start := time.Now()
	s := newSession(server, Config{}, start, func() time.Duration { return time.Duration(now.Load()) })
	defer s.Close()
	now.Store(int64(time.Minute))
	if _, err := a.Write([]byte{23, 3, 3, 0x03, 0xe8, 1, 2, 3}); err != nil { // the first of 1000 bytes
		t.Fatal(err)
	}
	waitFor(t, func() bool { return s.Heard().Equal(start.Add(time.Minute)) })
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
