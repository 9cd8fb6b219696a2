package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	proxyproto "github.com/pires/go-proxyproto"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/reverse/hub"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
	"github.com/culvert-vpn/culvert/internal/source/manifests"
)

// HubOptions are those of "culvert hub".
type HubOptions struct {
	Common
	Manifests string // directory
	State     string // directory
	Name      string // which RemoteCluster; empty: the only one
	Replica   int    // which of its hubs this is, from 0
	Spokes    string // address to listen on for spokes
	Clients   string // address to listen on for clients
	// Addresses are where spokes reach the hubs, one for all or one for each; empty:
	// spec.front.address.
	Addresses []string
	// ClientAddresses are where clients do; empty: this host's, for a single replica.
	ClientAddresses []string
	// Names are more names and addresses for the hub's certificate.
	Names []string
	// ProxyProtocolFrom are whose PROXY protocol headers are believed.
	ProxyProtocolFrom []netip.Prefix
	// Lifetimes are those of the certificates that it issues.
	Lifetimes pki.Lifetimes
	// Cluster, when it is not nil, takes the place of Manifests, State and Replica.
	Cluster *HubPod
}

// objects is where the RemoteCluster comes from.
type objects interface {
	// Find is the object as it stands now.
	Find() (*model.RemoteCluster, error)
	// Watch says, until ctx ends, when to look again.
	Watch(ctx context.Context) (<-chan struct{}, error)
}

// manifestFiles are objects in files.
type manifestFiles struct {
	*manifests.Files
	name string // which RemoteCluster
}

func (f *manifestFiles) Find() (*model.RemoteCluster, error) {
	return FindRemoteCluster(f.Files, f.name)
}

// hubLoop is a running hub.
type hubLoop struct {
	opts   HubOptions
	source objects
	state  *State
	uid    string
	holder identity.Holder
	hub    *hub.Hub
	meter  *meter.Meter

	mu      sync.Mutex
	cluster *model.RemoteCluster
	problem string
	revoked time.Time // of the file
}

// RunHub runs one replica until ctx ends, and then lets open streams end for a while.
func RunHub(ctx context.Context, opts HubOptions) error {
	if err := opts.Lifetimes.Check(); err != nil {
		return err
	}
	h := &hubLoop{opts: opts}
	c, err := h.begin(ctx)
	if err != nil {
		return err
	}
	if h.opts.Replica < 0 || h.opts.Replica >= c.Replicas {
		return fmt.Errorf("replica %d: RemoteCluster %s has the replicas 0 to %d: see spec.hub.replicas", h.opts.Replica, c.ID, c.Replicas-1)
	}
	h.state.Lifetimes = opts.Lifetimes
	if h.uid, err = h.state.UID(c.UID); err != nil {
		return err
	}
	registry := process.NewRegistry()
	h.meter = meter.New(registry, "hub", c.ID.String())
	h.hub = hub.New(hub.Options{
		Holder: &h.holder, Version: process.Version(), Logger: opts.Logger, Meter: h.meter,
		Joiner: &joiner{state: h.state, uid: h.uid, hubs: h.hubsFor},
	})
	if err := h.apply(c); err != nil {
		return err
	}
	if err := h.credentials(); err != nil {
		return err
	}
	// Followed before anything is served, so that no change is missed.
	changed, err := h.source.Watch(ctx)
	if err != nil {
		return err
	}
	g := process.NewGroup(ctx)
	if err := h.serve(ctx, g); err != nil {
		g.Stop()
		return errors.Join(err, g.Wait())
	}
	if err := opts.serveHTTP(g, registry, h.ready(), http.HandlerFunc(h.status)); err != nil {
		g.Stop()
		return errors.Join(err, g.Wait())
	}
	g.Go("follow", func(ctx context.Context) error { h.follow(ctx, changed); return nil })
	if opts.Cluster != nil {
		g.Go("report", func(ctx context.Context) error { h.report(ctx); return nil })
	}
	settleMemory()
	opts.Logger.Info("hub runs", "remoteCluster", c.ID.String(), "uid", h.uid, "replica", h.opts.Replica, "serverName", wire.HubServerName(h.uid, h.opts.Replica, c.FrontName), "spokes", opts.Spokes, "clients", opts.Clients)
	return g.Wait()
}

// begin finds the object and the state.
func (h *hubLoop) begin(ctx context.Context) (*model.RemoteCluster, error) {
	if h.opts.Cluster != nil {
		return h.beginInPod(ctx)
	}
	files := &manifestFiles{manifests.NewFiles(h.opts.Manifests), h.opts.Name}
	c, err := files.Find()
	if err != nil {
		return nil, err
	}
	files.name = c.ID.String() // from now on this one, whatever else comes
	h.opts.Name, h.source = files.name, files
	h.state, err = OpenState(h.opts.State, c.ID)
	return c, err
}

