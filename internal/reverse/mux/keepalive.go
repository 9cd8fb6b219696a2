package mux

import (
	"encoding/binary"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// tickEvery is how often silence is looked at.
const tickEvery = time.Second

// silence is for how long the other end could have been heard, and was not. The zero value has not
// been looked at yet.
type silence struct {
	looked time.Duration // the last look
	since  time.Duration // then it began
	late   bool          // the last look was late
}

// look measures it; now is the time, heard when something last came. Looks are due every tickEvery.
// One that is late says that this process, or the whole machine, stood still: nothing could be read
// either, and who stood still with us has sent nothing. So that time does not count, and the first
// late look finds no silence at all: what has come is to be read before it is judged.
func (q *silence) look(now, heard time.Duration) time.Duration {
	by := now - q.looked - tickEvery
	q.looked, q.since = now, max(q.since, heard)
	late := by > tickEvery/2
	if late {
		q.since = min(now, q.since+by)
	}
	first := late && !q.late
	q.late = late
	if first {
		return 0
	}
	return now - q.since
}

func (s *Session) tick() {
	s.mu.Lock()
	dead := s.err == nil && s.look()
	s.mu.Unlock()
	if dead {
		s.close(ErrSilent)
	}
}

// look reports whether the other end has been silent for too long; else it pings, if it is time to,
// and sees to the next look. It is called with the lock held.
func (s *Session) look() (dead bool) {
	now := s.clock()
	silent := s.silence.look(now, time.Duration(s.received.Load()))
	if d := s.config.DeadAfter; d > 0 && silent > d-tickEvery {
		return true
	}
	if s.config.Keepalive > 0 && (s.pinged == 0 || now-s.pinged >= s.config.Keepalive) {
		s.ping(now)
	}
	s.timer.Reset(tickEvery)
	return false
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
		s.ping(s.clock())
	}
}

// Heard is when something was last received.
func (s *Session) Heard() time.Time { return s.start.Add(time.Duration(s.received.Load())) }

// measured notes a round-trip time. The least one is forgotten little by little: a path may become
// longer.
func (s *Session) measured(rtt int64) {
	s.rtt.Store(rtt)
	if least := s.least.Load(); least > 0 {
		rtt = min(rtt, least+least/32)
	}
	s.least.Store(rtt)
}

// leastRTT is the round-trip time without what waits in front of a ping while there is much to carry;
// zero: none was measured yet.
func (s *Session) leastRTT() time.Duration { return time.Duration(s.least.Load()) }

// RTT is the last measured round-trip time; zero: none yet.
func (s *Session) RTT() time.Duration { return time.Duration(s.rtt.Load()) }
