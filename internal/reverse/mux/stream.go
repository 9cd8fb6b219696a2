package mux

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// ResetError is how a stream ends that the other side reset.
type ResetError struct {
	// Reason is what the other side gave; empty: none.
	Reason []byte
}

// Error does not show the reason: it is the other side's, and not text of ours.
func (e *ResetError) Error() string { return "the other end reset the stream" }

// Stream is one stream: a net.Conn that can be half closed and reset. One goroutine may
// read while another one writes.
type Stream struct {
	session *Session
	id      uint32
	header  []byte // of a stream that the other end opened

	mu       sync.Mutex
	readable sync.Cond
	writable sync.Cond

	answered chan struct{} // closed with the answer, or the end
	answer   []byte
	isAnswer bool

	in       queue
	onward   *Stream                     // where what is received goes, while it is relayed, if that is a stream
	out      func([]*chunk) (int, error) // the same if it is a connection that can be written to without waiting
	taken    bool                        // somebody has taken chunks, and is to put them where they go
	waits    bool                        // somebody else waits until they are there
	passed   int64                       // bytes that the session's reader has given on
	broken   error                       // of a write to where it goes
	window   int                         // what the sender may have under way, all in all
	allowed  int                         // what it may still send
	consumed int                         // read, not yet given back
	credited time.Time
	recvFin  bool

	credit  int // what we may still send
	sentFin bool

	deaf      bool      // what comes is dropped
	deafUntil time.Time // until then credit is given for it
	err       error     // why it ended before its time
	gone      bool      // forgotten by the session
	closed    bool      // by us

	readBy, writeBy deadline
	onEnd           func()
}

func newStream(s *Session, id uint32, header []byte) *Stream {
	st := &Stream{session: s, id: id, header: header, window: initialWindow, allowed: initialWindow, credit: initialWindow, answered: make(chan struct{})}
	st.readable.L, st.writable.L = &st.mu, &st.mu
	return st
}

// Header is what the other end opened the stream with.
func (st *Stream) Header() []byte { return st.header }

// Session is the stream's session.
func (st *Stream) Session() *Session { return st.session }

// Accept answers a stream that the other end opened.
func (st *Stream) Accept(answer []byte) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.err != nil {
		return st.err
	}
	st.session.queueControl(wire.FrameAnswer, st.id, answer)
	return nil
}

// Answer waits for the other end's answer to an opened stream. When it resets the stream
// instead the error is a *ResetError; when ctx ends first, that of ctx, and the stream
// still has to be closed.
func (st *Stream) Answer(ctx context.Context) ([]byte, error) {
	select {
	case <-st.answered:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.isAnswer {
		return nil, st.err
	}
	return st.answer, nil
}

// Ended is closed when the stream is answered or ends; for an opener only.
func (st *Stream) Ended() <-chan struct{} { return st.answered }

// Read implements io.Reader. After a clean end it returns io.EOF; a stream that was cut
// never does.
func (st *Stream) Read(b []byte) (int, error) {
	n, credit, err := st.read(b)
	if credit {
		st.session.flush()
	}
	return n, err
}

func (st *Stream) read(b []byte) (n int, credit bool, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if err := st.awaitData(); err != nil {
		return 0, false, err
	}
	n = st.in.read(b)
	return n, st.consume(n), nil
}

// awaitData is called with the lock held.
func (st *Stream) awaitData() error {
	for {
		switch {
		case st.closed:
			return ErrClosed
		case st.broken != nil:
			return &writeError{st.broken}
		case st.in.size > 0:
			return nil
		case st.recvFin: // a reset behind it is about the other direction
			return io.EOF
		case st.err != nil:
			return st.err
		case st.readBy.passed():
			return os.ErrDeadlineExceeded
		}
		st.readable.Wait()
	}
}

// consume gives credit back, with the lock held. It reports whether the session has some to send.
func (st *Stream) consume(n int) bool {
	st.consumed += n
	if st.consumed < st.window/2 || st.recvFin || st.err != nil {
		return false
	}
	give := st.consumed
	now := time.Now()
	if wider(st.window, now.Sub(st.credited), st.session.leastRTT()) && st.session.widen(st.window) {
		give += st.window
		st.window *= 2
	}
	st.credited = now
	st.consumed = 0
	st.allowed += give
	st.session.queueCredit(st.id, give)
	return true
}

// wider reports whether a reader that has taken half a window in the given time could have more under
// way: if that was a few round trips, or, up to shortWindow, if it is only not given the processor at
// once. What goes beyond that just waits somewhere, and leaves the processors' caches: on a short path
// windows of 8 MiB cost a quarter more of their time.
func wider(window int, took, rtt time.Duration) bool {
	const (
		roundTrips  = 4
		shortWindow = 512 << 10
	)
	return window < maxWindow && (took < roundTrips*rtt || window < shortWindow && took < 8*time.Millisecond)
}

// LocalAddr implements net.Conn.
func (st *Stream) LocalAddr() net.Addr { return st.session.conn.LocalAddr() }

// RemoteAddr implements net.Conn.
func (st *Stream) RemoteAddr() net.Addr { return st.session.conn.RemoteAddr() }
