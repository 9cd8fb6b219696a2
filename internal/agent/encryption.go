package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/cilium"
	"github.com/culvert-vpn/culvert/internal/guard"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/route"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

// EncryptionCluster is what the encryption between nodes needs of an API server; a Cluster
// that has none of it does not encrypt.
type EncryptionCluster interface {
	// APIServers are the listeners that hosts reach the API server by.
	APIServers(ctx context.Context) ([]netstate.Exemption, error)
	// Apply writes a NodeTunnel or the NodeEncryption, or with a subresource that part of it.
	Apply(ctx context.Context, object map[string]any, subresource string) error
}

// How often is looked: for API servers, and for peers while some have not answered.
const (
	askEvery   = 30 * time.Second
	soonEvery  = 500 * time.Millisecond
	hurryEvery = 200 * time.Millisecond // while a node changes its key
	aliveFor   = 3 * time.Minute        // a session ends then (REJECT_AFTER_TIME)
)

// encryption is the part of an agent that encrypts what its node says to others.
type encryption struct {
	log     *slog.Logger
	node    string
	dir     string // of the state; empty: nothing is encrypted
	ranges  []netip.Prefix
	cluster EncryptionCluster
	route   *route.Route
	guard   *guard.Guard
	chain   *chain
	heldErr error                // why pods of a booting node would not be held; as of the last turn
	wg      *wireguard.WireGuard // nil: nothing was to be encrypted yet
	keys    *keys

	exempt  []netstate.Exemption
	asked   time.Time
	devices []wireguard.Device // as last seen
	again   time.Duration      // when to look again; 0: when something happens
	told    map[string]bool    // kinds of plain packets that were reported
	plain   guard.Observation  // as last seen
	differs time.Time          // since when the NodeEncryption's status is not what it should be
	// cilium are the settings of the cluster's Cilium, as last read; nil: none.
	cilium      cilium.Settings
	ciliumAsked time.Time
	// present: there is a NodeEncryption, whether it could be read or not.
	present bool
	moved   bool // a route of others was moved
}

func newEncryption(o Options, r *route.Route) (*encryption, error) {
	e := &encryption{log: o.Logger, node: o.Node, dir: o.State, ranges: o.PodRanges, route: r, told: map[string]bool{}, chain: newChain(o.CNI)}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	e.cluster, _ = o.Cluster.(EncryptionCluster)
	file := ""
	if e.dir != "" {
		file = filepath.Join(e.dir, guard.FileName)
	}
	var err error
	e.guard, err = guard.New(guard.Options{File: file, Logger: e.log})
	return e, err
}

// restore puts up the guard from the disk, before anything else is asked or done.
func (e *encryption) restore(ctx context.Context) {
	if e.dir == "" {
		return
	}
	if _, err := e.guard.Restore(ctx); err != nil {
		e.log.Error("cannot restore the guard of the encryption between nodes", "error", err)
	}
}

// strict tells whether traffic between nodes must be encrypted or dropped, as far as the
// disk knows: then only a deleted NodeEncryption, or a person, takes the guard away. A guard
// that cannot be read counts as one.
func (e *encryption) strict() bool {
	g, err := e.guard.Saved()
	return err != nil || g != nil && g.Strict
}

