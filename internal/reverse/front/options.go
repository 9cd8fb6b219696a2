package front

import (
	"cmp"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Options are limits and time-outs. The zero value is usable: every zero field means its
// default; a negative limit or rate means none.
type Options struct {
	// ProxyFrom are the sources whose connections must begin with a PROXY protocol header,
	// and are believed. From all others none is accepted.
	ProxyFrom []netip.Prefix

	// MaxConnections limits the connections that are relayed at a time; each takes two
	// file descriptors. The default is what the descriptors allow, at most 65,536.
	MaxConnections int
	// MaxConnectionsPerSource is for one address, or an IPv6 /64.
	MaxConnectionsPerSource int
	// MaxConnectionsPerTenant is for each tenant of the table, unless that says otherwise.
	MaxConnectionsPerTenant int
	// MaxPending and MaxPendingPerSource limit the connections that did not say yet where
	// to. One more displaces the oldest of them: whoever says it at once is not hindered by
	// those who do not, not even from behind the same NAT.
	MaxPending, MaxPendingPerSource int
	// Rates limit new connections: so many a second in the long run, and a burst at once.
	SourceRate, TenantRate   float64
	SourceBurst, TenantBurst int

	// HeaderTimeout is until a connection has said where to, from its begin.
	HeaderTimeout time.Duration
	// HandshakeTimeout is until the client has answered the backend's first bytes, as it
	// does in a TLS handshake, from the connection's begin; for a CONNECT request with
	// ContentTCP there is none.
	HandshakeTimeout time.Duration
	// IdleTimeout ends a connection on which nothing moved in either direction.
	IdleTimeout time.Duration
	// DialTimeout is for one backend; the next is tried then. DialBudget is for all.
	DialTimeout, DialBudget time.Duration

	// Access gets a record for every connection at its end; nil: none.
	Access *slog.Logger
	// Log gets what concerns the front as a whole; nil: none.
	Log *slog.Logger
}

// The defaults of Options.
const (
	DefaultMaxConnections          = 65536
	DefaultMaxConnectionsPerSource = 8192 // a NAT may hide a thousand spokes
	DefaultMaxConnectionsPerTenant = 8192
	DefaultMaxPending              = 4096
	DefaultMaxPendingPerSource     = 2048
	DefaultRate                    = 1000.0 // per second, of a source and of a tenant
	DefaultBurst                   = 8192   // of a source and of a tenant
	DefaultHeaderTimeout           = 5 * time.Second
	DefaultHandshakeTimeout        = 8 * time.Second
	DefaultIdleTimeout             = time.Hour
	DefaultDialTimeout             = 2 * time.Second
	DefaultDialBudget              = 5 * time.Second
)

// reserved are file descriptors that are not for connections: pipes of bulk transfers,
// listeners, name resolution, HTTP.
const reserved = 2*256 + 128

func (o Options) withDefaults() Options {
	files := descriptors()
	o.MaxPending = cmp.Or(o.MaxPending, min(DefaultMaxPending, files/4))
	o.MaxPendingPerSource = cmp.Or(o.MaxPendingPerSource, min(DefaultMaxPendingPerSource, max(o.MaxPending/2, 1)))
	o.MaxConnections = cmp.Or(o.MaxConnections, min(DefaultMaxConnections, max((files-reserved-o.MaxPending)/2, 64)))
	o.MaxConnectionsPerSource = cmp.Or(o.MaxConnectionsPerSource, DefaultMaxConnectionsPerSource)
	o.MaxConnectionsPerTenant = cmp.Or(o.MaxConnectionsPerTenant, DefaultMaxConnectionsPerTenant)
	o.SourceRate = cmp.Or(o.SourceRate, DefaultRate)
	o.TenantRate = cmp.Or(o.TenantRate, DefaultRate)
	o.SourceBurst = cmp.Or(o.SourceBurst, DefaultBurst)
	o.TenantBurst = cmp.Or(o.TenantBurst, DefaultBurst)
	o.HeaderTimeout = cmp.Or(o.HeaderTimeout, DefaultHeaderTimeout)
	o.HandshakeTimeout = cmp.Or(o.HandshakeTimeout, DefaultHandshakeTimeout)
	o.IdleTimeout = cmp.Or(o.IdleTimeout, DefaultIdleTimeout)
	o.DialTimeout = cmp.Or(o.DialTimeout, DefaultDialTimeout)
	o.DialBudget = cmp.Or(o.DialBudget, DefaultDialBudget)
	if o.Access == nil {
		o.Access = slog.New(slog.DiscardHandler)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// descriptors is how many file descriptors this process may have; Go's runtime raised the
// soft limit to the hard one.
func descriptors() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 1024
	}
	return int(min(limit.Cur, 1<<20))
}
