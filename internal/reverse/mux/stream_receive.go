package mux

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// fill reads a data frame's payload from the connection.
func (st *Stream) fill(conn io.Reader, n int) error {
	st.mu.Lock()
	if st.err != nil || st.closed || st.recvFin || st.deaf {
		fin := st.recvFin
		credit := st.deaf && !st.closed && st.drop(n)
		st.mu.Unlock()
		if fin {
			return fmt.Errorf("%w: data behind the end of stream %d", wire.ErrFrame, st.id)
		}
		if credit {
			st.session.flush()
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
	if st.onward == nil && st.out == nil || err != nil { // else the session's reader gives it on
		st.readable.Signal()
	}
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
