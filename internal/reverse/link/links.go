package link

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 2 * time.Second
	// firstBusy and lastBusy are the same after an attempt that a hub was too busy for.
	firstBusy = 4 * time.Second
	lastBusy  = 16 * time.Second
	// shrinkAfter is how long a connection beyond the least number stays without streams.
	shrinkAfter = time.Minute
	// DrainTimeout is how long streams may go on after a go-away.
	DrainTimeout = 60 * time.Second
)

// Options are how Links connects to hubs.
type Options struct {
	Dialer *Dialer
	// TLS makes the configuration for one connection.
	TLS func(serverName string) *tls.Config
	// Hello is what is said first.
	Hello wire.Hello
	// Welcome is called with each message of a hub; may be nil.
	Welcome func(wire.Welcome)
	// Accept takes streams that a hub opens; nil: they are reset.
	Accept func(*mux.Stream)
	// Least and Most are how many connections there are to each hub.
	Least, Most int
	Logger      *slog.Logger
	Meter       *meter.Meter
}

// Links keeps connections to every hub and reconnects for ever. Make it with NewLinks.
type Links struct {
	Pool
	opts Options

	lmu     sync.Mutex
	hubs    []wire.HubAddress
	working map[wire.HubAddress]context.CancelFunc
	kick    chan struct{}
	failed  map[string]string // last error by server name; absent: connected
	renewed chan struct{}     // closed when sessions are to be made anew
	expires time.Time         // until when the old ones may be used
}

// NewLinks makes Links that begin with the given hubs; what hubs say replaces them.
func NewLinks(hubs []wire.HubAddress, opts Options) *Links {
	return &Links{opts: opts, hubs: hubs, working: map[wire.HubAddress]context.CancelFunc{}, kick: make(chan struct{}, 1), failed: map[string]string{}, renewed: make(chan struct{})}
}

// Hubs are the present ones.
func (l *Links) Hubs() []wire.HubAddress {
	l.lmu.Lock()
	defer l.lmu.Unlock()
	return slices.Clone(l.hubs)
}

// Problem says why a hub has no connection, one line for all; nil: each has one.
func (l *Links) Problem() error {
	l.lmu.Lock()
	defer l.lmu.Unlock()
	for _, h := range l.hubs {
		if why, ok := l.failed[h.ServerName]; ok {
			return fmt.Errorf("hub %s at %s: %s", h.ServerName, h.Address, why)
		}
	}
	return nil
}

// Renew makes all sessions anew, with what Options.TLS gives now. Streams of the present
// ones may go on until the given time.
func (l *Links) Renew(until time.Time) {
	l.lmu.Lock()
	defer l.lmu.Unlock()
	l.expires = until
	close(l.renewed)
	l.renewed = make(chan struct{})
}

func (l *Links) onRenew() <-chan struct{} {
	l.lmu.Lock()
	defer l.lmu.Unlock()
	return l.renewed
}

func (l *Links) oldUntil() time.Time {
	l.lmu.Lock()
	defer l.lmu.Unlock()
	return l.expires
}

// Run connects until ctx ends; then it asks the hubs to open no more streams and waits for
// those that are open, for DrainTimeout at most.
func (l *Links) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	// Connections outlive ctx while they drain.
	alive, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	for ctx.Err() == nil {
		l.lmu.Lock()
		for h, stop := range l.working {
			if !slices.Contains(l.hubs, h) {
				stop()
				delete(l.working, h)
				delete(l.failed, h.ServerName)
			}
		}
		for _, h := range l.hubs {
			if l.working[h] == nil {
				one, stop := context.WithCancel(ctx)
				l.working[h] = stop
				wg.Go(func() { l.serve(one, alive, h) })
			}
		}
		l.lmu.Unlock()
		select {
		case <-ctx.Done():
		case <-l.kick:
		}
	}
	drained := make(chan struct{})
	go func() { wg.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(DrainTimeout):
		kill()
		<-drained
	}
	l.lmu.Lock()
	defer l.lmu.Unlock()
	for _, stop := range l.working {
		stop()
	}
	return nil
}

// learn takes over what a hub says of all hubs. An empty list changes nothing.
func (l *Links) learn(w wire.Welcome) {
	l.lmu.Lock()
	if len(w.Hubs) > 0 && !slices.Equal(l.hubs, w.Hubs) {
		l.hubs = w.Hubs
		select {
		case l.kick <- struct{}{}:
		default:
		}
	}
	l.lmu.Unlock()
	if l.opts.Welcome != nil {
		l.opts.Welcome(w)
	}
}

// serve keeps the connections to one hub until ctx ends; alive ends them all.
func (l *Links) serve(ctx, alive context.Context, hub wire.HubAddress) {
	k := &keeper{links: l, hub: hub, ctx: ctx, alive: alive, spare: map[*mux.Session]*spare{}}
	var wg sync.WaitGroup
	for range l.opts.Least {
		wg.Go(func() { k.always() })
	}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-ticker.C:
			if k.grow() {
				wg.Go(func() { k.once() })
			}
		}
	}
	wg.Wait()
}
