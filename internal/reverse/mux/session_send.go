package mux

import (
	"errors"
	"fmt"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// wake makes sure that pending frames go out. It is called with the lock held.
func (s *Session) wake() {
	if !s.writing && s.err == nil {
		s.writing = true
		go s.writeLoop()
	}
}

// writeLoop sends what is pending and ends.
func (s *Session) writeLoop() {
	var control []byte
	for {
		s.mu.Lock()
		if s.err != nil || len(s.control) == 0 && s.data.head == nil {
			s.writing = false
			s.mu.Unlock()
			return
		}
		control, s.control = s.control, control[:0]
		data := s.data.head
		s.data = outQueue{}
		s.room.Broadcast()
		s.mu.Unlock()
		err := s.send(control, data)
		if err != nil {
			s.close(fmt.Errorf("%w: %w", ErrSessionLost, err))
		}
	}
}

// send writes, and frees the chunks.
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
	if s.cork != nil {
		err = errors.Join(err, s.cork.uncork())
	}
	return err
}

// awaitRoom waits until data can be added, with the lock held.
func (s *Session) awaitRoom() error {
	for s.err == nil && s.data.size >= outLimit {
		s.room.Wait()
	}
	return s.err
}

// queueData copies frames with b to what is to be sent, waiting for room.
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
		s.wake()
	}
	return nil
}

// queueChunk takes a chunk over as one frame, waiting for room; with an error it stays the
// caller's.
func (s *Session) queueChunk(id uint32, c *chunk) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.awaitRoom(); err != nil {
		return err
	}
	n := len(c.bytes())
	s.data.addChunk(wire.Frame{Type: wire.FrameData, Length: n, Stream: id}, c)
	s.out.Add(uint64(n))
	s.wake()
	return nil
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
