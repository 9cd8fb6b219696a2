package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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

	received atomic.Int64 // nanoseconds since start: the last time that something came
	rtt      atomic.Int64 // nanoseconds; 0: not measured yet
	in, out  atomic.Uint64

	mu       sync.Mutex
	room     sync.Cond // of data
	streams  map[uint32]*Stream
	next     uint32
	theirs   int    // streams that the other end opened
	widened  int    // bytes of credit beyond the initial windows
	control  []byte // frames that go out first
	data     outQueue
	writing  bool
	draining bool // a GoAway was received
	leaving  bool // a GoAway was sent
	err      error
	pinged   time.Duration // since start
	timer    *time.Timer
	done     chan struct{}
}

// New starts a session on a connection and owns it from then on. Small writes are
// collected when conn is a tls.Conn over a Corked.
func New(conn net.Conn, config Config) *Session {
	s := &Session{
		conn: conn, cork: corkOf(conn), config: config, start: time.Now(),
		streams: map[uint32]*Stream{}, next: 2, done: make(chan struct{}),
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
		s.received.Store(int64(time.Since(s.start)))
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

func (s *Session) readData(f wire.Frame) error {
	s.in.Add(uint64(f.Length))
	st := s.stream(f.Stream)
	if st == nil { // reset or forgotten meanwhile
		_, err := io.CopyN(io.Discard, s.conn, int64(f.Length))
		return err
	}
	return st.fill(s.conn, f.Length)
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
		if sent, now := binary.BigEndian.Uint64(payload), uint64(time.Since(s.start)); sent <= now {
			s.rtt.Store(int64(now - sent))
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
