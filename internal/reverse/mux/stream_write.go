package mux

import "os"

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
	st.session.flush()
	return written, nil
}

// takeCredit waits for credit. Before it does, what has been queued is sent: the credit may be the
// answer to that.
func (st *Stream) takeCredit(want int) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for flushed := false; ; {
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
		if !flushed {
			flushed = true
			st.mu.Unlock()
			st.session.flush()
			st.mu.Lock()
			continue
		}
		st.writable.Wait()
	}
}

// writeChunk is Write that takes a chunk over, error or not. It is on its way with the session's
// next flush.
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

// tryChunk is writeChunk that does not wait: false says that it did nothing.
func (st *Stream) tryChunk(c *chunk) bool {
	n := len(c.bytes())
	st.mu.Lock()
	may := !st.closed && !st.sentFin && st.err == nil && !st.writeBy.passed() && st.credit >= n
	if may {
		st.credit -= n
	}
	st.mu.Unlock()
	if !may {
		return false
	}
	if st.session.tryChunk(st.id, c) {
		return true
	}
	st.mu.Lock()
	st.credit += n
	st.writable.Signal()
	st.mu.Unlock()
	return false
}
