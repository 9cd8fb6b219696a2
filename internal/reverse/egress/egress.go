// Package egress is where a control plane enters the reversed tunnel: HTTP CONNECT on a
// Unix socket or a loopback address, forwarded to whichever hub is alive.
package egress

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/connect"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// patience is how long a request waits for a first hub to be connected.
const patience = 5 * time.Second

// Options are what an egress is made of.
type Options struct {
	Links link.Options
	Hubs  []wire.HubAddress // to begin with
	Meter *meter.Meter
}

// Egress holds connections to all hubs. Make it with New.
type Egress struct {
	opts  Options
	links *link.Links
}

// New makes an egress.
func New(opts Options) *Egress {
	return &Egress{opts: opts, links: link.NewLinks(opts.Hubs, opts.Links)}
}

// Renew makes all connections anew, with the present certificate; streams of the old ones
// may go on until the given time.
func (e *Egress) Renew(until time.Time) { e.links.Renew(until) }

// Hubs are all that the egress knows of now.
func (e *Egress) Hubs() []wire.HubAddress { return e.links.Hubs() }

// Run keeps the connections until ctx ends, and then lets open streams go on for a while.
func (e *Egress) Run(ctx context.Context) error { return e.links.Run(ctx) }

// Ready reports whether at least one hub is connected.
func (e *Egress) Ready() error {
	if e.links.Ready() {
		return nil
	}
	if err := e.links.Problem(); err != nil {
		return err
	}
	return errors.New("not connected to any hub yet")
}

// Serve accepts clients on a listener until ctx ends.
func (e *Egress) Serve(ctx context.Context, l net.Listener) error {
	s := &connect.Server{Open: e.Open, HTTP: connect.Proxy(e.Open, e.opts.Meter), Meter: e.opts.Meter, Logger: e.opts.Links.Logger}
	return s.Serve(ctx, l, link.DrainTimeout)
}

// Open opens a stream to a target on the hub that does best.
func (e *Egress) Open(ctx context.Context, target string) (*mux.Stream, wire.Opened, *wire.Refusal) {
	t, refusal := policy.ParseTarget(target)
	if refusal != nil {
		return nil, wire.Opened{}, refusal
	}
	began := time.Now()
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		e.awaitHub(wait)
		timeout := link.DialTimeout - time.Since(began)
		st, answer, refusal := e.links.Open(ctx, wire.Open{Kind: wire.StreamTarget, Timeout: timeout, Target: t.String()}, wire.ReasonNoHub)
		if refusal == nil || refusal.Reason != wire.ReasonNoHub || wait.Err() != nil {
			return st, answer, refusal
		}
		// The hub that was there has gone away in between.
	}
}

// awaitHub waits until there is a hub, or ctx ends.
func (e *Egress) awaitHub(ctx context.Context) {
	for {
		changed := e.links.Changed()
		if e.links.Ready() {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
