// Package relay is the transparent proxy for service addresses (services: Proxy).
//
// Packets from tunnels to the address, protocol and port of a known service are handed
// to its sockets by an nftables TPROXY rule (mark netstate.MarkProxy, routed to local
// delivery by netstate.ProxyTable). The relay picks an endpoint and opens a connection
// or a UDP session of its own to it: the endpoint sees the address of this host, the
// client sees the service's. It needs CAP_NET_ADMIN for transparent sockets.
//
// TCP connections are accepted by the kernel before an endpoint is asked; what cannot be
// served is reset. UDP replies leave from a socket bound to the service's address and
// port, so such a port must not be bound to the wildcard address by another program on
// this host. SCTP ports are left out.
//
// The package owns its sockets and nothing else: rules and routes come from others, and
// it knows neither objects nor where endpoints come from.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/splice"
)

// The defaults of Options.
const (
	DefaultMaxConnections          = 16384
	DefaultMaxConnectionsPerSource = 4096
	DefaultMaxSessions             = 16384
	DefaultMaxSessionsPerSource    = 4096
	DefaultIdleTimeout             = 24 * time.Hour  // what kube-proxy sets for established connections
	DefaultSessionTimeout          = 2 * time.Minute // as the kernel's connection tracking keeps UDP streams
	DefaultDialTimeout             = 3 * time.Second
)

// dialAttempts bounds how many endpoints are tried for one TCP connection.
const dialAttempts = 3

// Options are limits and time-outs. The zero value is usable: every zero field means its
// default; a negative limit means none.
type Options struct {
	// Mark is the firewall mark (SO_MARK) of sockets towards endpoints; 0: none. It must
	// not be netstate.MarkProxy, or the packets would be delivered locally.
	Mark uint32
	// MaxConnections and MaxConnectionsPerSource limit TCP connections open at a time; each
	// takes two file descriptors, and two more while bulk data is under way.
	MaxConnections, MaxConnectionsPerSource int
	// MaxSessions and MaxSessionsPerSource limit UDP sessions open at a time; each takes
	// one file descriptor, and each service in use takes one.
	MaxSessions, MaxSessionsPerSource int
	// IdleTimeout resets a TCP connection that moved no byte in either direction.
	IdleTimeout time.Duration
	// SessionTimeout ends a UDP session without a datagram in either direction.
	SessionTimeout time.Duration
	// DialTimeout limits one attempt to connect to an endpoint; at most three are tried.
	DialTimeout time.Duration
	// Log gets rare warnings about the host (no descriptors left); nil: none.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	limit := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	period := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	limit(&o.MaxConnections, DefaultMaxConnections)
	limit(&o.MaxConnectionsPerSource, DefaultMaxConnectionsPerSource)
	limit(&o.MaxSessions, DefaultMaxSessions)
	limit(&o.MaxSessionsPerSource, DefaultMaxSessionsPerSource)
	period(&o.IdleTimeout, DefaultIdleTimeout)
	period(&o.SessionTimeout, DefaultSessionTimeout)
	period(&o.DialTimeout, DefaultDialTimeout)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// ErrClosed is returned by Set after Close.
var ErrClosed = errors.New("the relay is closed")

// Relay is the transparent proxy of one host. Its methods may be called concurrently.
type Relay struct {
	opts Options

	setMu     sync.Mutex
	closed    bool
	listeners map[socketKind]*listener

	table    atomic.Pointer[table]
	affinity affinity
	failures failures
	tcp      tcpRelay
	udp      udpRelay
	pipes    splice.Pool

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// New makes a relay without services; it opens nothing until Set. Close it after use.
func New(opts Options) *Relay {
	opts = opts.withDefaults()
	r := &Relay{opts: opts, listeners: map[socketKind]*listener{}}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.table.Store(&table{})
	r.affinity.init()
	r.failures.init()
	r.tcp.init(opts)
	r.udp.init(opts)
	r.wg.Go(r.sweep)
	return r
}

// Set makes the services with Mode Proxy the ones that are relayed; any other Mode means
// none. It returns how many service ports and listening sockets changed.
//
// TCP connections to an endpoint that is no longer listed go on, as they do with
// kube-proxy; UDP sessions to it end, so that the next datagram picks another.
// Connections and sessions of a service port that is no longer listed end at once (TCP:
// reset), for their packets no longer reach the relay. After an error the services of
// the families that could be opened are relayed; calling Set again tries the rest again.
func (r *Relay) Set(ctx context.Context, desired netstate.Services) (changed int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("set the relay's services: %w", err)
	}
	r.setMu.Lock()
	defer r.setMu.Unlock()
	if r.closed {
		return 0, fmt.Errorf("set the relay's services: %w", ErrClosed)
	}
	if desired.Mode != netstate.ServicesProxy {
		desired.Ports = nil
	}
	next, changed := r.table.Load().update(desired.Ports)
	r.table.Store(next)
	opened, err := r.listen(ctx, next)
	if changed > 0 {
		r.tcp.endGone(next)
		r.udp.endGone(next)
	}
	return changed + opened, err
}

// Close closes the listeners, resets all connections, ends all sessions, and waits for
// them. A second Close does nothing.
func (r *Relay) Close() error {
	r.setMu.Lock()
	defer r.setMu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	none := &table{}
	r.table.Store(none)
	_, err := r.listen(r.ctx, none)
	r.cancel()
	r.tcp.endGone(none)
	r.udp.endGone(none)
	r.wg.Wait()
	r.pipes.Close()
	return err
}

// sweep ends what is idle and gives back what is not needed, until Close.
func (r *Relay) sweep() {
	interval := max(5*time.Millisecond, min(time.Second, r.opts.IdleTimeout/4, r.opts.SessionTimeout/4))
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case now := <-tick.C:
			r.tcp.endIdle(now, r.opts.IdleTimeout)
			r.udp.endIdle(now, r.opts.SessionTimeout)
			r.affinity.expire(now)
			r.failures.expire(now)
			r.pipes.Trim()
		}
	}
}

// idleClock finds out how long something has been idle without reading the clock on
// every byte: users touch it, the sweep looks at it.
type idleClock struct {
	touched atomic.Bool
	since   time.Time // the sweep's own
}

func (c *idleClock) touch() {
	if !c.touched.Load() {
		c.touched.Store(true)
	}
}

// idle is called by the sweep only.
func (c *idleClock) idle(now time.Time) time.Duration {
	if c.touched.Swap(false) || c.since.IsZero() {
		c.since = now
	}
	return now.Sub(c.since)
}
