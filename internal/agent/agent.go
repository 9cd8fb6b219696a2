// Package agent is the loop of "culvert agent", which runs on every node of a cluster:
// gather, parse, plan, apply, report.
//
// It leads what is for sites and devices to the gateway pods, and sets the kernel settings
// of those that run on its node. What the node should look like is decided by plan.Node;
// the loop owns the order of application, and what stays when it ends.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/cni"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/nft"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/route"
	"github.com/culvert-vpn/culvert/internal/source"
)

// Options say for which node an agent works.
type Options struct {
	Node    string // the name of its Node
	Cluster Cluster
	// State is a directory that outlives the agent and the host's restart: it holds the key
	// and the guard of the encryption between nodes. Empty: nothing is encrypted.
	State string
	// PodRanges are ranges of the cluster's pods, in addition to those that Nodes and
	// VPNGateways name: nothing leaves the node for them in the clear.
	PodRanges []netip.Prefix
	// CNI says where the node's network configurations are: while plain packets are dropped,
	// no pod gets a network before the guard stands. Nil: pods do not wait.
	CNI *cni.Options
	// CiliumSocket is the one of the node's Cilium agent, for gateways with nodeLink: CiliumEndpoint;
	// empty: there are none.
	CiliumSocket string
	// HTTP is where health and metrics are served, "address:port"; empty: nowhere.
	HTTP string
	// PProf serves profiles beside the metrics.
	PProf  bool
	Logger *slog.Logger
}

// Cluster is what an agent needs of an API server; NewKubernetes makes one.
type Cluster interface {
	// Watch reports changes of the objects until ctx ends; the first report is when all
	// have been read.
	Watch(ctx context.Context) (<-chan struct{}, error)
	// Read takes a snapshot of VPNGateways, Sites and the own Node.
	Read() (model.Objects, []model.Problem, error)
	// SetLinkAddresses makes these the Node's model.LinkAddressesAnnotation.
	SetLinkAddresses(ctx context.Context, node string, addrs []netip.Addr) error
	// Removed tells whether the agent is stopped because it is removed from the cluster, as
	// opposed to being restarted or upgraded.
	Removed(ctx context.Context) (bool, error)
}

// Mover is a Cluster that is told when the node's links or addresses may have changed, so
// that it need not wait for what was sent from an address that is gone.
type Mover interface{ Moved() }

const (
	// resyncEvery is when the node is looked at although nothing was heard: of what is done to
	// the guard, and to peers, by hand nobody tells.
	resyncEvery = 5 * time.Second
	// removedTimeout is how long an agent that is stopped asks whether it is removed: well
	// within a pod's grace period.
	removedTimeout = 10 * time.Second
	callTimeout    = 5 * time.Second
)

// Agent is one running agent.
type Agent struct {
	opts  Options
	log   *slog.Logger
	nft   *nft.NFT
	route *route.Route
	pods  *pods

	sources *sources

	encryption *encryption

	// Owned by the loop.
	good   source.Incumbents
	failed map[string]string // step → what is wrong with it now
	said   map[string]string // object → what was last logged about it

	beat atomic.Int64 // when the loop last turned, Unix seconds

	mu     sync.Mutex // guards what follows: read by HTTP handlers
	report Report
	ready  error // nil: ready
}

// Run runs an agent until ctx ends. What it made stays, for its successor and so that
// traffic goes on meanwhile, unless it is being removed from the cluster; a strict guard
// stays even then.
func Run(ctx context.Context, opts Options) error {
	a := &Agent{opts: opts, log: opts.Logger, failed: map[string]string{}, said: map[string]string{}}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	a.ready = errors.New("nothing is applied yet")
	if err := a.open(); err != nil {
		return err
	}
	a.encryption.restore(ctx)
	err := a.serve(ctx)
	return errors.Join(err, a.end())
}

func (a *Agent) open() error {
	var err error
	if a.nft, err = nft.New(nft.Options{Logger: a.log}); err != nil {
		return err
	}
	if a.route, err = route.New(route.Options{FollowedLink: netstate.EncryptionLink}); err != nil {
		return err
	}
	a.pods = newPods(a.route)
	a.sources = newSources(a.opts.CiliumSocket, a.log)
	a.encryption, err = newEncryption(a.opts, a.route)
	return err
}

// Cleanup removes from this host everything that an agent makes, and what it keeps in its
// state directory but for the key. Of opts it needs Logger, State and CNI.
func Cleanup(opts Options) error {
	a := &Agent{log: opts.Logger, opts: opts}
	if err := a.open(); err != nil {
		return err
	}
	return a.remove()
}

// remove takes everything down; routes and links before what guards them.
func (a *Agent) remove() error {
	_, err := a.encryption.chain.Set(false)
	return errors.Join(err, a.sources.remove(), a.encryption.remove(), a.route.Close(), a.nft.Close(), a.encryption.guard.Remove(context.Background()))
}