// serve starts the listeners. When the group ends they close, and sessions drain.
func (h *hubLoop) serve(ctx context.Context, g *process.Group) error {
	spokes, err := listenTCP(ctx, "spokes", h.opts.Spokes)
	if err != nil {
		return err
	}
	clients, err := listenTCP(ctx, "clients", h.opts.Clients)
	if err != nil {
		return errors.Join(err, spokes.Close())
	}
	switch {
	case h.opts.Cluster != nil: // behind the front; what it says of addresses is for people only
		spokes = &proxyproto.Listener{Listener: spokes, ReadHeaderTimeout: headerTimeout, ConnPolicy: func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) {
			return proxyproto.USE, nil
		}}
	case len(h.opts.ProxyProtocolFrom) > 0:
		spokes = proxyListener(spokes, h.opts.ProxyProtocolFrom)
	}
	g.Go("spokes", func(ctx context.Context) error { return h.hub.ServeSpokes(ctx, spokes) })
	g.Go("clients", func(ctx context.Context) error { return h.hub.ServeClients(ctx, clients) })
	g.Go("drain", func(ctx context.Context) error {
		<-ctx.Done()
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), link.DrainTimeout)
		defer cancel()
		h.hub.GoAway(late)
		return nil
	})
	return nil
}

// headerTimeout is how long a PROXY protocol header may take.
const headerTimeout = 5 * time.Second

// proxyListener reads the PROXY protocol's header from those who may send one; they must.
func proxyListener(l net.Listener, from []netip.Prefix) net.Listener {
	return &proxyproto.Listener{
		Listener: l, ReadHeaderTimeout: headerTimeout,
		ConnPolicy: func(o proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) {
			ap, err := netip.ParseAddrPort(o.Upstream.String())
			if err == nil && slices.ContainsFunc(from, func(p netip.Prefix) bool { return p.Contains(ap.Addr().Unmap()) }) {
				return proxyproto.REQUIRE, nil
			}
			return proxyproto.SKIP, nil
		},
	}
}

// readyAnyway is when a hub in a pod is ready without a spoke: a StatefulSet stops at a pod
// that is not ready, and could not be updated before somebody has joined.
const readyAnyway = 30 * time.Second

// ready reports whether a stream could be opened.
func (h *hubLoop) ready() func() error {
	if h.opts.Cluster == nil {
		return h.hub.Ready
	}
	var mu sync.Mutex
	since := time.Now() // without a spoke
	return func() error {
		err := h.hub.Ready()
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			since = time.Now()
		} else if time.Since(since) > readyAnyway {
			return nil
		}
		return err
	}
}

// hubsFor is where a role reaches the hubs.
func (h *hubLoop) hubsFor(role pki.Role) []wire.HubAddress {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, err := h.settings(h.cluster)
	if err != nil {
		return nil
	}
	if role == pki.Client {
		return s.ClientHubs
	}
	return s.Hubs
}

func (h *hubLoop) settings(c *model.RemoteCluster) (*hub.Settings, error) {
	hubs, clients, err := addressesFor(c, h.uid, h.opts)
	if err != nil {
		return nil, err
	}
	return &hub.Settings{Policy: policyOf(c.Targets), Hubs: hubs, ClientHubs: clients, Exports: exportsOf(c.Exports)}, nil
}

// replicaMark stands for the number of a replica in addresses and names.
const replicaMark = "{replica}"

// addressesFor says where the hubs are reached, by spokes and by clients.
func addressesFor(c *model.RemoteCluster, uid string, opts HubOptions) (spokes, clients []wire.HubAddress, err error) {
	addresses := opts.Addresses
	if len(addresses) == 0 && c.FrontHost != "" {
		addresses = []string{c.FrontHost}
	}
	if len(addresses) == 0 {
		return nil, nil, fmt.Errorf("RemoteCluster %s: nothing says where spokes reach the hubs: set spec.front.address, or --address", c.ID)
	}
	if spokes, err = hubAddresses(c, uid, addresses); err != nil {
		return nil, nil, fmt.Errorf("where spokes reach the hubs: %w", err)
	}
	addresses = opts.ClientAddresses
	if len(addresses) == 0 {
		_, port, err := net.SplitHostPort(opts.Clients)
		if err != nil {
			return nil, nil, err
		}
		addresses = []string{net.JoinHostPort("127.0.0.1", port)}
	}
	if len(addresses) == 1 && strings.Contains(addresses[0], replicaMark) {
		pattern := addresses[0]
		addresses = nil
		for i := range c.Replicas {
			addresses = append(addresses, strings.ReplaceAll(pattern, replicaMark, strconv.Itoa(i)))
		}
	}
	if clients, err = hubAddresses(c, uid, addresses); err != nil {
		return nil, nil, fmt.Errorf("where clients reach the hubs: %w", err)
	}
	return spokes, clients, nil
}

