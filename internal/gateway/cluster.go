package gateway

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/store"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// Cluster is the API server that a gateway pod has its objects from, and what the pod
// knows of itself.
type Cluster struct {
	Client  client.WithWatch
	Gateway model.ID
	// Pod and Node are names; Node may be empty.
	Pod, Node string
	// PodIPs and HostIPs are the addresses of the two, at most one per family.
	PodIPs, HostIPs []netip.Addr
}

// cluster is the backing of a gateway in a cluster. What is written goes through a writer
// in the background: an API server that is away holds up nothing.
type cluster struct {
	opts  Cluster
	log   *slog.Logger
	api   *source.API
	store *store.Kube
	*teller
	elector *elector
	remains remains
	began   time.Time
	kept    *store.Snapshot // what Read returned last, in the place of objects; nil: it did not

	// Of the last snapshot.
	own     *v1alpha1.VPNGateway                  // nil: not there
	service *corev1.Service                       // nil: not there
	slices  map[string]*discoveryv1.EndpointSlice // of service
	sliced  map[string]time.Time                  // when one was last written that is not seen yet
	zone    string
	ours    map[model.Ref]model.Decoded // Sites and Devices that name this gateway
	devices map[model.ID]*v1alpha1.Device

	uid    atomic.Value // types.UID of own, once it was there
	cancel context.CancelFunc
	done   sync.WaitGroup
	save   chan map[netstate.Key]netip.AddrPort
	// vote ends the election, when everything else is over.
	vote    context.CancelFunc
	elected sync.WaitGroup
}

// newCluster is for a pod; what a restart of its container needs is kept in s.
func newCluster(o Options, s *store.Store, log *slog.Logger) *cluster {
	opts := *o.Cluster
	c := &cluster{
		opts: opts, log: log, remains: remains{store: s}, began: time.Now(), store: store.NewKube(opts.Client, opts.Gateway, podManager(opts.Pod)),
		save: make(chan map[netstate.Key]netip.AddrPort, 1), cancel: func() {}, vote: func() {},
		sliced: map[string]time.Time{},
	}
	_, port, err := net.SplitHostPort(o.HTTP)
	if err != nil { // it serves nothing: nobody can greet it
		port = "0"
	}
	c.elector = newElector(opts.Pod, port, c.store, log)
	if o.IPsecDir != "" { // others run the IKE daemon
		c.elector.vouch = func(until time.Time) error { return ipsec.Vouch(o.IPsecDir, until) }
	}
	c.teller = newTeller(opts, log)
	c.api = source.NewAPI(source.APIOptions{
		Client: opts.Client, Logger: log,
		Secrets: func(d model.Decoded) bool { return gatewayOf(d) == opts.Gateway },
	})
	return c
}

// gatewayOf is the gateway that a Site or Device names; zero for others.
func gatewayOf(d model.Decoded) model.ID {
	var ref v1alpha1.GatewayReference
	switch o := d.Object.(type) {
	case *v1alpha1.Site:
		ref = o.Spec.GatewayRef
	case *v1alpha1.Device:
		ref = o.Spec.GatewayRef
	default:
		return model.ID{}
	}
	if ref.Namespace == "" {
		ref.Namespace = d.Object.GetNamespace()
	}
	return model.ID{Namespace: ref.Namespace, Name: ref.Name}
}

// Name implements backing.
func (c *cluster) Name() string { return "objects" }

// Watch implements backing.
func (c *cluster) Watch(ctx context.Context) (<-chan struct{}, error) {
	voting, vote := context.WithCancel(context.WithoutCancel(ctx))
	c.vote = vote
	c.elected.Go(func() { c.elector.run(voting) })
	ctx, c.cancel = context.WithCancel(ctx)
	c.done.Go(func() { c.saveEndpoints(ctx) })
	c.done.Go(func() { c.teller.run(ctx) })
	c.done.Go(func() {
		c.remains.run(ctx, func(err error) { c.log.Warn("cannot keep the objects for a restart", "error", err) })
	})
	objects, err := c.api.Watch(ctx)
	if err != nil {
		return nil, err
	}
	out := make(chan struct{}, 1)
	c.done.Go(func() { pass(ctx, out, objects, c.elector.changed) })
	return out, nil
}

// pass tells of changes of either kind, several at once as one.
func pass(ctx context.Context, out chan<- struct{}, a, b <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a:
		case <-b:
		}
		select {
		case out <- struct{}{}:
		default:
		}
	}
}

// Close implements backing. The Lease is given up last: another pod then takes over.
func (c *cluster) Close() error {
	c.cancel()
	c.done.Wait()
	contested := c.Contested()
	c.vote()
	c.elected.Wait()
	if !contested {
		return nil
	}
	return c.elector.release()
}

// Active implements backing.
func (c *cluster) Active() (active, known bool) { return c.elector.active() }

// Contested implements backing.
func (c *cluster) Contested() bool { return c.elector.contested() }

// WithoutServices implements backing.
func (c *cluster) WithoutServices() bool { return c.kept != nil }

// Hello implements backing.
func (c *cluster) Hello() http.Handler { return c.elector }

