package relay

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

// keepAlive finds dead peers of idle connections within about three minutes.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 15 * time.Second, Count: 4}

// tcpRelay is all of the relay's TCP connections.
type tcpRelay struct {
	counters
	limit limiter

	mu    sync.Mutex
	conns map[*tcpConn]struct{}
}

func (t *tcpRelay) init(o Options) {
	t.limit = newLimiter(o.MaxConnections, o.MaxConnectionsPerSource)
	t.conns = map[*tcpConn]struct{}{}
}

// tcpConn is one relayed connection.
type tcpConn struct {
	key    serviceKey
	client *tcpconn.Conn
	clock  idleClock
	cancel context.CancelFunc // ends a dial under way

	mu       sync.Mutex
	ended    bool
	endpoint *tcpconn.Conn // nil while it is dialled
}

// acceptTCP serves a listening socket until it is closed.
func (r *Relay) acceptTCP(l *net.TCPListener) {
	failing := false
	for {
		client, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// No descriptors or no memory: the connection waits in the kernel's queue.
			if !failing {
				r.opts.Log.Warn("relay cannot accept connections", slog.Any("error", err))
			}
			failing = true
			time.Sleep(20 * time.Millisecond)
			continue
		}
		failing = false
		source := addrPort(client.RemoteAddr()).Addr()
		if reason, ok := r.tcp.limit.acquire(source); !ok {
			r.tcp.refuse(reason)
			tcpconn.Reset(client)
			continue
		}
		r.wg.Go(func() {
			defer r.tcp.limit.release(source)
			r.serveTCP(tcpconn.New(client), source)
		})
	}
}

// serveTCP relays one accepted connection to its end.
func (r *Relay) serveTCP(client *tcpconn.Conn, source netip.Addr) {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	c := &tcpConn{
		key:    serviceKey{netstate.TCP, addrPort(client.LocalAddr())},
		client: client,
		cancel: cancel,
	}
	// Known first, looked up then: Set does it the other way round, so none is missed.
	r.tcp.add(c)
	defer r.tcp.remove(c)

	endpoint, reason := r.dialTCP(ctx, c.key, source)
	if endpoint == nil {
		r.tcp.refuse(reason)
		c.end()
		return
	}
	if !c.attach(endpoint) {
		return
	}
	r.tcp.total.Add(1)
	var wg sync.WaitGroup
	wg.Go(func() { r.pump(c, client, endpoint, &r.tcp.endpointBytes) })
	r.pump(c, endpoint, client, &r.tcp.clientBytes)
	wg.Wait()
	c.close()
}

// pump moves bytes one way until the source ends; any other end resets the connection.
func (r *Relay) pump(c *tcpConn, dst, src *tcpconn.Conn, count *atomic.Uint64) {
	err := r.pipes.Copy(dst, src, func(n int) {
		count.Add(uint64(n))
		c.clock.touch()
	})
	if err != nil {
		c.end()
	}
}

// dialTCP connects to an endpoint of the service; nil comes with the reason.
func (r *Relay) dialTCP(ctx context.Context, key serviceKey, source netip.Addr) (*tcpconn.Conn, Reason) {
	s := r.table.Load().lookup(key.protocol, key.address)
	if s == nil {
		return nil, RefusedUnknown
	}
	candidates := r.candidates(s, source, dialAttempts)
	if len(candidates) == 0 {
		return nil, RefusedNoEndpoint
	}
	d := net.Dialer{Timeout: r.opts.DialTimeout, Control: markControl(r.opts.Mark), KeepAliveConfig: keepAlive}
	for _, e := range candidates {
		conn, err := d.DialContext(ctx, "tcp", e.String())
		if err == nil {
			r.failures.remove(e)
			r.chosen(s, source, e)
			tcp, _ := conn.(*net.TCPConn)
			return tcpconn.New(tcp), ""
		}
		if ctx.Err() != nil {
			break
		}
		r.failures.add(e)
	}
	return nil, RefusedUnreachable
}

// attach adds the endpoint's connection, or closes it when c has ended meanwhile.
func (c *tcpConn) attach(endpoint *tcpconn.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		tcpconn.Reset(endpoint)
		return false
	}
	c.endpoint = endpoint
	return true
}

// end resets both sides; it may be called at any time, by anyone.
func (c *tcpConn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	c.ended = true
	c.cancel()
	tcpconn.Reset(c.client)
	if c.endpoint != nil {
		tcpconn.Reset(c.endpoint)
	}
}

// close closes both sides after both directions came to their end.
func (c *tcpConn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	c.ended = true
	_ = c.client.Close()
	_ = c.endpoint.Close()
}

func (t *tcpRelay) add(c *tcpConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns[c] = struct{}{}
}

func (t *tcpRelay) remove(c *tcpConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.conns, c)
}

// endGone ends the connections of service ports that are not in the table.
func (t *tcpRelay) endGone(next *table) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.conns {
		if next.services[c.key] == nil {
			c.end()
		}
	}
}

func (t *tcpRelay) endIdle(now time.Time, timeout time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.conns {
		if c.clock.idle(now) >= timeout {
			c.end()
		}
	}
}

// addrPort is the address of a TCP or UDP socket, IPv4 as such and without a zone.
func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