// end lets go of everything, or removes it.
func (a *Agent) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), removedTimeout)
	defer cancel()
	removed, err := a.opts.Cluster.Removed(ctx)
	if err != nil {
		a.log.Warn("cannot find out whether the agent is being removed: what it made stays; 'culvert agent cleanup' removes it", "error", err)
	}
	if !removed {
		return a.route.Detach()
	}
	if a.encryption.strict() {
		a.log.Warn("removed from the cluster while NodeEncryption is Strict: the guard and everything else stay, and traffic between nodes is dropped; " +
			"run 'culvert agent cleanup' on this node, or install again and delete the NodeEncryption first")
		return a.route.Detach()
	}
	a.log.Info("removed from the cluster: taking everything down")
	return a.remove()
}

// serve runs the loop and the HTTP server; the first to stop stops both.
func (a *Agent) serve(ctx context.Context) error {
	a.beat.Store(time.Now().Unix())
	group := process.NewGroup(ctx)
	if err := a.listen(group); err != nil {
		group.Stop()
		return errors.Join(err, group.Wait())
	}
	group.Go("agent", a.loop)
	group.Go("sources", a.sources.run)
	return group.Wait()
}

// loop reconciles whenever something changed.
func (a *Agent) loop(ctx context.Context) error {
	objects, err := a.opts.Cluster.Watch(ctx)
	if err != nil {
		return err
	}
	links, err := a.route.Watch(ctx)
	if err != nil {
		return err
	}
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	defer a.encryption.chain.Close()
	for {
		a.beat.Store(time.Now().Unix())
		var again <-chan time.Time
		if d := a.encryption.again; d > 0 {
			again = time.After(d)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-objects:
		case <-links:
			a.moved()
		case <-a.encryption.chain.Changes():
		case <-resync.C:
			a.moved()
		case <-again:
		}
		a.reconcile(ctx)
	}
}

func (a *Agent) moved() {
	if m, ok := a.opts.Cluster.(Mover); ok {
		m.Moved()
	}
}

// reconcile brings the node to what the objects say now. As long as they are not read
// completely, what a predecessor left stays.
func (a *Agent) reconcile(ctx context.Context) {
	n, err := a.gather(ctx)
	if a.check("objects", err); err != nil {
		return
	}
	result := plan.Node(n.model, n.facts)
	a.apply(ctx, a.steps(result, n))
	a.encryption.watchPeers(n, result.Encryption)
	a.publish(ctx, n, result)
}

// step is one part of the work.
type step struct {
	name string
	set  func(context.Context) (changed int, err error)
}

// steps is the order of application. What guards is first: nothing leaves in the clear,
// arrives over a link that is not guarded, or leaves by a route with another address.
func (a *Agent) steps(result plan.NodeResult, n node) []step {
	s := result.State
	first := append(a.encryption.before(s), step{"firewall", func(ctx context.Context) (int, error) { return a.nft.SetFirewall(ctx, s.Firewall) }})
	return slices.Concat(first, a.encryption.device(s), []step{
		{"links", func(ctx context.Context) (int, error) { return a.route.SetLinks(ctx, s.Links) }},
		{"routes", func(ctx context.Context) (int, error) { return a.route.SetRoutes(ctx, s.Routes, s.Rules) }},
		{"pods", func(ctx context.Context) (int, error) { return a.pods.set(ctx, n.local, plan.GatewayPodSysctls()) }},
		{"source verification", func(context.Context) (int, error) { return a.sources.set(n) }},
		{"addresses", func(ctx context.Context) (int, error) { return a.setLinkAddresses(ctx, n) }},
		{"node tunnel", func(ctx context.Context) (int, error) { return a.encryption.tell(ctx, n, result.Encryption) }},
	}, a.encryption.after(s))
}

// apply runs all steps, also after one failed: what can be in effect is.
func (a *Agent) apply(ctx context.Context, steps []step) {
	for _, st := range steps {
		changed, err := st.set(ctx)
		a.check(st.name, err)
		if changed > 0 {
			a.log.Info("applied", "step", st.name, "changes", changed)
		}
	}
}

// setLinkAddresses tells the gateways by which other addresses this node sends to them.
func (a *Agent) setLinkAddresses(ctx context.Context, n node) (int, error) {
	if slices.Equal(n.linkAddresses, n.facts.Node.LinkAddresses) {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := a.opts.Cluster.SetLinkAddresses(ctx, a.opts.Node, n.linkAddresses); err != nil {
		return 0, fmt.Errorf("tell the gateways about %v: %w", n.linkAddresses, err)
	}
	return 1, nil
}

// check keeps the outcome of a step for the report, and logs a failure once.
func (a *Agent) check(step string, err error) {
	before := a.failed[step]
	switch {
	case err == nil && before == "":
		return
	case err == nil:
		a.log.Info("works again", "step", step)
		delete(a.failed, step)
	case before == err.Error():
		return
	default:
		a.log.Error("failed", "step", step, "error", err)
		a.failed[step] = err.Error()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.report.Errors = maps.Clone(a.failed)
}
