// Package spoke is the remote cluster's end of the reversed tunnel: it dials out to the
// hubs, and connects to local targets that its own policy allows. It offers the exports of
// the hub's side as local listeners.
package spoke

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/dial"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// maxDials is how many dials may be under way at once.
const maxDials = 2048

// Options are what a spoke is made of.
type Options struct {
	// Links says how hubs are reached; Accept and Welcome are the spoke's own.
	Links  link.Options
	Hubs   []wire.HubAddress // to begin with
	Dialer dial.Dialer
	Logger *slog.Logger
	Meter  *meter.Meter
	// Listen opens the listeners of exports; nil: net.ListenConfig.
	Listen func(ctx context.Context, network, address string) (net.Listener, error)
}

// Spoke is one spoke. Make it with New.
type Spoke struct {
	opts   Options
	links  *link.Links
	policy atomic.Pointer[policy.Policy]
	dials  chan struct{}

	mu      sync.Mutex
	ctx     context.Context
	exports map[wire.Listener]*export
	wanted  []wire.Listener
	problem map[wire.Listener]error
}

// New makes a spoke that allows nothing until SetPolicy is called.
func New(opts Options) *Spoke {
	s := &Spoke{opts: opts, dials: make(chan struct{}, maxDials), exports: map[wire.Listener]*export{}, problem: map[wire.Listener]error{}}
	s.policy.Store(&policy.Policy{})
	if s.opts.Listen == nil {
		s.opts.Listen = (&net.ListenConfig{}).Listen
	}
	o := opts.Links
	o.Accept, o.Welcome = s.accept, s.welcome
	s.links = link.NewLinks(opts.Hubs, o)
	return s
}

// SetPolicy puts the spoke's own policy into effect, for new streams.
func (s *Spoke) SetPolicy(p *policy.Policy) { s.policy.Store(p) }

// Renew makes all connections anew, with the present certificate; streams of the old ones
// may go on until the given time.
func (s *Spoke) Renew(until time.Time) { s.links.Renew(until) }

// Hubs are all that the spoke knows of now.
func (s *Spoke) Hubs() []wire.HubAddress { return s.links.Hubs() }

// Ready reports whether at least one hub is connected.
func (s *Spoke) Ready() error {
	if s.links.Ready() {
		return nil
	}
	if err := s.links.Problem(); err != nil {
		return err
	}
	return fmt.Errorf("not connected to any hub yet")
}

// Run runs the spoke until ctx ends, and then lets open streams go on for a while.
func (s *Spoke) Run(ctx context.Context) error {
	alive, kill := context.WithCancel(context.WithoutCancel(ctx))
	s.mu.Lock()
	s.ctx = alive
	s.mu.Unlock()
	s.follow()
	err := s.links.Run(ctx)
	kill()
	s.mu.Lock()
	exports := s.exports
	s.exports = map[wire.Listener]*export{}
	s.ctx = nil
	s.mu.Unlock()
	for _, e := range exports {
		e.close()
	}
	return err
}

// accept serves a stream that a hub opened.
func (s *Spoke) accept(st *mux.Stream) {
	open, err := wire.ParseOpen(st.Header())
	if err != nil || open.Kind != wire.StreamTarget {
		s.refuse(st, wire.Refuse(wire.ReasonMalformed, "the spoke does not know such a stream"))
		return
	}
	t, refusal := policy.ParseTarget(open.Target)
	if refusal == nil {
		refusal = s.policy.Load().Check(t)
	}
	if refusal != nil {
		s.opts.Logger.Warn("refused", "target", wire.Line(open.Target), "reason", refusal.Reason, "error", refusal)
		s.refuse(st, refusal)
		return
	}
	select {
	case s.dials <- struct{}{}:
	default:
		s.refuse(st, wire.Refuse(wire.ReasonBusy, "the spoke dials %d targets already", maxDials))
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	stop := st.OnEnd(cancel)
	conn, took, refusal := s.opts.Dialer.Target(ctx, t, open.Timeout)
	stop()
	cancel()
	<-s.dials
	if refusal != nil {
		s.refuse(st, refusal)
		return
	}
	s.opts.Meter.Opened("target", took, 0)
	if err := st.Accept(wire.Opened{Dial: took}.Append(nil)); err != nil {
		_, _ = conn.Close(), st.Close()
		s.opts.Meter.Closed(0, 0, mux.Cause(err))
		return
	}
	from, to, err := mux.Relay(conn, st)
	meter.LogCut(s.opts.Logger, t.String(), mux.Cause(err))
	s.opts.Meter.Closed(to, from, mux.Cause(err))
}

func (s *Spoke) refuse(st *mux.Stream, r *wire.Refusal) {
	s.opts.Meter.Refused(r.Reason)
	st.Reset(r.Append(nil))
}

// openExport opens a stream to an export of the hub's side.
func (s *Spoke) openExport(ctx context.Context, name string) (*mux.Stream, wire.Opened, *wire.Refusal) {
	open := wire.Open{Kind: wire.StreamExport, Timeout: link.DialTimeout, Target: name}
	return s.links.Open(ctx, open, wire.ReasonNoHub)
}

// serveExport joins a local connection with a stream.
func (s *Spoke) serveExport(ctx context.Context, l wire.Listener, conn net.Conn) {
	both, ok := conn.(mux.Conn)
	if !ok {
		_ = conn.Close()
		return
	}
	began := time.Now()
	st, opened, refusal := s.openExport(ctx, l.Name)
	if refusal != nil {
		s.opts.Meter.Refused(refusal.Reason)
		s.opts.Logger.Warn("export refused", "export", l.Name, "reason", refusal.Reason, "error", refusal)
		mux.Cut(both)
		return
	}
	s.opts.Meter.Opened("export", opened.Dial, time.Since(began))
	to, from, err := mux.Relay(both, st)
	s.opts.Meter.Closed(to, from, mux.Cause(err))
}
