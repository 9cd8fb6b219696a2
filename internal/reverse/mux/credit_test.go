package mux

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

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
