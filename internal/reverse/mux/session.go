package mux

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Both ends begin with the same window per stream and direction; the receiver widens it
// while its reader keeps up.
const (
	initialWindow = 256 << 10
	maxWindow     = 8 << 20
	// extraCredit is how much all streams of a session may be widened together.
	extraCredit = 64 << 20
	// outLimit is how much of all streams may wait to be sent. It is what a new frame waits
	// behind, beside the kernel's buffer.
	outLimit = 128 << 10
	// maxStreams is how many streams the other side may have open.
	maxStreams = 8192
)

// Errors of sessions and streams, to be tested with errors.Is.
var (
	ErrSessionLost = errors.New("the connection to the other end was lost")
	ErrSilent      = fmt.Errorf("%w: it has been silent for too long", ErrSessionLost)
	ErrGoingAway   = errors.New("the other end takes no new streams: it is about to stop")
	ErrClosed      = errors.New("the stream is closed")
)

// Config is how a session works. The zero value is a server without keepalive that refuses
// all streams.
type Config struct {
	// Dialer is true at exactly one of the two ends.
	Dialer bool
	// Accept is called on a goroutine of its own for each stream that the other end opens.
	// It must end with Close or Reset. Nil: such streams are reset.
	Accept func(*Stream)
	// Keepalive is how often a ping is sent; zero: never.
	Keepalive time.Duration
	// DeadAfter is how long the other end may be silent before the session is closed; zero:
	// for ever. It should be longer than Keepalive by three seconds at least.
	DeadAfter time.Duration
}

// Session is one connection with its streams.
type Session struct {
	conn   net.Conn
	cork   *Corked
	config Config
	start  time.Time
	clock  func() time.Duration // since start

	received atomic.Int64 // nanoseconds since start: the last time that something came
	rtt      atomic.Int64 // nanoseconds; 0: not measured yet
	least    atomic.Int64 // the least one of late, the same
	in, out  atomic.Uint64

	// The reader's own: sessions that it has given something and not flushed, streams of which it has
	// not written out what has come, and how much all that is.
	others []*Session
	outs   []*Stream
	unsent int

	mu       sync.Mutex
	room     sync.Cond // of data
	streams  map[uint32]*Stream
	next     uint32
	theirs   int    // streams that the other end opened
	widened  int    // bytes of credit beyond the initial windows
	control  []byte // frames that go out first
	spare    []byte // memory for the next ones
	data     outQueue
	writing  bool
	draining bool // a GoAway was received
	leaving  bool // a GoAway was sent
	err      error
	pinged   time.Duration // since start
	silence  silence
	timer    *time.Timer
	done     chan struct{}
}

// New starts a session on a connection and owns it from then on. Small writes are
// collected when conn is a tls.Conn over a Corked.
func New(conn net.Conn, config Config) *Session {
	start := time.Now()
	return newSession(conn, config, start, func() time.Duration { return time.Since(start) })
}

func newSession(conn net.Conn, config Config, start time.Time, clock func() time.Duration) *Session {
	s := &Session{
		conn: conn, cork: corkOf(conn), config: config, start: start, clock: clock,
		streams: map[uint32]*Stream{}, next: 2, done: make(chan struct{}),
	}
	if s.cork != nil {
		s.cork.heard, s.cork.idle = s.hear, s.giveOn
	}
	if config.Dialer {
		s.next = 1
	}
	s.room.L = &s.mu
	go s.readLoop()
	if config.Keepalive > 0 || config.DeadAfter > 0 {
		s.mu.Lock()
		s.timer = time.AfterFunc(0, s.tick)
		s.mu.Unlock()
	}
	return s
}

// Bytes are the payload bytes of streams, received and sent.
func (s *Session) Bytes() (in, out uint64) { return s.in.Load(), s.out.Load() }

// Streams is the number of open streams.
func (s *Session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

// Usable reports whether a new stream can be opened.
func (s *Session) Usable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err == nil && !s.draining
}

// Draining reports whether the other end asked for no more streams; also after the end.
func (s *Session) Draining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining
}

// Done is closed when the session has ended; Err then says why.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is why the session ended; nil while it lives.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// RemoteAddr is the connection's.
func (s *Session) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

// Open begins a stream with a header of at most wire.MaxControl bytes. It does not wait:
// see Stream.Answer.
func (s *Session) Open(header []byte) (*Stream, error) {
	if len(header) > wire.MaxControl {
		return nil, fmt.Errorf("a header of %d bytes, allowed are %d", len(header), wire.MaxControl)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return nil, s.err
	case s.draining:
		return nil, ErrGoingAway
	case s.next >= 1<<32-2:
		return nil, ErrGoingAway
	}
	st := newStream(s, s.next, nil)
	s.next += 2
	s.streams[st.id] = st
	s.control = append(wire.Frame{Type: wire.FrameOpen, Length: len(header), Stream: st.id}.Append(s.control), header...)
	s.wake()
	return st, nil
}

// GoAway asks the other end to open no more streams; those that are open go on.
func (s *Session) GoAway() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.leaving {
		return
	}
	s.leaving = true
	s.control = wire.Frame{Type: wire.FrameGoAway}.Append(s.control)
	s.wake()
}

// Close ends the session and all its streams, with ErrSessionLost.
func (s *Session) Close() { s.close(ErrSessionLost) }

// CloseWith ends the session; its streams end with an error that wraps ErrSessionLost and
// names the reason.
func (s *Session) CloseWith(reason string) {
	s.close(fmt.Errorf("%w: %s", ErrSessionLost, reason))
}

func (s *Session) close(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	streams := s.streams
	s.streams = map[uint32]*Stream{}
	if s.timer != nil {
		s.timer.Stop()
	}
	s.room.Broadcast()
	s.mu.Unlock()
	for _, st := range streams {
		st.fail(err)
	}
	// Not the TLS way: nothing may wait for a dead path. A cut is told from an end by FIN
	// frames.
	if t, ok := s.conn.(interface{ NetConn() net.Conn }); ok {
		_ = t.NetConn().Close()
	} else {
		_ = s.conn.Close()
	}
	close(s.done)
}

// widen takes credit from what the session has to give.
func (s *Session) widen(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.widened+n > extraCredit {
		return false
	}
	s.widened += n
	return true
}

// forget removes a stream that has ended.
func (s *Session) forget(st *Stream, widened int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.widened -= widened
	if s.streams[st.id] != st {
		return
	}
	delete(s.streams, st.id)
	if s.foreign(st.id) {
		s.theirs--
	}
}

// foreign reports whether the other end opened the stream.
func (s *Session) foreign(id uint32) bool { return (id%2 == 1) != s.config.Dialer }

func (s *Session) stream(id uint32) *Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams[id]
}
