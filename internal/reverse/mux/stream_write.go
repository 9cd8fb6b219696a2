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
