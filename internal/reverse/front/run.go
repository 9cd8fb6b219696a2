package front

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/process"
)

// RunOptions are what a front's process needs.
type RunOptions struct {
	Options // its loggers are made from Logger and AccessLog

	Routes string   // file with the Table, followed
	Source Source   // takes the place of Routes; nil: the file
	Listen []string // addresses that take both TLS and CONNECT: "host:port", ":port"
	HTTP   string   // address for /healthz, /readyz and /metrics; empty: none
	PProf  bool

	// DrainDelay is from the signal to stop until new connections are refused: /readyz says
	// no meanwhile, so that load balancers look elsewhere. DrainTimeout is from then on
	// until the remaining connections are reset.
	DrainDelay, DrainTimeout time.Duration

	Logger    *slog.Logger
	AccessLog io.Writer // a JSON object per connection and line; nil: none
}

// Source is where a table comes from.
type Source interface {
	// Read returns the table when it is not as it was read last.
	Read() (t Table, changed bool, err error)
	// Watch calls look whenever the table may have changed, until ctx ends.
	Watch(ctx context.Context, look func()) error
}

// Run runs a front until ctx ends, and then until it is drained. A table that is wrong at
// the start is an error; later the last good one stays in effect.
func Run(ctx context.Context, o RunOptions) error {
	source := o.Source
	if source == nil {
		source = &file{path: o.Routes}
	}
	table, _, err := source.Read()
	if err != nil {
		return fmt.Errorf("routing table: %w", err)
	}
	o.Log = o.Logger
	if o.AccessLog != nil {
		o.Access = slog.New(slog.NewJSONHandler(o.AccessLog, nil))
	}
	f := New(o.Options)
	defer func() { _ = f.Close() }()
	if _, err := f.Set(ctx, table); err != nil {
		return err
	}
	listeners, err := listen(ctx, o.Listen)
	if err != nil {
		return err
	}
	// The parts outlive ctx until the front is drained.
	g := process.NewGroup(context.WithoutCancel(ctx))
	var stopping atomic.Bool
	if err := serveHTTP(g, f, o, &stopping); err != nil {
		closeAll(listeners)
		return err
	}
	g.Go("routing table", func(ctx context.Context) error {
		said := "" // what was wrong with it last
		return source.Watch(ctx, func() { f.reload(ctx, source, &said) })
	})
	g.Go("front", func(context.Context) error {
		return f.run(ctx, listeners, o, &stopping)
	})
	o.Logger.Info("front is up", "listen", o.Listen, "routes", len(table.Routes), "maxConnections", f.opts.MaxConnections)
	return g.Wait()
}

func listen(ctx context.Context, addresses []string) ([]*net.TCPListener, error) {
	var listeners []*net.TCPListener
	for _, address := range addresses {
		l, err := Listen(ctx, address)
		if err != nil {
			closeAll(listeners)
			return nil, err
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

func closeAll(listeners []*net.TCPListener) {
	for _, l := range listeners {
		_ = l.Close()
	}
}

func serveHTTP(g *process.Group, f *Front, o RunOptions, stopping *atomic.Bool) error {
	if o.HTTP == "" {
		return nil
	}
	health := process.NewHealth()
	health.AddReady("front", func() error {
		if stopping.Load() {
			return errors.New("stopping: takes no new connections")
		}
		return nil
	})
	registry := process.NewRegistry()
	registry.MustRegister(f.Metrics())
	if err := process.ServeTCP(g, o.HTTP, process.Mux(health, registry, o.PProf)); err != nil {
		g.Stop()
		return errors.Join(err, g.Wait())
	}
	return nil
}

// run serves until ctx ends, then drains.
func (f *Front) run(ctx context.Context, listeners []*net.TCPListener, o RunOptions, stopping *atomic.Bool) error {
	accepting, stopAccepting := context.WithCancel(context.WithoutCancel(ctx))
	defer stopAccepting()
	var wg sync.WaitGroup
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		wg.Go(func() {
			if err := f.Serve(accepting, l); err != nil {
				failed <- err
			}
		})
	}
	select {
	case err := <-failed:
		stopAccepting()
		wg.Wait()
		return err
	case <-ctx.Done():
	}
	stopping.Store(true)
	sleep(o.DrainDelay)
	stopAccepting()
	wg.Wait()
	open, _ := f.Counts()
	o.Logger.Info("draining", "connections", open, "timeout", o.DrainTimeout)
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.DrainTimeout)
	defer cancel()
	f.Drain(drain)
	if open, _ := f.Counts(); open > 0 {
		o.Logger.Warn("drain timeout: the remaining connections are reset", "connections", open)
	}
	return f.Close()
}

func sleep(d time.Duration) {
	if d > 0 {
		time.Sleep(d)
	}
}

// reload puts the table into effect if it has changed and is good.
func (f *Front) reload(ctx context.Context, source Source, said *string) {
	table, changed, err := source.Read()
	if !changed {
		return
	}
	var routes int
	if err == nil {
		routes, err = f.Set(ctx, table)
	}
	if err != nil {
		f.metrics.refusedT.Set(1)
		if text := err.Error(); text != *said {
			*said = text
			f.opts.Log.Error("the routing table is not in effect; the last good one stays", "error", err)
		}
		return
	}
	*said = ""
	f.metrics.refusedT.Set(0)
	f.opts.Log.Info("routing table in effect", "routes", len(table.Routes), "changed", routes)
}