// gather finds out what the planner needs to encrypt.
func (e *encryption) gather(ctx context.Context, n *node, objects model.Objects, pods []netip.Prefix) error {
	e.present, e.again = false, 0
	n.tunnels = map[string]*v1alpha1.NodeTunnel{}
	for _, d := range objects.All() {
		switch o := d.Object.(type) {
		case *v1alpha1.NodeEncryption:
			e.present, n.encryption = true, o
		case *v1alpha1.NodeTunnel:
			n.tunnels[o.Name] = o
		case *corev1.Node:
			if o.Name == e.node {
				n.uid = o.UID
			}
			if _, ok := o.Labels["node-role.kubernetes.io/control-plane"]; ok {
				n.controlPlane = append(n.controlPlane, model.ParseNode(o).Addresses...)
			}
		}
	}
	if n.model.NodeEncryption == nil {
		return nil
	}
	if e.dir == "" || e.cluster == nil {
		n.model.NodeEncryption = nil
		return errors.New("there is a NodeEncryption, and this agent has no directory to keep a key in: give it one with --state")
	}
	f := &n.facts.Encryption
	if err := e.askAPIServers(ctx); err != nil {
		return err
	}
	f.Exempt = slices.Concat(e.exempt, etcd(n.controlPlane))
	var err error
	if e.keys == nil {
		if e.keys, err = openKeys(e.dir); err != nil {
			return err
		}
	}
	own := n.tunnels[e.node]
	if err := e.keys.rotate(own, n.model.NodeEncryption.KeyLifetime, time.Now()); err != nil {
		return err
	}
	f.PrivateKey, f.PublicKey = e.keys.current()
	f.Pods = slices.Concat(e.ranges, pods)
	saved, err := e.guard.Saved()
	if err != nil {
		e.log.Warn("the guard on disk cannot be read: it is written anew", "error", err)
	}
	f.Enforced = saved != nil && saved.Strict
	if f.Local, f.Mismatch, err = localLinks(n.facts.Node, n.model.Nodes); err != nil {
		return err
	}
	if e.plain, err = e.guard.Observe(); err != nil {
		e.log.Warn("cannot read what the guard has counted", "error", err)
	}
	if f.Refused, f.Overlay = e.besideCilium(ctx); e.cilium != nil {
		f.Local = append(f.Local, ciliumInside...)
		if f.Loose, err = looseLinks(n.facts.Node); err != nil {
			return err
		}
	}
	e.observe(ctx, n)
	e.underlay(ctx, n)
	return nil
}

// askAPIServers finds the API servers from time to time. Those that were known last remain.
func (e *encryption) askAPIServers(ctx context.Context) error {
	if time.Since(e.asked) < askEvery && e.exempt != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	list, err := e.cluster.APIServers(ctx)
	if err == nil {
		e.exempt, e.asked = list, time.Now()
		return nil
	}
	if e.exempt == nil {
		if saved, _ := e.guard.Saved(); saved != nil {
			e.exempt = slices.DeleteFunc(saved.Exempt, func(x netstate.Exemption) bool { return x.Name == etcdName })
		}
	}
	if e.exempt == nil {
		return fmt.Errorf("find the API servers, which must be reached without encryption: %w", err)
	}
	return nil
}

const etcdName = "etcd"

// etcd of the control plane's nodes has TLS of its own.
func etcd(nodes []netip.Addr) []netstate.Exemption {
	var out []netstate.Exemption
	for _, a := range nodes {
		for _, port := range []uint16{2379, 2380} {
			out = append(out, netstate.Exemption{Name: etcdName, Protocol: netstate.TCP, Address: a, Port: port})
		}
	}
	return out
}

// observe tells which nodes have answered.
func (e *encryption) observe(ctx context.Context, n *node) {
	f := &n.facts.Encryption
	f.Alive, f.Met = map[netstate.Key]bool{}, map[netstate.Key]bool{}
	e.devices = nil
	if e.wg == nil {
		return
	}
	devices, err := e.wg.Observe(ctx)
	if err != nil {
		e.log.Warn("cannot read the WireGuard device between nodes", "error", err)
		return
	}
	e.devices = devices
	for _, d := range devices {
		for _, p := range d.Peers {
			f.Met[p.PublicKey] = !p.LastHandshake.IsZero()
			f.Alive[p.PublicKey] = time.Since(p.LastHandshake) < aliveFor
		}
	}
}

// underlay finds the smallest MTU of the ways to the other nodes.
func (e *encryption) underlay(ctx context.Context, n *node) {
	f := &n.facts.Encryption
	for _, o := range n.model.Nodes {
		if o.Name == e.node || len(o.Addresses) == 0 {
			continue
		}
		if u, err := e.route.Underlay(ctx, o.Addresses[0]); err == nil && (f.UnderlayMTU == 0 || u.MTU < f.UnderlayMTU) {
			f.UnderlayMTU = u.MTU
		}
	}
}

