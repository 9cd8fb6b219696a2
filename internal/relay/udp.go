package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// maxDatagram is the longest UDP payload, in bytes.
const maxDatagram = 1 << 16

var datagrams = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// udpRelay is all of the relay's UDP sessions.
type udpRelay struct {
	counters
	limit limiter

	mu       sync.Mutex
	sessions map[udpKey]*udpSession
	replies  map[netip.AddrPort]*replySocket
}

func (u *udpRelay) init(o Options) {
	u.limit = newLimiter(o.MaxSessions, o.MaxSessionsPerSource)
	u.sessions = map[udpKey]*udpSession{}
	u.replies = map[netip.AddrPort]*replySocket{}
}

// udpKey names a session.
type udpKey struct{ client, service netip.AddrPort }

// udpSession is what a client and a service port say to each other by way of one
// endpoint.
type udpSession struct {
	key      udpKey
	endpoint netip.AddrPort
	conn     *net.UDPConn // connected to the endpoint
	raw      syscall.RawConn
	reply    *replySocket
	clock    idleClock
}

// replySocket is bound to a service port's address; all of its sessions send from it.
type replySocket struct {
	conn     *net.UDPConn
	raw      syscall.RawConn
	sessions int // under udpRelay.mu; closed at 0
}

// receiveUDP serves a listening socket until it is closed. It never waits for a session:
// what an endpoint's socket does not take at once is dropped.
func (r *Relay) receiveUDP(l *net.UDPConn) {
	payload, oob := make([]byte, maxDatagram), make([]byte, controlSize)
	failing := false
	for {
		n, oobn, _, client, err := l.ReadMsgUDPAddrPort(payload, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if !failing {
				r.opts.Log.Warn("relay cannot receive datagrams", slog.Any("error", err))
			}
			failing = true
			time.Sleep(20 * time.Millisecond)
			continue
		}
		failing = false
		service, ok := originalDestination(oob[:oobn])
		if !ok {
			r.udp.refuse(RefusedUnknown)
			continue
		}
		client = netip.AddrPortFrom(client.Addr().Unmap().WithZone(""), client.Port())
		r.forward(udpKey{client, service}, payload[:n])
	}
}

// forward sends a client's datagram to the endpoint of its session. A session that has
// just ended, or whose endpoint refuses (ICMP port unreachable), is replaced once; other
// errors may be those of an earlier datagram (ICMP too big), so there is a second try.
func (r *Relay) forward(key udpKey, payload []byte) {
	for range 2 {
		s := r.session(key)
		if s == nil {
			return
		}
		s.clock.touch()
		err := sendNow(s.raw, payload)
		if err == nil {
			r.udp.clientBytes.Add(uint64(len(payload)))
			return
		}
		switch {
		case errors.Is(err, net.ErrClosed):
			r.udp.drop(s)
		case refused(err):
			r.failures.add(s.endpoint)
			r.udp.refuse(RefusedUnreachable)
			r.udp.drop(s)
		}
	}
	r.udp.dropped.Add(1)
}

// session returns the session of that name, a new one if need be, or nil when the
// datagram was refused.
func (r *Relay) session(key udpKey) *udpSession {
	u := &r.udp
	u.mu.Lock()
	defer u.mu.Unlock()
	if s := u.sessions[key]; s != nil {
		return s
	}
	s, reason := r.openSession(key)
	if s == nil {
		u.refuse(reason)
		return nil
	}
	u.sessions[key] = s
	u.total.Add(1)
	r.wg.Go(func() { r.returnUDP(s) })
	return s
}

// openSession makes a session; u.mu is held, so Set sees it or it sees Set's table.
func (r *Relay) openSession(key udpKey) (*udpSession, Reason) {
	svc := r.table.Load().lookup(netstate.UDP, key.service)
	if svc == nil {
		return nil, RefusedUnknown
	}
	source := key.client.Addr()
	candidates := r.candidates(svc, source, 1)
	if len(candidates) == 0 {
		return nil, RefusedNoEndpoint
	}
	if reason, ok := r.udp.limit.acquire(source); !ok {
		return nil, reason
	}
	s := &udpSession{key: key, endpoint: candidates[0]}
	if err := r.connect(s); err != nil {
		r.udp.limit.release(source)
		return nil, RefusedUnreachable
	}
	r.chosen(svc, source, s.endpoint)
	return s, ""
}

