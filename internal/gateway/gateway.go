// Package gateway is the loop of "culvert gateway": gather, parse, plan, apply, report.
//
// Everything that decides lives below it: model says what the objects mean, plan what
// the host should look like. The loop owns the order of application, what survives a
// restart, and what is said about it.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/nft"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/relay"
	"github.com/culvert-vpn/culvert/internal/route"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/store"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

// Options say where a gateway finds its objects and keeps its state.
type Options struct {
	Manifests string // directory of manifests; empty: Cluster
	State     string // directory for keys, addresses, sockets
	// Name chooses among several VPNGateways: "name" or "namespace/name"; may be empty when
	// there is only one.
	Name string
	// Cluster is the API server that has the objects, when there are no Manifests.
	Cluster *Cluster
	// IPsecDir is the directory of an IKE daemon that others run (ipsec.Supervise); empty: a
	// daemon of our own, as a child.
	IPsecDir string
	// WireGuard and IPsec force a datapath; empty: found out.
	WireGuard wireguard.Datapath
	IPsec     netstate.IPsecDatapath
	// HTTP is where health and metrics are served, "address:port"; empty: nowhere.
	HTTP string
	// PProf serves profiles beside the metrics.
	PProf bool
	// KeepOnStop leaves links, routes and the IKE daemon as they are when the gateway
	// stops, for a successor to take over.
	KeepOnStop bool
	Logger     *slog.Logger
}

// How often things are looked at when nothing announces them.
const (
	observeEvery = time.Second
	resyncEvery  = 10 * time.Second
	retryEvery   = time.Second // what others are about to do
	resolveEvery = 30 * time.Second
)

// Gateway is one running gateway.
type Gateway struct {
	opts    Options
	log     *slog.Logger
	store   *store.Store
	backing backing

	wireguard *wireguard.WireGuard
	ipsec     *ipsec.IPsec
	nft       *nft.NFT
	route     *route.Route
	relay     *relay.Relay

	// Owned by the loop.
	good       source.Incumbents
	facts      plan.Facts
	names      resolver
	paths      paths
	problems   []ProblemReport
	account    account // what problems are made of, for the backing
	model      *model.Gateway
	active     bool // this process works, and is no standby
	planned    plan.Result
	nextChange time.Time
	failed     map[string]string // step → what is wrong with it now
	started    time.Time

	lastEndpoints  map[netstate.Key]netip.AddrPort
	endpointsDirty bool
	endpointsSaved time.Time

	beat atomic.Int64 // when the loop last turned, Unix seconds

	mu      sync.Mutex // guards what follows: read by HTTP handlers
	report  Report
	applied netstate.State // never changed once it is here
	behind  plan.Facts     // the facts behind applied; as little
	ready   error          // nil: ready
}

// Run runs a gateway until ctx ends; it then takes down what it made, unless KeepOnStop.
func Run(ctx context.Context, opts Options) error {
	g := &Gateway{opts: opts, log: opts.Logger, failed: map[string]string{}, started: time.Now(), paths: paths{changed: make(chan struct{}, 1)}}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	if err := g.open(); err != nil {
		return errors.Join(err, g.close())
	}
	g.ready = errors.New("nothing is applied yet")
	err := g.serve(ctx)
	return errors.Join(err, g.close())
}

// open takes the state directory and makes the appliers; nothing of the network is
// touched yet.
func (g *Gateway) open() error {
	if err := mayConfigureNetwork(); err != nil {
		return err
	}
	var err error
	if g.store, err = store.Open(g.opts.State); err != nil {
		return err
	}
	if err := lockSoon(g.store); err != nil {
		return err
	}
	if g.opts.Cluster != nil {
		g.backing = newCluster(g.opts, g.store, g.log)
		return g.openAppliers()
	}
	if g.backing, err = newDisk(g.opts.Manifests, g.store); err != nil {
		return err
	}
	if err := g.identify(context.Background(), nil); err != nil {
		return err
	}
	return g.openAppliers()
}

// identify learns the gateway's key, once.
func (g *Gateway) identify(ctx context.Context, gw *model.Gateway) error {
	if !g.facts.PrivateKey.IsZero() {
		return nil
	}
	id, err := g.backing.Identity(ctx, gw)
	if err != nil {
		return err
	}
	g.facts.PrivateKey, g.facts.PublicKey, g.facts.Endpoints = id.private, id.public, id.endpoints
	g.lastEndpoints = maps.Clone(id.endpoints)
	return nil
}