// before are the steps that come before all others: nothing leaves in the clear, whatever
// fails afterwards.
func (e *encryption) before(s netstate.State) []step {
	if s.Guard == nil {
		return nil
	}
	return []step{{"guard", func(ctx context.Context) (int, error) { return e.guard.Set(ctx, s.Guard) }}}
}

// after are the steps that come last: a guard that nobody wants any more goes when nothing is
// encrypted any more. One whose NodeEncryption is there, but cannot be read, stays. Pods wait
// for a guard as long as one is kept that drops.
func (e *encryption) after(s netstate.State) []step {
	hold := step{"cni", func(context.Context) (changed int, err error) {
		changed, err = e.hold()
		if was := e.heldErr; (was == nil) != (err == nil) {
			e.soon(soonEvery) // and tell
		}
		e.heldErr = err
		return changed, err
	}}
	if s.Guard != nil || e.present || e.dir == "" {
		return []step{hold}
	}
	return []step{{"guard", func(ctx context.Context) (int, error) {
		o, err := e.guard.Observe()
		if err != nil {
			return 0, err
		}
		saved, err := e.guard.Saved()
		if !o.Present && saved == nil && err == nil {
			return 0, nil
		}
		return 1, e.guard.Remove(ctx)
	}}, hold}
}

// hold has pods wait for the guard as long as one is kept that drops, unless Cilium would take
// our network configuration away as often as we wrote it.
func (e *encryption) hold() (int, error) {
	want := e.dir != "" && e.strict()
	if why := e.cilium.RefusesChain(); want && why != "" {
		changed, err := e.chain.Set(false)
		return changed, errors.Join(err, errors.New(why))
	}
	return e.chain.Set(want)
}

// localLinks are the links that pods are, or will be, attached to, and why the addresses of
// pods are not what the node's object says; empty: they are. A link with one of the node's
// addresses or a default route is none of them.
func localLinks(n model.Node, all []model.Node) (local []string, mismatch string, err error) {
	look, err := lookAtLinks(n)
	if err != nil {
		return nil, "", err
	}
	for _, pattern := range []string{"cni0", "cbr0", "cali*", "lxc*", "veth*", "azv*", "eni*"} {
		if !slices.ContainsFunc(look.uplinks, func(l string) bool { return matches(pattern, l) }) {
			local = append(local, pattern)
		}
	}
	for _, l := range look.toPods {
		if !slices.ContainsFunc(local, func(p string) bool { return matches(p, l) }) {
			local = append(local, l)
		}
	}
	if len(n.PodCIDRs) == 0 {
		return local, fmt.Sprintf("node %s has no spec.podCIDRs: which addresses are pods' is not known", n.Name), nil
	}
	for _, r := range look.routes {
		// A whole range of another node's is no pod's: Cilium has such routes on its own link.
		if slices.ContainsFunc(all, func(o model.Node) bool { return slices.Contains(o.PodCIDRs, r.to) }) {
			continue
		}
		if slices.ContainsFunc(local, func(p string) bool { return matches(p, r.link) }) &&
			!slices.ContainsFunc(n.PodCIDRs, func(c netip.Prefix) bool { return c.Overlaps(r.to) }) {
			return local, fmt.Sprintf("%s on %s of node %s is in none of its spec.podCIDRs, so that pods' traffic is not recognised: this network plugin assigns addresses in another way", r.to, r.link, n.Name), nil
		}
	}
	return local, "", nil
}

func matches(pattern, link string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(link, prefix)
	}
	return pattern == link
}

// makeDir makes the state directory.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// silent names the nodes that have not answered lately, and since when.
func (e *encryption) silent(r *plan.EncryptionResult) (names []string, last map[string]time.Time) {
	last = map[string]time.Time{}
	alive := map[string]bool{}
	for _, d := range e.devices {
		for _, p := range d.Peers {
			name := r.Peers[p.PublicKey]
			last[name] = p.LastHandshake
			alive[name] = time.Since(p.LastHandshake) < aliveFor
		}
	}
	for _, name := range r.Peers {
		if !alive[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, last
}
