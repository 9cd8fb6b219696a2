package mux

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// wake makes sure that pending frames go out, by a goroutine of its own. It is called with the
// lock held.
func (s *Session) wake() {
	if !s.writing && s.err == nil {
		s.writing = true
		go s.writeLoop()
	}
}

// flush sends what is pending, on the caller's goroutine as far as that does not wait: waking
// another one takes longer than sending a little. What is left goes to a writeLoop.
func (s *Session) flush() {
	s.mu.Lock()
	switch {
	case s.writing || !s.pending():
		s.mu.Unlock()
		return
	case s.cork == nil || s.cork.raw == nil || len(s.control)+s.data.size > flushLimit:
		s.wake()
		s.mu.Unlock()
		return
	}
	s.writing = true
	rest, err := s.write(s.cork.tryUncork)
	s.mu.Lock()
	s.writing = false
	if err == nil && (rest || s.pending()) {
		s.wake()
	}
	s.mu.Unlock()
}

// flushLimit is how much a cork takes without writing it.
const flushLimit = corkLimit - 32<<10

// pending reports whether there is something to send. It is called with the lock held.
func (s *Session) pending() bool { return s.err == nil && (len(s.control) > 0 || s.data.head != nil) }

// writeLoop sends what is pending, and what a flush has left, and ends.
func (s *Session) writeLoop() {
	for {
		if s.cork != nil {
			if err := s.cork.uncork(); err != nil {
				s.close(fmt.Errorf("%w: %w", ErrSessionLost, err))
			}
		}
		s.mu.Lock()
		if !s.pending() {
			s.writing = false
			s.mu.Unlock()
			return
		}
		_, _ = s.write(s.uncork)
	}
}

// uncork is that of the cork, if there is one.
func (s *Session) uncork() (rest bool, err error) {
	if s.cork == nil {
		return false, nil
	}
	return false, s.cork.uncork()
}

// write sends what is pending, by way of the cork and then uncork. It is called with the lock held, by the one that
// set writing, and gives it up.
func (s *Session) write(uncork func() (bool, error)) (rest bool, err error) {
	control, data := s.control, s.data.head
	s.control, s.data = s.spare[:0], outQueue{}
	s.room.Broadcast()
	s.mu.Unlock()
	err = s.send(control, data)
	if s.spare = nil; cap(control) <= smallChunk {
		s.spare = control // only who writes uses it
	}
	rest, failed := uncork()
	if err = errors.Join(err, failed); err != nil {
		s.close(fmt.Errorf("%w: %w", ErrSessionLost, err))
	}
	return rest, err
}

// send writes, into the cork if there is one, and frees the chunks.
func (s *Session) send(control []byte, data *chunk) error {
	if s.cork != nil {
		s.cork.cork()
	}
	var err error
	if len(control) > 0 {
		_, err = s.conn.Write(control)
	}
	for data != nil {
		if err == nil {
			_, err = s.conn.Write(data.bytes())
		}
		next := data.next
		data.free()
		data = next
	}
	return err
}

// awaitRoom waits until data can be added, with the lock held.
func (s *Session) awaitRoom() error {
	for s.err == nil && s.data.size >= outLimit {
		if s.writing {
			s.room.Wait()
			continue
		}
		s.mu.Unlock()
		s.flush()
		s.mu.Lock()
	}
	return s.err
}

// queueData copies frames with b to what is to be sent, waiting for room. They go with the next
// flush.
func (s *Session) queueData(id uint32, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(b) > 0 {
		if err := s.awaitRoom(); err != nil {
			return err
		}
		n := min(len(b), wire.MaxData)
		s.data.add(wire.Frame{Type: wire.FrameData, Length: n, Stream: id}, b[:n])
		b = b[n:]
		s.out.Add(uint64(n))
	}
	return nil
}

// queueChunk takes a chunk over as one frame, waiting for room; with an error it stays the
// caller's. It goes with the next flush.
func (s *Session) queueChunk(id uint32, c *chunk) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.awaitRoom(); err != nil {
		return err
	}
	n := len(c.bytes())
	s.data.addChunk(wire.Frame{Type: wire.FrameData, Length: n, Stream: id}, c)
	s.out.Add(uint64(n))
	return nil
}

// tryChunk takes a chunk over as one frame, or copies it if it is small, unless it would have to wait for room.
func (s *Session) tryChunk(id uint32, c *chunk) bool {
	s.mu.Lock()
	if s.err == nil && s.data.size >= outLimit && !s.writing {
		s.mu.Unlock()
		s.flush()
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	if s.err != nil || s.data.size >= outLimit {
		return false
	}
	n := len(c.bytes())
	f := wire.Frame{Type: wire.FrameData, Length: n, Stream: id}
	if n > smallChunk {
		s.data.addChunk(f, c)
	} else { // a frame of its own chunk would cost more than the copy
		s.data.add(f, c.bytes())
		c.free()
	}
	s.out.Add(uint64(n))
	return true
}

// queueFin goes out behind the stream's data.
func (s *Session) queueFin(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	s.data.add(wire.Frame{Type: wire.FrameFin, Stream: id}, nil)
	s.wake()
}

// queueReset goes out behind the stream's data: what was written before a reset arrives.
func (s *Session) queueReset(id uint32, reason []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	s.data.add(wire.Frame{Type: wire.FrameReset, Length: len(reason), Stream: id}, reason)
	s.wake()
}

// queueControl goes out before all data.
func (s *Session) queueControl(t wire.FrameType, id uint32, payload []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.control = append(wire.Frame{Type: t, Length: len(payload), Stream: id}.Append(s.control), payload...)
	s.wake()
}

// queueCredit goes out before all data, with the next flush.
func (s *Session) queueCredit(id uint32, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.control = wire.Frame{Type: wire.FrameCredit, Length: 4, Stream: id}.Append(s.control)
	s.control = binary.BigEndian.AppendUint32(s.control, uint32(n))
}