// apply puts an object into effect.
func (h *hubLoop) apply(c *model.RemoteCluster) error {
	s, err := h.settings(c)
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.cluster = c
	h.mu.Unlock()
	h.hub.Set(s)
	return nil
}

// names are those that the hub's certificate must hold.
func (h *hubLoop) names() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	names := []string{wire.HubServerName(h.uid, h.opts.Replica, h.cluster.FrontName), "localhost", "127.0.0.1", "::1"}
	if host, err := os.Hostname(); err == nil && host != "" {
		names = append(names, host)
	}
	for _, n := range h.opts.Names {
		n = strings.ReplaceAll(n, replicaMark, strconv.Itoa(h.opts.Replica))
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

// credentials reads certificates, renewing the hub's own when it is time to.
func (h *hubLoop) credentials() error {
	id := pki.Identity{UID: h.uid, Role: pki.Hub, Name: strconv.Itoa(h.opts.Replica)}
	c, err := h.state.HubCredentials(id, h.names(), time.Now())
	if err != nil {
		return err
	}
	h.holder.Set(c)
	h.meter.Expires(c.Certificate.Leaf.NotAfter)
	return nil
}

const (
	// lookEvery is how often the list of revoked certificates is looked at.
	lookEvery = time.Second
	// renewEvery is how often the hub's own certificate is, and more often when certificates
	// are short-lived.
	renewEvery = time.Minute
)

func (h *hubLoop) renewEvery() time.Duration {
	if leaf := h.opts.Lifetimes.Leaf; leaf > 0 {
		return min(renewEvery, leaf/10)
	}
	return renewEvery
}

// follow puts changes into effect: of the manifests, of the list of revoked certificates,
// and of time.
func (h *hubLoop) follow(ctx context.Context, changed <-chan struct{}) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	renewed := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			h.reload()
		case <-look.C:
			due := time.Since(renewed) >= h.renewEvery()
			if !due && !h.revokedChanged() {
				continue
			}
			renewed = time.Now()
		}
		if err := h.credentials(); err != nil {
			h.say(err.Error())
			continue
		}
		h.hub.Recheck()
	}
}

// revokedChanged reports whether the list of revoked certificates was written since the
// last look.
func (h *hubLoop) revokedChanged() bool {
	if h.opts.Cluster != nil {
		return false // the RemoteCluster says when to look
	}
	info, err := os.Stat(h.state.where("revoked.json"))
	if err != nil || info.ModTime().Equal(h.revoked) {
		return false
	}
	h.revoked = info.ModTime()
	return true
}

// reload reads the manifests. One that is refused leaves the last good one in effect; one
// that is gone allows nothing any more.
func (h *hubLoop) reload() {
	c, err := h.source.Find()
	if err == nil {
		err = h.apply(c)
	}
	if err != nil {
		h.say(err.Error())
		return
	}
	h.say("")
}

// say logs a problem once; empty: it is over.
func (h *hubLoop) say(problem string) {
	h.mu.Lock()
	known := h.problem == problem
	h.problem = problem
	h.mu.Unlock()
	switch {
	case known:
	case problem == "":
		h.opts.Logger.Info("configuration in effect")
	default:
		h.opts.Logger.Error("the last good configuration stays in effect", "error", problem)
	}
}

// HubStatus is what a hub tells of itself.
type HubStatus struct {
	RemoteCluster string            `json:"remoteCluster"`
	UID           string            `json:"uid"`
	Replica       int               `json:"replica"`
	Expires       time.Time         `json:"certificateExpirationTime"`
	Hubs          []wire.HubAddress `json:"hubs"`
	Peers         []hub.Peer        `json:"peers"`
	Problem       string            `json:"problem,omitempty"`
}

func (h *hubLoop) status(w http.ResponseWriter, _ *http.Request) {
	h.mu.Lock()
	s := HubStatus{RemoteCluster: h.opts.Name, UID: h.uid, Replica: h.opts.Replica, Problem: h.problem}
	h.mu.Unlock()
	s.Hubs = h.hubsFor(pki.Spoke)
	s.Expires = h.holder.Get().Certificate.Leaf.NotAfter
	s.Peers = h.hub.Peers()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(s)
}
