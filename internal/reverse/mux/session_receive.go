package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

func (s *Session) readLoop() {
	err := s.read()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
		err = ErrSessionLost
	case !errors.Is(err, ErrSessionLost):
		err = fmt.Errorf("%w: %w", ErrSessionLost, err)
	}
	s.close(err)
}

func (s *Session) read() error {
	var header [wire.FrameHeader]byte
	for {
		if _, err := io.ReadFull(s.conn, header[:]); err != nil {
			return err
		}
		s.hear()
		f, err := wire.ParseFrame(header)
		if err != nil {
			return err
		}
		if f.Type == wire.FrameData {
			err = s.readData(f)
		} else {
			err = s.readControl(f)
		}
		if err != nil {
			return err
		}
	}
}

// hear notes that something came.
func (s *Session) hear() { s.received.Store(int64(s.clock())) }

func (s *Session) readData(f wire.Frame) error {
	s.in.Add(uint64(f.Length))
	st := s.stream(f.Stream)
	if st == nil { // reset or forgotten meanwhile
		_, err := io.CopyN(io.Discard, s.conn, int64(f.Length))
		return err
	}
	if err := st.fill(s.conn, f.Length); err != nil {
		return err
	}
	s.given(st)
	if s.unsent += f.Length; s.unsent >= outLimit || s.cork == nil { // nobody says when it waits
		s.giveOn()
	}
	return nil
}

// given notes that something has come for a stream. What goes to another stream is queued there at once, and
// flushed with the rest; what goes to a connection is written with the rest.
func (s *Session) given(st *Stream) {
	st.mu.Lock()
	streams, out := st.onward != nil, st.out != nil
	st.mu.Unlock()
	switch {
	case streams:
		other, credit := st.giveOn()
		if credit {
			s.flush()
		}
		if other != nil && !slices.Contains(s.others, other) {
			s.others = append(s.others, other)
		}
	case out && !slices.Contains(s.outs, st):
		s.outs = append(s.outs, st)
	}
}

// giveOn sends what is to be given on, before the reader waits.
func (s *Session) giveOn() {
	for _, o := range s.others {
		o.flush()
	}
	for _, st := range s.outs {
		if _, credit := st.giveOn(); credit {
			s.flush()
		}
	}
	clear(s.others)
	clear(s.outs)
	s.others, s.outs, s.unsent = s.others[:0], s.outs[:0], 0
}

func (s *Session) readControl(f wire.Frame) error {
	var small [8]byte
	payload := small[:0]
	if f.Length > 0 {
		payload = small[:min(f.Length, len(small))]
		if f.Length > len(small) {
			payload = make([]byte, f.Length)
		}
		if _, err := io.ReadFull(s.conn, payload); err != nil {
			return err
		}
	}
	switch f.Type {
	case wire.FrameOpen:
		return s.accept(f.Stream, payload)
	case wire.FramePing:
		return s.pong(payload)
	case wire.FramePong:
		if sent, now := binary.BigEndian.Uint64(payload), uint64(s.clock()); sent <= now {
			s.measured(int64(now - sent))
		}
		return nil
	case wire.FrameGoAway:
		s.mu.Lock()
		s.draining = true
		s.mu.Unlock()
		return nil
	}
	st := s.stream(f.Stream)
	if st == nil {
		return nil
	}
	return st.control(f.Type, payload)
}

// pongLimit is how many bytes of control frames may wait: a peer that pings without
// reading is cut off.
const pongLimit = 1 << 20

func (s *Session) pong(payload []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.control) > pongLimit {
		return fmt.Errorf("%w: the other end does not read", wire.ErrFrame)
	}
	s.control = append(wire.Frame{Type: wire.FramePong, Length: 8}.Append(s.control), payload...)
	s.wake()
	return nil
}

func (s *Session) accept(id uint32, header []byte) error {
	if !s.foreign(id) {
		return fmt.Errorf("%w: the other end opened stream %d, which is ours", wire.ErrFrame, id)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if s.streams[id] != nil {
		return fmt.Errorf("%w: stream %d was opened twice", wire.ErrFrame, id)
	}
	if len(s.control) > pongLimit {
		return fmt.Errorf("%w: the other end does not read", wire.ErrFrame)
	}
	if s.config.Accept == nil || s.theirs >= maxStreams {
		s.control = wire.Frame{Type: wire.FrameReset, Stream: id}.Append(s.control)
		s.wake()
		return nil
	}
	st := newStream(s, id, append([]byte(nil), header...))
	s.streams[id] = st
	s.theirs++
	go s.config.Accept(st)
	return nil
}
