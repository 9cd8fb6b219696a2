package front

import (
	"container/list"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

// bucket is a token bucket: rate a second, burst at once.
type bucket struct {
	tokens float64
	last   time.Time // zero: full
}

// take takes a token, if there is one; a negative rate is no limit.
func (b *bucket) take(now time.Time, rate float64, burst int) bool {
	if rate < 0 || burst < 0 {
		return true
	}
	b.fill(now, rate, burst)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

func (b *bucket) fill(now time.Time, rate float64, burst int) {
	if b.last.IsZero() {
		b.tokens = float64(burst)
	} else {
		b.tokens = min(float64(burst), b.tokens+rate*now.Sub(b.last).Seconds())
	}
	b.last = now
}

// source is what is counted for one address.
type source struct {
	open    int
	rate    bucket
	pending *list.List // of *ticket, oldest first
}

// tenant is what is counted for one tenant; limits.mu guards it, except its metrics.
type tenant struct {
	name  string
	limit Tenant
	open  int
	rate  bucket
	gone  bool // from the table

	metrics tenantMetrics
}

// limits counts what is open, and says what stands against one more.
type limits struct {
	opts    Options
	metrics *metrics

	mu      sync.Mutex
	total   int
	sources map[netip.Addr]*source
	pending *list.List // of *ticket, oldest first
	tenants map[string]*tenant
	proxies *source // stands for all that send a PROXY header, until they did
}

func (l *limits) init(o Options, m *metrics) {
	l.opts, l.metrics = o, m
	l.proxies = &source{pending: list.New()}
	l.sources = map[netip.Addr]*source{}
	l.pending = list.New()
	l.tenants = map[string]*tenant{}
}

// ticket is a connection's place among those that are counted.
type ticket struct {
	limits  *limits
	client  *net.TCPConn
	source  *source
	all     *list.Element // in limits.pending; nil: not pending any more
	own     *list.Element // in source.pending
	tenant  *tenant
	evicted atomic.Bool
}

// sourceKey is what stands for one customer: an address, or an IPv6 /64.
func sourceKey(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64) // of an IPv6 address: no error
		return p.Addr()
	}
	return a
}

// enter makes a place for a new connection among the pending ones, if need be by
// displacing the oldest. One whose source is not known yet needs an identify.
func (l *limits) enter(client *net.TCPConn) *ticket {
	l.mu.Lock()
	defer l.mu.Unlock()
	if limit := l.opts.MaxPending; limit >= 0 && l.pending.Len() >= limit {
		l.evict(l.pending.Front())
	}
	t := &ticket{limits: l, client: client, source: l.proxies}
	t.all, t.own = l.pending.PushBack(t), t.source.pending.PushBack(t)
	return t
}

// identify says from where the connection comes, and returns what stands against it. When
// there are too many pending ones from there, it displaces the oldest.
func (t *ticket) identify(address netip.Addr) Reason {
	l := t.limits
	key := sourceKey(address)
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.evicted.Load() {
		return Displaced
	}
	s := l.sources[key]
	if s == nil {
		s = &source{pending: list.New()}
		l.sources[key] = s
	}
	if !s.rate.take(time.Now(), l.opts.SourceRate, l.opts.SourceBurst) {
		return SourceRate
	}
	if limit := l.opts.MaxConnectionsPerSource; limit >= 0 && s.open >= limit {
		return SourceLimit
	}
	if limit := l.opts.MaxPendingPerSource; limit >= 0 && s.pending.Len() >= limit {
		l.evict(s.pending.Front())
	}
	t.source.pending.Remove(t.own)
	t.source, t.own = s, s.pending.PushBack(t)
	return ""
}

// evict displaces a pending connection; nil is none. The caller holds l.mu.
func (l *limits) evict(e *list.Element) {
	if e == nil {
		return
	}
	t, _ := e.Value.(*ticket)
	t.evicted.Store(true)
	t.unlist()
	tcpconn.Reset(t.client)
}