// connect opens the session's sockets; u.mu is held.
func (r *Relay) connect(s *udpSession) (err error) {
	d := net.Dialer{Control: markControl(r.opts.Mark)}
	conn, err := d.DialContext(r.ctx, "udp", s.endpoint.String())
	if err != nil {
		return err
	}
	s.conn, _ = conn.(*net.UDPConn)
	if s.raw, err = s.conn.SyscallConn(); err == nil {
		s.reply, err = r.udp.replySocket(r.ctx, s.key.service)
	}
	if err != nil {
		return errors.Join(err, s.conn.Close())
	}
	s.reply.sessions++
	return nil
}

// replySocket returns the socket bound to the service's address; u.mu is held.
func (u *udpRelay) replySocket(ctx context.Context, service netip.AddrPort) (*replySocket, error) {
	if reply := u.replies[service]; reply != nil {
		return reply, nil
	}
	kind := socketKind{netstate.UDP, netstate.FamilyOf(service.Addr())}
	lc := net.ListenConfig{Control: replyControl}
	conn, err := lc.ListenPacket(ctx, kind.network(), service.String())
	if err != nil {
		return nil, fmt.Errorf("bind to %s: %w", service, err)
	}
	reply := &replySocket{}
	reply.conn, _ = conn.(*net.UDPConn)
	if reply.raw, err = reply.conn.SyscallConn(); err != nil {
		return nil, errors.Join(err, reply.conn.Close())
	}
	u.replies[service] = reply
	return reply, nil
}

// returnUDP sends an endpoint's datagrams to the client until the session ends. An
// endpoint that refuses (ICMP port unreachable) ends it.
func (r *Relay) returnUDP(s *udpSession) {
	defer r.remove(s)
	var (
		buffer *[maxDatagram]byte
		n      int
		err    error
	)
	// A buffer is taken only when there is something to read: idle sessions hold none.
	receive := func(fd uintptr) bool {
		buffer, _ = datagrams.Get().(*[maxDatagram]byte)
		if n, err = receiveNow(fd, buffer[:]); !wouldBlock(err) {
			return true
		}
		datagrams.Put(buffer)
		return false
	}
	to := socketAddress(s.key.client)
	for {
		if s.raw.Read(receive) != nil {
			return
		}
		if err != nil {
			datagrams.Put(buffer)
			if refused(err) {
				r.failures.add(s.endpoint)
				r.udp.refuse(RefusedUnreachable)
				return
			}
			continue // an error of one datagram, told once: ICMP too big
		}
		s.clock.touch()
		if sendToNow(s.reply.raw, buffer[:n], to) == nil {
			r.udp.endpointBytes.Add(uint64(n))
		} else {
			r.udp.dropped.Add(1)
		}
		datagrams.Put(buffer)
	}
}

// remove forgets a session whose return direction has ended, and closes its sockets.
func (r *Relay) remove(s *udpSession) {
	u := &r.udp
	u.mu.Lock()
	defer u.mu.Unlock()
	u.end(s)
	if s.reply.sessions--; s.reply.sessions == 0 {
		_ = s.reply.conn.Close()
		delete(u.replies, s.key.service)
	}
	u.limit.release(s.key.client.Addr())
}

// end closes a session's socket, which ends its goroutine; the next datagram of the
// client starts another session. u.mu is held.
func (u *udpRelay) end(s *udpSession) {
	_ = s.conn.Close()
	if u.sessions[s.key] == s {
		delete(u.sessions, s.key)
	}
}

func (u *udpRelay) drop(s *udpSession) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.end(s)
}

// endGone ends the sessions whose service port or endpoint is not in the table.
func (u *udpRelay) endGone(next *table) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, s := range u.sessions {
		if svc := next.lookup(netstate.UDP, s.key.service); svc == nil || !svc.has(s.endpoint) {
			u.end(s)
		}
	}
}

func (u *udpRelay) endIdle(now time.Time, timeout time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, s := range u.sessions {
		if s.clock.idle(now) >= timeout {
			u.end(s)
		}
	}
}