func (g *Gateway) openAppliers() error {
	var err error
	if g.facts.IPsecDatapath = g.opts.IPsec; g.facts.IPsecDatapath == "" {
		var why string
		if g.facts.IPsecDatapath, why, err = ipsec.DetectDatapath(); err != nil {
			return fmt.Errorf("find out who can encrypt ESP: %w", err)
		}
		g.log.Info("ipsec datapath", "datapath", g.facts.IPsecDatapath, "reason", why)
	}
	if g.wireguard, err = wireguard.New(wireguard.Options{Datapath: g.opts.WireGuard, Logger: g.log}); err != nil {
		return err
	}
	g.log.Info("wireguard datapath", "datapath", g.wireguard.Datapath())
	ike := ipsec.Options{Dir: g.store.RunDir() + "/ipsec", Logger: g.log}
	if g.opts.IPsecDir != "" {
		ike.Socket = ipsec.Socket(g.opts.IPsecDir)
	}
	if g.ipsec, err = ipsec.New(ike); err != nil {
		return err
	}
	if g.nft, err = nft.New(nft.Options{Logger: g.log}); err != nil {
		return err
	}
	if g.route, err = route.New(route.Options{}); err != nil {
		return err
	}
	g.relay = relay.New(relay.Options{Log: g.log})
	return nil
}

// step is one applier's part of a state.
type step struct {
	name string
	set  func(context.Context) (changed int, err error)
}

// steps is the order of application. The firewall is first: from then on a packet for a
// tunnel's range leaves through its tunnel or not at all, whatever else is missing.
func (g *Gateway) steps(s netstate.State) []step {
	return []step{
		{"firewall", func(ctx context.Context) (int, error) { return g.nft.SetFirewall(ctx, s.Firewall) }},
		{"sysctls", func(ctx context.Context) (int, error) { return g.route.SetSysctls(ctx, s.Sysctls) }},
		{"wireguard", func(ctx context.Context) (int, error) { return g.wireguard.Set(ctx, s.WireGuard) }},
		{"ipsec", func(ctx context.Context) (int, error) { return g.ipsec.Set(ctx, s.IPsec) }},
		{"links", func(ctx context.Context) (int, error) { return g.route.SetLinks(ctx, s.Links) }},
		{"routes", func(ctx context.Context) (int, error) { return g.route.SetRoutes(ctx, s.Routes, s.Rules) }},
		{"services", func(ctx context.Context) (int, error) { return g.nft.SetServices(ctx, s.Services) }},
		{"relay", func(ctx context.Context) (int, error) { return g.relay.Set(ctx, s.Services) }},
	}
}

// close undoes everything, or with KeepOnStop only lets go of it.
func (g *Gateway) close() error {
	var errs []error
	closeIf := func(name string, there bool, f func() error) {
		if !there {
			return
		}
		if err := f(); err != nil {
			errs = append(errs, fmt.Errorf("take down %s: %w", name, err))
		}
	}
	if !g.opts.KeepOnStop {
		closeIf("relay", g.relay != nil, func() error { return g.relay.Close() })
		closeIf("routes", g.route != nil, func() error { return g.route.Close() })
		closeIf("ipsec", g.ipsec != nil, func() error { return g.ipsec.Close() })
		closeIf("wireguard", g.wireguard != nil, func() error { return g.wireguard.Close() })
		closeIf("firewall", g.nft != nil, func() error { return g.nft.Close() })
	} else {
		closeIf("tunnels", g.backing != nil && g.relay != nil, func() error { g.standDown(); return nil })
		closeIf("routes", g.route != nil, func() error { return g.route.Detach() })
		closeIf("ipsec", g.ipsec != nil, func() error { g.ipsec.Release(); return nil })
	}
	closeIf("objects", g.backing != nil, func() error { return g.backing.Close() })
	closeIf("state", g.store != nil, func() error { return g.store.Close() })
	return errors.Join(errs...)
}

// serve runs the loop and the HTTP servers; the first to stop stops all.
func (g *Gateway) serve(ctx context.Context) error {
	g.beat.Store(time.Now().Unix())
	group := process.NewGroup(ctx)
	if err := g.listen(group); err != nil {
		group.Stop()
		return errors.Join(err, group.Wait())
	}
	group.Go("gateway", g.loop)
	if g.wireguard.Datapath() == wireguard.UserSpace {
		group.Go("threads", paceThreads)
	}
	return group.Wait()
}

