package mux

import (
	"context"
	"encoding/binary"
	"fmt"
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
	window   int // what the sender may have under way, all in all
	allowed  int // what it may still send
	consumed int // read, not yet given back
	credited time.Time
	recvFin  bool

	credit  int // what we may still send
	sentFin bool

	deaf   bool  // what comes is dropped, and no credit given
	err    error // why it ended before its time
	gone   bool  // forgotten by the session
	closed bool  // by us

	readBy, writeBy deadline
	onEnd           func()
}

// deadline is a point in time after which waiting ends.
type deadline struct {
	at    time.Time
	timer *time.Timer
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
	st.mu.Lock()
	defer st.mu.Unlock()
	if err := st.awaitData(); err != nil {
		return 0, err
	}
	n := st.in.read(b)
	st.consume(n)
	return n, nil
}

// awaitData is called with the lock held.
func (st *Stream) awaitData() error {
	for {
		switch {
		case st.closed:
			return ErrClosed
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

// consume gives credit back, with the lock held.
func (st *Stream) consume(n int) {
	st.consumed += n
	if st.consumed < st.window/2 || st.recvFin || st.err != nil {
		return
	}
	give := st.consumed
	now := time.Now()
	// A reader that takes half a window in a few round trips could have more under way.
	const roundTrips = 4
	if st.window < maxWindow && now.Sub(st.credited) < max(roundTrips*st.session.RTT(), 8*time.Millisecond) && st.session.widen(st.window) {
		give += st.window
		st.window *= 2
	}
	st.credited = now
	st.consumed = 0
	st.allowed += give
	var payload [4]byte
	binary.BigEndian.PutUint32(payload[:], uint32(give))
	st.session.queueControl(wire.FrameCredit, st.id, payload[:])
}

// Write implements io.Writer. It returns when all of b is on its way.
func (st *Stream) Write(b []byte) (int, error) {
	written := 0
	for written < len(b) {
		n, err := st.takeCredit(len(b) - written)
		if err != nil {
			return written, err
		}
		if err := st.session.queueData(st.id, b[written:written+n]); err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

func (st *Stream) takeCredit(want int) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		switch {
		case st.closed || st.sentFin:
			return 0, ErrClosed
		case st.err != nil:
			return 0, st.err
		case st.writeBy.passed():
			return 0, os.ErrDeadlineExceeded
		case st.credit > 0:
			n := min(want, st.credit)
			st.credit -= n
			return n, nil
		}
		st.writable.Wait()
	}
}

// writeChunk is Write that takes a chunk over, error or not.
func (st *Stream) writeChunk(c *chunk) error {
	for {
		b := c.bytes()
		n, err := st.takeCredit(len(b))
		if err == nil && n == len(b) {
			// Small ones are gathered: a frame each would cost more than the copy.
			if n > smallChunk {
				if err = st.session.queueChunk(st.id, c); err == nil {
					return nil
				}
			} else {
				err = st.session.queueData(st.id, b)
				c.free()
				return err
			}
		}
		if err == nil {
			err = st.session.queueData(st.id, b[:n])
			c.off += n
		}
		if err != nil {
			c.free()
			return err
		}
	}
}

// writevChunks is how many received chunks are written at once.
const writevChunks = 8

// WriteTo implements io.WriterTo: what has been received goes to w without another copy.
func (st *Stream) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		st.mu.Lock()
		err := st.awaitData()
		var list []*chunk
		size := 0
		if err == nil {
			if list, size = st.in.take(writevChunks); list == nil {
				st.readable.Wait() // the only one is being filled
			}
		}
		st.mu.Unlock()
		if err == io.EOF { //nolint:errorlint // awaitData's own
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := writeChunks(w, list)
		total += n
		if err != nil {
			return total, &writeError{err}
		}
		st.mu.Lock()
		st.consume(size)
		st.mu.Unlock()
	}
}

// writeChunks writes chunks and frees them.
func writeChunks(w io.Writer, list []*chunk) (total int64, err error) {
	if st, ok := w.(*Stream); ok {
		for i, c := range list {
			n := len(c.bytes())
			if err := st.writeChunk(c); err != nil {
				freeAll(list[i+1:])
				return total, err
			}
			total += int64(n)
		}
		return total, nil
	}
	defer freeAll(list)
	switch w := w.(type) {
	case *net.TCPConn, *net.UnixConn:
		if len(list) > 1 {
			buffers := make(net.Buffers, len(list))
			for i, c := range list {
				buffers[i] = c.bytes()
			}
			return buffers.WriteTo(w)
		}
	case net.Conn:
		if k := corkOf(w); k != nil && len(list) > 1 {
			k.cork()
			defer func() {
				if e := k.uncork(); err == nil {
					err = e
				}
			}()
		}
	}
	for _, c := range list {
		n, err := w.Write(c.bytes())
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

func freeAll(list []*chunk) {
	for _, c := range list {
		c.free()
	}
}

// fill reads a data frame's payload from the connection.
func (st *Stream) fill(conn io.Reader, n int) error {
	st.mu.Lock()
	if st.err != nil || st.closed || st.recvFin || st.deaf {
		fin := st.recvFin
		st.mu.Unlock()
		if fin {
			return fmt.Errorf("%w: data behind the end of stream %d", wire.ErrFrame, st.id)
		}
		_, err := io.CopyN(io.Discard, conn, int64(n))
		return err
	}
	if n > st.allowed {
		st.mu.Unlock()
		return fmt.Errorf("%w: stream %d got more than it was allowed", wire.ErrFrame, st.id)
	}
	st.allowed -= n
	c, space := st.in.reserve(n)
	st.mu.Unlock()
	_, err := io.ReadFull(conn, space)
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed || st.deaf { // and the queue cleared
		return err
	}
	if err != nil {
		n = 0
	}
	st.in.commit(c, n)
	st.readable.Signal()
	return err
}

// control handles the frames of a stream that carry no data.
func (st *Stream) control(t wire.FrameType, payload []byte) error {
	switch t {
	case wire.FrameAnswer:
		return st.gotAnswer(payload)
	case wire.FrameFin:
		st.gotFin()
	case wire.FrameReset:
		st.fail(&ResetError{Reason: append([]byte(nil), payload...)})
		st.leave()
	case wire.FrameCredit:
		n := binary.BigEndian.Uint32(payload)
		st.mu.Lock()
		defer st.mu.Unlock()
		if n > 4*maxWindow || st.credit+int(n) > 4*maxWindow {
			return fmt.Errorf("%w: credit of %d for stream %d", wire.ErrFrame, n, st.id)
		}
		st.credit += int(n)
		st.writable.Signal()
	}
	return nil
}

func (st *Stream) gotAnswer(payload []byte) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.session.foreign(st.id) || st.isAnswer {
		return fmt.Errorf("%w: an answer to stream %d, which was not asked for", wire.ErrFrame, st.id)
	}
	if st.err != nil {
		return nil
	}
	st.answer, st.isAnswer = append([]byte(nil), payload...), true
	close(st.answered)
	return nil
}

func (st *Stream) gotFin() {
	st.mu.Lock()
	st.recvFin = true
	st.readable.Broadcast()
	over := st.sentFin
	st.mu.Unlock()
	if over {
		st.leave()
	}
}

// fail ends the stream with an error.
func (st *Stream) fail(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	// What ended well stays so.
	if st.err == nil && !(st.recvFin && st.sentFin) {
		st.err = err
		if st.onEnd != nil {
			go st.onEnd()
			st.onEnd = nil
		}
	}
	if !st.isAnswer && !st.session.foreign(st.id) {
		select {
		case <-st.answered:
		default:
			if st.err == nil {
				st.err = err
			}
			close(st.answered)
		}
	}
	st.readable.Broadcast()
	st.writable.Broadcast()
}

// leave makes the session forget the stream.
func (st *Stream) leave() {
	st.mu.Lock()
	if st.gone {
		st.mu.Unlock()
		return
	}
	st.gone = true
	widened := st.window - initialWindow
	st.mu.Unlock()
	st.session.forget(st, widened)
}

// CloseWrite ends this direction; the other end reads io.EOF behind what was written.
func (st *Stream) CloseWrite() error {
	st.mu.Lock()
	if st.err != nil || st.closed || st.sentFin {
		err := st.err
		st.mu.Unlock()
		return err
	}
	st.sentFin = true
	over := st.recvFin
	st.writable.Broadcast()
	st.session.queueFin(st.id)
	st.mu.Unlock()
	if over {
		st.leave()
	}
	return nil
}

// Close ends the stream. When it has not ended in both directions by itself the other end
// sees a reset without reason.
func (st *Stream) Close() error { return st.end(nil) }

// Reset ends the stream with a reason of at most wire.MaxControl bytes, unless it has
// ended already.
func (st *Stream) Reset(reason []byte) { _ = st.end(reason[:min(len(reason), wire.MaxControl)]) }

func (st *Stream) end(reason []byte) error {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return nil
	}
	st.closed = true
	cut := st.err == nil && !(st.recvFin && st.sentFin)
	st.in.clear()
	st.readBy.stop()
	st.writeBy.stop()
	st.readable.Broadcast()
	st.writable.Broadcast()
	st.mu.Unlock()
	if cut {
		st.session.queueReset(st.id, reason)
	}
	st.leave()
	return nil
}

// stopReading drops what has come and what will come; the other end soon has to wait. The
// other direction goes on.
func (st *Stream) stopReading() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.deaf = true
	st.in.clear()
}

// LocalAddr implements net.Conn.
func (st *Stream) LocalAddr() net.Addr { return st.session.conn.LocalAddr() }

// RemoteAddr implements net.Conn.
func (st *Stream) RemoteAddr() net.Addr { return st.session.conn.RemoteAddr() }

// SetDeadline implements net.Conn.
func (st *Stream) SetDeadline(t time.Time) error {
	return firstError(st.SetReadDeadline(t), st.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (st *Stream) SetReadDeadline(t time.Time) error {
	return st.setDeadline(&st.readBy, &st.readable, t)
}

// SetWriteDeadline implements net.Conn.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	return st.setDeadline(&st.writeBy, &st.writable, t)
}

func (st *Stream) setDeadline(d *deadline, c *sync.Cond, t time.Time) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	d.stop()
	d.at = t
	if !t.IsZero() && !st.closed {
		d.timer = time.AfterFunc(time.Until(t), func() {
			st.mu.Lock()
			defer st.mu.Unlock()
			c.Broadcast()
		})
	}
	c.Broadcast()
	return nil
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// OnEnd calls f, on a goroutine of its own, when the stream ends before its time. stop
// takes that back.
func (st *Stream) OnEnd(f func()) (stop func()) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.err != nil {
		go f()
		return func() {}
	}
	st.onEnd = f
	return func() {
		st.mu.Lock()
		defer st.mu.Unlock()
		st.onEnd = nil
	}
}
