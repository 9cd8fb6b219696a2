package mux

import (
	"encoding/binary"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// tickEvery is how often silence is looked at.
const tickEvery = time.Second

func (s *Session) tick() {
	now := time.Since(s.start)
	if d := s.config.DeadAfter; d > 0 && now-time.Duration(s.received.Load()) > d-tickEvery {
		s.close(ErrSilent)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if s.config.Keepalive > 0 && (s.pinged == 0 || now-s.pinged >= s.config.Keepalive) {
		s.ping(now)
	}
	s.timer.Reset(tickEvery)
}

// ping is called with the lock held.
func (s *Session) ping(now time.Duration) {
	s.pinged = max(now, 1)
	s.control = wire.Frame{Type: wire.FramePing, Length: 8}.Append(s.control)
	s.control = binary.BigEndian.AppendUint64(s.control, uint64(now))
	s.wake()
}

// Ping asks the other end for a sign of life; see Heard.
func (s *Session) Ping() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.ping(time.Since(s.start))
	}
}

// Heard is when something was last received.
func (s *Session) Heard() time.Time { return s.start.Add(time.Duration(s.received.Load())) }

// RTT is the last measured round-trip time; zero: none yet.
func (s *Session) RTT() time.Duration { return time.Duration(s.rtt.Load()) }