// loop reconciles whenever something changed, and looks at the peers every second.
func (g *Gateway) loop(ctx context.Context) error {
	objects, err := g.backing.Watch(ctx)
	if err != nil {
		return err
	}
	links, err := g.route.Watch(ctx)
	if err != nil {
		return err
	}
	started := saveTime()
	g.names.start(ctx)
	defer g.paths.running.Wait()
	observe := time.NewTicker(observeEvery)
	defer observe.Stop()
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	change := time.NewTimer(0)
	defer change.Stop()

	for {
		g.beat.Store(time.Now().Unix())
		select {
		case <-ctx.Done():
			return nil
		case <-observe.C:
			g.observe(ctx)
			continue
		case <-g.ipsec.Events():
			g.observe(ctx)
		case <-objects:
		case <-links:
		case <-g.names.changed:
		case <-g.paths.changed:
		case <-resync.C:
		case <-change.C:
		}
		g.reconcile(ctx)
		g.observe(ctx)
		started(g.good.Count())
		if !g.nextChange.IsZero() {
			change.Reset(max(time.Until(g.nextChange), time.Millisecond))
		}
	}
}

// reconcile brings the host to what the objects say now.
func (g *Gateway) reconcile(ctx context.Context) {
	gw, known := g.gather()
	if !known {
		g.nextChange = time.Now().Add(retryEvery)
		return
	}
	active, known := g.backing.Active()
	if !known {
		g.nextChange = time.Now().Add(retryEvery)
		return
	}
	if active && !g.active {
		g.takeOver(ctx, gw)
	}
	g.active = active
	state, result := netstate.State{}, plan.Result{}
	if gw != nil {
		var err error
		result, err = g.plan(ctx, gw)
		if g.check("plan", err); err != nil {
			g.nextChange = time.Now().Add(retryEvery)
			return
		}
		if state = result.State; !active {
			state = plan.Standby(state)
		}
	}
	g.nextChange = result.NextChange
	g.apply(ctx, state)
	if now, _ := g.backing.Active(); now != active { // the other way round, at once
		g.nextChange = time.Now()
	}
	if g.check("probes", g.paths.set(ctx, gw, active)); !active {
		g.paths.active = nil
	}
	g.check("state", g.backing.Save())
	if g.failed["sysctls"] != "" || g.opts.IPsecDir != "" && g.failed["ipsec"] != "" {
		// In a pod others set the one, and start the other.
		g.nextChange = earliest(g.nextChange, time.Now().Add(retryEvery))
	}
	g.publish(gw, result, state)
}

// takeOver learns where the peers were last seen: another process may have worked since.
func (g *Gateway) takeOver(ctx context.Context, gw *model.Gateway) {
	if g.facts.PrivateKey.IsZero() { // identify does
		return
	}
	id, err := g.backing.Identity(ctx, gw)
	if err != nil {
		g.log.Warn("cannot read where the peers were last seen", "error", err)
		return
	}
	g.facts.Endpoints, g.lastEndpoints = id.endpoints, maps.Clone(id.endpoints)
}

// standDown takes the tunnels down before the process ends, when another one goes on: the
// IKE daemon outlives this process, and must not answer beside the other's.
func (g *Gateway) standDown() {
	if g.model == nil || !g.active || !g.backing.Contested() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), standDownTimeout)
	defer cancel()
	g.apply(ctx, plan.Standby(g.planned.State))
}

// standDownTimeout leaves another process that waits for the Lease enough of its time.
const standDownTimeout = time.Second

// earliest is the first of two times, of which the zero one is never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// apply runs all steps, also after one failed: what can be in effect is.
func (g *Gateway) apply(ctx context.Context, s netstate.State) {
	for _, st := range g.steps(s) {
		if now, _ := g.backing.Active(); now != g.active {
			return // somebody else does this by now, or is to
		}
		if g.backing.WithoutServices() && (st.name == "services" || st.name == "relay") {
			continue
		}
		changed, err := st.set(ctx)
		g.check(st.name, err)
		if changed > 0 {
			g.log.Info("applied", "step", st.name, "changes", changed)
		}
	}
}

// check keeps the outcome of a step for the report, until the step's next one, and logs a
// failure once.
func (g *Gateway) check(step string, err error) {
	before := g.failed[step]
	switch {
	case err == nil && before == "":
		return
	case err == nil:
		g.log.Info("works again", "step", step)
		delete(g.failed, step)
	case before == err.Error():
		return
	default:
		g.log.Error("failed", "step", step, "error", err)
		g.failed[step] = err.Error()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.report.Errors = maps.Clone(g.failed)
	g.ready = notReady(g.report)
}
