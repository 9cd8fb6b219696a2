package relay

import (
	"context"
	"sync/atomic"
)

// Reason says why a connection or a datagram was refused; it is fit for a metric's label.
type Reason string

// Why something was refused.
const (
	RefusedUnknown     Reason = "unknown-service" // no such service port
	RefusedNoEndpoint  Reason = "no-endpoint"     // the service has none
	RefusedUnreachable Reason = "unreachable"     // no endpoint that was tried could be connected to
	RefusedLimit       Reason = "limit"           // too many open in total
	RefusedSourceLimit Reason = "source-limit"    // too many open from this source address
)

var reasons = [...]Reason{RefusedUnknown, RefusedNoEndpoint, RefusedUnreachable, RefusedLimit, RefusedSourceLimit}

// Stats is what the relay has done since New.
type Stats struct {
	TCP, UDP ProtocolStats
	// Listeners is the number of listening sockets: one per protocol and address family in
	// use.
	Listeners int
}

// ProtocolStats counts TCP connections or UDP sessions.
type ProtocolStats struct {
	Open    int               // now, including those that are being connected
	Total   uint64            // relayed to an endpoint, ever
	Refused map[Reason]uint64 // TCP: connections; UDP: datagrams; every reason is there
	// ClientBytes came from clients, EndpointBytes from endpoints; payload only.
	ClientBytes, EndpointBytes uint64
	// Dropped is UDP only: datagrams of a session that a full socket did not take.
	Dropped uint64
}

// counters are cheap enough for every datagram.
type counters struct {
	total                      atomic.Uint64
	refused                    [len(reasons)]atomic.Uint64
	clientBytes, endpointBytes atomic.Uint64
	dropped                    atomic.Uint64
}

func (c *counters) refuse(reason Reason) {
	for i, r := range reasons {
		if r == reason {
			c.refused[i].Add(1)
			return
		}
	}
}

func (c *counters) stats(open int) ProtocolStats {
	s := ProtocolStats{
		Open:          open,
		Total:         c.total.Load(),
		Refused:       make(map[Reason]uint64, len(reasons)),
		ClientBytes:   c.clientBytes.Load(),
		EndpointBytes: c.endpointBytes.Load(),
		Dropped:       c.dropped.Load(),
	}
	for i, r := range reasons {
		s.Refused[r] = c.refused[i].Load()
	}
	return s
}

// Observe reads the counters; it never fails while ctx lives.
func (r *Relay) Observe(ctx context.Context) (Stats, error) {
	if err := ctx.Err(); err != nil {
		return Stats{}, err
	}
	r.setMu.Lock()
	listeners := len(r.listeners)
	r.setMu.Unlock()
	return Stats{
		TCP:       r.tcp.stats(r.tcp.limit.open()),
		UDP:       r.udp.stats(r.udp.limit.open()),
		Listeners: listeners,
	}, nil
}
