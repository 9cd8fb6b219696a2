// Package front is the one public port of the reversed tunnel: it sends each connection
// to the backend that its table has for the server name, which the client says in the
// clear, by TLS SNI or by HTTP CONNECT; the first byte tells which.
//
// It terminates no TLS and holds no keys: who the client is, is the backend's to find out.
// It dials addresses of its own table only, never one that a client names. A change of
// the table breaks no connection. It knows neither objects nor where the table comes
// from.
package front

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-vpn/culvert/internal/splice"
)

// ErrClosed is returned by Set after Close.
var ErrClosed = errors.New("the front is closed")

// Front relays connections. Make it with New, say where to with Set, and give it
// listeners with Serve; Close it after use. Its methods may be called concurrently.
type Front struct {
	opts    Options
	limits  limits
	metrics *metrics
	pipes   splice.Pool
	tick    atomic.Int64 // rounds of the sweep: a cheap clock

	setMu    sync.Mutex
	table    Table // normal
	backends map[string]*backend
	closed   bool
	routes   atomic.Pointer[map[string]*route]

	mu    sync.Mutex
	conns map[*conn]struct{} // relayed

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// New makes a front that serves nobody yet.
func New(opts Options) *Front {
	f := &Front{opts: opts.withDefaults(), conns: map[*conn]struct{}{}, backends: map[string]*backend{}}
	f.metrics = newMetrics(func() float64 {
		_, pending := f.limits.counts()
		return float64(pending)
	})
	f.limits.init(f.opts, f.metrics)
	f.routes.Store(&map[string]*route{})
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.wg.Go(f.sweep)
	return f
}

// Metrics are the front's own, to be registered.
func (f *Front) Metrics() prometheus.Collector { return f.metrics }

// Set makes table the routing table and returns how many routes changed. Connections that
// are under way go on, also those of routes that are gone. After an error, which names
// the field, the table is the one that it was.
func (f *Front) Set(ctx context.Context, table Table) (changed int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("set the front's table: %w", err)
	}
	next, err := table.normal()
	if err != nil {
		return 0, fmt.Errorf("set the front's table: %w", err)
	}
	f.setMu.Lock()
	defer f.setMu.Unlock()
	if f.closed {
		return 0, fmt.Errorf("set the front's table: %w", ErrClosed)
	}
	old := *f.routes.Load()
	routes := make(map[string]*route, len(next.Routes))
	backends := map[string]*backend{}
	for _, r := range next.Routes {
		made := &route{Route: r, backends: make([]*backend, len(r.Backends))}
		for i, b := range r.Backends {
			if backends[b.Address] == nil {
				backends[b.Address] = f.backends[b.Address]
			}
			if backends[b.Address] == nil {
				backends[b.Address] = &backend{address: b.Address}
			}
			made.backends[i] = backends[b.Address]
		}
		routes[r.ServerName] = made
		if was := old[r.ServerName]; was == nil || !reflect.DeepEqual(was.Route, r) {
			changed++
		}
	}
	for name := range old {
		if routes[name] == nil {
			changed++
		}
	}
	if changed > 0 || !slices.Equal(next.Tenants, f.table.Tenants) {
		f.metrics.changes.Inc()
	}
	f.limits.set(next) // before the routes: a route's tenant must be known
	f.table, f.backends = next, backends
	f.routes.Store(&routes)
	f.metrics.routes.Set(float64(len(routes)))
	return changed, nil
}

// Counts are how many connections are relayed now, and how many have not said yet where
// to.
func (f *Front) Counts() (open, pending int) { return f.limits.counts() }

// Serve accepts connections until l is closed or ctx ends, then closes l. Those that the
// kernel accepted until then are served.
func (f *Front) Serve(ctx context.Context, l *net.TCPListener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Now().Add(lastAccept)) })
	defer stop()
	defer context.AfterFunc(f.ctx, func() { _ = l.Close() })()
	defer func() { _ = l.Close() }()
	failing := false
	for {
		client, err := l.AcceptTCP()
		switch {
		case err == nil:
			failing = false
			ticket := f.limits.enter(client)
			f.wg.Go(func() { f.serve(client, ticket) })
		case errors.Is(err, net.ErrClosed) || ctx.Err() != nil && isTimeout(err):
			return nil
		default:
			// No descriptors or no memory: those who wait longest make room.
			if !failing {
				f.opts.Log.Warn("cannot accept connections", "error", err)
			}
			failing = true
			f.limits.shed()
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// lastAccept is how long a listener that is to be closed goes on: what the kernel has
// accepted by then is not lost.
const lastAccept = 100 * time.Millisecond

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// Drain waits until no connection is left, or ctx ends. No Serve may be under way any more.
func (f *Front) Drain(ctx context.Context) {
	f.metrics.draining.Set(1)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if open, pending := f.Counts(); open+pending == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Close closes the listeners, resets all connections, and waits for them. A second Close
// does nothing.
func (f *Front) Close() error {
	f.setMu.Lock()
	defer f.setMu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	f.cancel()
	for {
		f.limits.shedAll()
		for _, c := range f.relayed() {
			c.end(Stopped)
		}
		if open, pending := f.Counts(); open+pending == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	f.wg.Wait()
	f.pipes.Close()
	return nil
}

func (f *Front) relayed() []*conn {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.conns))
}

// sweepInterval is the tick of the sweep.
func (f *Front) sweepInterval() time.Duration {
	return max(5*time.Millisecond, min(500*time.Millisecond, f.opts.IdleTimeout/8, f.opts.HandshakeTimeout/8))
}

// sweep ends what takes too long and gives back what is not needed, until Close.
func (f *Front) sweep() {
	interval := f.sweepInterval()
	idle := int64(f.opts.IdleTimeout / interval)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case now := <-tick.C:
			round := f.tick.Add(1)
			f.endLate(now, round-idle)
			if round%2 == 0 {
				f.limits.sweep(now)
				f.pipes.Trim()
			}
		}
	}
}

// endLate ends the connections that moved nothing since the given round, and those whose
// handshake is not done in time.
func (f *Front) endLate(now time.Time, round int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		switch {
		case c.active.Load() < round:
			c.end(IdleTimeout)
		case !c.answered.Load() && now.Sub(c.start) > f.opts.HandshakeTimeout:
			c.end(HandshakeTimeout)
		}
	}
}
