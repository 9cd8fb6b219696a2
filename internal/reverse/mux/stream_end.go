package mux

import (
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

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

// stopReading drops what has come and what will come. The other direction goes on. For discardFor the other
// end may go on sending: if it had to wait it might never find that it has nobody to send for
// either. Then it has to.
func (st *Stream) stopReading() {
	st.mu.Lock()
	st.deaf, st.deafUntil = true, time.Now().Add(discardFor)
	st.in.clear()
	credit := st.drop(0)
	st.mu.Unlock()
	if credit {
		st.session.flush()
	}
}

// drop notes that n bytes have come and nobody will read them, and gives back all credit. It is called with the lock
// held, and reports whether the session has some to send.
func (st *Stream) drop(n int) bool {
	st.allowed = max(0, st.allowed-n)
	give := st.window - st.allowed
	if give < st.window/2 || st.recvFin || st.err != nil || !time.Now().Before(st.deafUntil) {
		return false
	}
	st.allowed, st.consumed = st.window, 0
	st.session.queueCredit(st.id, give)
	return true
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
