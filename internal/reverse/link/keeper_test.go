package link

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/mux"
)

// Attempts come less and less often, up to a limit, and at once again after a connection that
// lasted; a hub that is too busy is given more time.
func TestPace(t *testing.T) {
	refused, busy := errors.New("connection refused"), fmt.Errorf("%w (timeout)", errBusy)
	var p pace
	for i, x := range []struct {
		err  error
		took time.Duration
		want time.Duration
	}{
		{refused, 0, firstRetry},
		{refused, 0, 2 * firstRetry},
		{refused, 0, 4 * firstRetry},
		{busy, handshakeTimeout, firstBusy},
		{busy, handshakeTimeout, 2 * firstBusy},
		{busy, handshakeTimeout, lastBusy},
		{busy, handshakeTimeout, lastBusy},
		{refused, handshakeTimeout, 8 * firstRetry}, // a long dial is no connection that lasted
		{refused, 0, 16 * firstRetry},
		{refused, 0, lastRetry},
		{refused, 0, lastRetry},
		{nil, time.Second, lastRetry}, // accepted and cut, again and again
		{nil, time.Minute, firstRetry},
		{busy, handshakeTimeout, firstBusy},
	} {
		if got := p.next(x.err, x.took); got != x.want {
			t.Errorf("attempt %d: wait for %s, want %s", i, got, x.want)
		}
	}
}

// testSession is a session whose other end accepts everything.
func testSession(t *testing.T) *mux.Session {
	t.Helper()
	a, b := net.Pipe()
	s := mux.New(a, mux.Config{Dialer: true})
	other := mux.New(b, mux.Config{Accept: func(st *mux.Stream) { _ = st.Accept(nil) }})
	t.Cleanup(func() { s.Close(); other.Close() })
	return s
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// A connection that is no longer needed takes no more streams and ends, but not before those that it
// has, however they came to it.
func TestRetire(t *testing.T) {
	l := NewLinks(nil, Options{Least: 1, Most: 4, Logger: slog.New(slog.DiscardHandler)})
	k := &keeper{links: l, ctx: t.Context(), alive: t.Context(), spare: map[*mux.Session]*spare{}}
	needed, extra := testSession(t), testSession(t)
	l.Add(needed, "hub")
	k.sessions = []*mux.Session{needed, extra}
	k.spare[extra] = &spare{leave: l.Add(extra, "hub"), idle: time.Now().Add(-shrinkAfter)}
	var streams []*mux.Stream
	for range 2 { // the hello's, and one that comes at the wrong time
		st, err := extra.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Answer(t.Context()); err != nil {
			t.Fatal(err)
		}
		streams = append(streams, st)
	}
	if k.grow() || k.spare[extra].retired || !k.spare[extra].idle.IsZero() {
		t.Fatal("a connection with a stream is not idle, and there is another one without")
	}

	k.spare[extra].retired = true
	go k.retire(extra, k.spare[extra].leave)
	eventually(t, "it has left the pool", func() bool { return len(l.Members()) == 1 })
	for range 20 { // as long as a drain looks at it
		if m := l.pick(nil, nil); m == nil || m.Session != needed {
			t.Fatalf("picked for a new stream: %+v", m)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := extra.Err(); err != nil {
		t.Fatalf("it was cut with a stream: %v", err)
	}
	_ = streams[1].Close()
	eventually(t, "it has ended", func() bool { return extra.Err() != nil })
	if left, retired := k.forget(extra); left != 1 || !retired {
		t.Errorf("left %d, retired %v", left, retired)
	}
}

// One that has been idle for long goes, as long as another idle one is left; those of the least number
// stay.
func TestGrowAndShrink(t *testing.T) {
	l := NewLinks(nil, Options{Least: 1, Most: 2, Logger: slog.New(slog.DiscardHandler)})
	k := &keeper{links: l, ctx: t.Context(), alive: t.Context(), spare: map[*mux.Session]*spare{}}
	first, second := testSession(t), testSession(t)
	busy := func(s *mux.Session) {
		for range 2 {
			if _, err := s.Open(nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.Add(first, "hub")
	k.sessions = []*mux.Session{first}
	if k.grow() {
		t.Error("one more beside an idle one")
	}
	busy(first)
	if !k.grow() {
		t.Error("none more beside a busy one")
	}
	if k.grow() {
		t.Error("more than the most")
	}
	k.sessions = append(k.sessions, second)
	k.spare[second] = &spare{leave: l.Add(second, "hub"), idle: time.Now().Add(-shrinkAfter)}
	if k.grow() || k.spare[second].retired {
		t.Error("the only idle one goes")
	}
	third := testSession(t)
	k.sessions = append(k.sessions, third)
	l.Add(third, "hub")
	if k.grow() || !k.spare[second].retired {
		t.Error("the idle one stays")
	}
	eventually(t, "it has ended", func() bool { return second.Err() != nil })
	if first.Err() != nil || third.Err() != nil {
		t.Errorf("those of the least number: %v, %v", first.Err(), third.Err())
	}
}