// Read implements backing.
func (c *cluster) Read() (model.Objects, []model.Problem, error) {
	objects, problems, err := c.api.Read()
	if err == nil {
		c.kept = nil
		c.remains.note(objects)
	} else if objects, err = c.readKept(err); err != nil {
		return objects, problems, err
	}
	c.own, c.zone, c.service, c.slices = nil, "", nil, map[string]*discoveryv1.EndpointSlice{}
	c.ours, c.devices = map[model.Ref]model.Decoded{}, map[model.ID]*v1alpha1.Device{}
	for _, d := range objects.All() {
		ref := d.Ref()
		switch o := d.Object.(type) {
		case *v1alpha1.VPNGateway:
			if ref.ID == c.opts.Gateway {
				c.own = o
				c.uid.Store(o.UID)
			}
		case *v1alpha1.Site:
			if gatewayOf(d) == c.opts.Gateway {
				c.ours[ref] = d
			}
		case *v1alpha1.Device:
			if gatewayOf(d) == c.opts.Gateway {
				c.ours[ref] = d
				c.devices[ref.ID] = o
			}
		case *corev1.Service:
			if ref.ID == c.serviceID() {
				c.service = o
			}
		case *discoveryv1.EndpointSlice:
			if ref.ID.Namespace == c.opts.Gateway.Namespace && o.Labels[discoveryv1.LabelServiceName] == c.serviceID().Name {
				c.slices[o.Name] = o
			}
		default:
			if ref.Kind == model.KindNode && ref.ID.Name == c.opts.Node {
				c.zone = o.GetLabels()["topology.kubernetes.io/zone"]
			}
		}
	}
	if c.own != nil {
		c.among(c.own)
	}
	return objects, problems, nil
}

// serviceID is the Service that the far sides reach the gateway by.
func (c *cluster) serviceID() model.ID {
	return model.ID{Namespace: c.opts.Gateway.Namespace, Name: workload.GatewayName(c.opts.Gateway.Name)}
}

// among tells the elector who else there is.
func (c *cluster) among(o *v1alpha1.VPNGateway) {
	replicas := 1
	if o.Spec.Replicas != nil {
		replicas = int(*o.Spec.Replicas)
	}
	others := map[string][]netip.Addr{}
	for _, e := range o.Status.Endpoints {
		if e.Pod == c.opts.Pod {
			continue
		}
		for _, ip := range e.PodIPs {
			if a, err := netip.ParseAddr(string(ip)); err == nil {
				others[e.Pod] = append(others[e.Pod], a.Unmap())
			}
		}
	}
	c.elector.among(o.UID, replicas, others)
}

// Stale implements backing.
func (c *cluster) Stale() map[string][]model.Ref { return nil }

// ParseOptions implements backing.
func (c *cluster) ParseOptions(objects model.Objects) model.ParseOptions {
	opts := model.ParseOptions{NodeName: c.opts.Node, Zone: c.zone, InEffect: model.InEffect(objects)}
	for _, s := range c.api.APIServers() {
		if a, err := netip.ParseAddr(s); err == nil {
			opts.APIServers = append(opts.APIServers, a.Unmap())
		}
	}
	if c.own != nil {
		found := &c.own.Status.Cluster
		opts.Found = model.ClusterRanges{Pods: parsed(found.PodCIDRs), Services: parsed(found.ServiceCIDRs), Nodes: parsed(found.NodeCIDRs)}
	}
	return opts
}

// parsed are ranges out of a status.
func parsed(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// Review implements backing: other gateways' sites and devices are left to them, and why a
// Secret cannot be read is told.
func (c *cluster) Review(problems []model.Problem) []model.Problem {
	var out []model.Problem
	for _, p := range problems {
		ref := model.Ref{Kind: p.Kind, ID: p.Object}
		switch p.Kind {
		case model.KindGateway:
			if p.Object != c.opts.Gateway {
				continue
			}
		case model.KindSite, model.KindDevice:
			d, ours := c.ours[ref]
			if !ours {
				continue
			}
			if p.Reason == model.ReasonSecretNotFound {
				for _, s := range d.Secrets() {
					if err := c.api.SecretError(s); err != nil {
						p.Message = err.Error()
					}
				}
			}
		case model.KindRemoteCluster, model.KindNodeEncryption, model.KindNodeTunnel:
			continue
		}
		out = append(out, p)
	}
	return append(out, c.refusedByPlugin()...)
}

// refusedByPlugin is what only the operator can know, repeated for those who look at Ready.
func (c *cluster) refusedByPlugin() []model.Problem {
	if c.own == nil {
		return nil
	}
	a := meta.FindStatusCondition(c.own.Status.Conditions, v1alpha1.ConditionAccepted)
	if a == nil || a.Status != metav1.ConditionFalse || a.Reason != model.ReasonNetworkPlugin || a.ObservedGeneration != c.own.Generation {
		return nil
	}
	return []model.Problem{{Kind: model.KindGateway, Object: c.opts.Gateway, Reason: a.Reason, Message: a.Message}}
}