// shed displaces the oldest pending connection, when there are no descriptors left.
func (l *limits) shed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.evict(l.pending.Front())
}

// unlist takes the ticket off the lists of pending ones. The caller holds the lock.
func (t *ticket) unlist() {
	if t.all != nil {
		t.limits.pending.Remove(t.all)
		t.source.pending.Remove(t.own)
		t.all, t.own = nil, nil
	}
}

// admit counts the connection as one of the tenant's, or says what stands against it.
func (t *ticket) admit(name string) Reason {
	l := t.limits
	l.mu.Lock()
	defer l.mu.Unlock()
	tenant := l.tenants[name]
	if tenant == nil { // the table changed meanwhile
		return UnknownName
	}
	limit := l.limitOf(tenant)
	switch {
	case t.evicted.Load():
		return Displaced
	case l.opts.MaxConnections >= 0 && l.total >= l.opts.MaxConnections:
		return Limit
	case l.opts.MaxConnectionsPerSource >= 0 && t.source.open >= l.opts.MaxConnectionsPerSource:
		return SourceLimit
	case limit.MaxConnections >= 0 && tenant.open >= limit.MaxConnections:
		return TenantLimit
	case !tenant.rate.take(time.Now(), limit.ConnectionsPerSecond, limit.ConnectionsBurst):
		return TenantRate
	}
	t.unlist()
	t.tenant = tenant
	l.total++
	t.source.open++
	tenant.open++
	tenant.metrics.open.Inc()
	return ""
}

func (l *limits) limitOf(t *tenant) Tenant {
	limit := t.limit
	if limit.MaxConnections == 0 {
		limit.MaxConnections = l.opts.MaxConnectionsPerTenant
	}
	if limit.ConnectionsPerSecond == 0 {
		limit.ConnectionsPerSecond = l.opts.TenantRate
	}
	if limit.ConnectionsBurst == 0 {
		limit.ConnectionsBurst = l.opts.TenantBurst
	}
	return limit
}

// leave gives the place back.
func (t *ticket) leave() {
	l := t.limits
	l.mu.Lock()
	defer l.mu.Unlock()
	t.unlist()
	if t.tenant == nil {
		return
	}
	l.total--
	t.source.open--
	t.tenant.open--
	t.tenant.metrics.open.Dec()
	l.forget(t.tenant)
	t.tenant = nil
}

// forget drops a tenant that is in no table and has no connection. The caller holds l.mu.
func (l *limits) forget(t *tenant) {
	if t.gone && t.open == 0 {
		delete(l.tenants, t.name)
		l.metrics.forget(t.name)
	}
}

// counts are the numbers of connections that are relayed, and pending.
func (l *limits) counts() (open, pending int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total, l.pending.Len()
}

// set makes the tenants of a normal table the known ones.
func (l *limits) set(table Table) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range l.tenants {
		t.gone, t.limit = true, Tenant{}
	}
	for _, r := range table.Routes {
		if l.tenants[r.Tenant] == nil {
			l.tenants[r.Tenant] = &tenant{name: r.Tenant, metrics: l.metrics.tenant(r.Tenant)}
		}
		l.tenants[r.Tenant].gone = false
	}
	for _, limit := range table.Tenants {
		l.tenants[limit.Name].limit = limit
	}
	for _, t := range l.tenants {
		l.forget(t)
	}
}

// sweep forgets the sources of which nothing is left to know.
func (l *limits) sweep(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, s := range l.sources {
		if s.open > 0 || s.pending.Len() > 0 {
			continue
		}
		if l.opts.SourceRate < 0 || l.opts.SourceBurst < 0 {
			delete(l.sources, key)
			continue
		}
		if s.rate.fill(now, l.opts.SourceRate, l.opts.SourceBurst); s.rate.tokens >= float64(l.opts.SourceBurst) {
			delete(l.sources, key)
		}
	}
}

// shedAll displaces all pending connections.
func (l *limits) shedAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.pending.Len() > 0 {
		l.evict(l.pending.Front())
	}
}
