package front

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync/atomic"
	"time"
)

// keepAlive finds peers that are gone within a minute.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

// shunned is how long a backend that could not be connected to comes last.
const shunned = 5 * time.Second

// backend is an address that connections are relayed to; it outlives changes of the table.
type backend struct {
	address string
	open    atomic.Int64
	failed  atomic.Int64 // when it could not be connected to last, in Unix nanoseconds; 0: it could
}

// target is a backend and how to speak to it.
type target struct {
	*backend
	proxy ProxyProtocol
}

// targets are the route's backends, best first: those that did not fail lately, and of
// these the one with the fewest connections.
func (r *route) targets(now time.Time) []target {
	out := make([]target, len(r.backends))
	for i, b := range r.backends {
		out[i] = target{b, r.Backends[i].ProxyProtocol}
	}
	if len(out) == 1 {
		return out
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	late := func(t target) int {
		if failed := t.failed.Load(); failed != 0 && now.Sub(time.Unix(0, failed)) < shunned {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(out, func(a, b target) int {
		return cmp.Or(late(a)-late(b), cmp.Compare(a.open.Load(), b.open.Load()))
	})
	return out
}

// dial connects to one of the route's backends, and to nothing else. The connection is
// counted as the backend's.
func (f *Front) dial(ctx context.Context, r *route) (*net.TCPConn, target, error) {
	ctx, cancel := context.WithTimeout(ctx, f.opts.DialBudget)
	defer cancel()
	var first error
	for _, t := range r.targets(time.Now()) {
		t.open.Add(1)
		conn, err := f.connect(ctx, t.address)
		if err == nil {
			t.failed.Store(0)
			return conn, t, nil
		}
		t.open.Add(-1)
		if f.ctx.Err() != nil {
			return nil, target{}, fmt.Errorf("connect to a backend of %s: the front stops", r.ServerName)
		}
		t.failed.Store(time.Now().UnixNano())
		f.metrics.failures.WithLabelValues(r.Tenant).Inc()
		first = cmp.Or(first, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, target{}, fmt.Errorf("connect to a backend of %s: %w", r.ServerName, first)
}

func (f *Front) connect(ctx context.Context, address string) (*net.TCPConn, error) {
	begin := time.Now()
	d := net.Dialer{Timeout: f.opts.DialTimeout, KeepAliveConfig: keepAlive}
	d.SetMultipathTCP(false) // a plain socket: splice(2) knows no other
	conn, err := d.DialContext(ctx, "tcp", address)
	f.metrics.dials.Observe(time.Since(begin).Seconds())
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("not a TCP connection: %T", conn), conn.Close())
	}
	return tcp, nil
}
