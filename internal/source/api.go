package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kubewatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// ErrNotSynced means that the first lists of the API server are not complete.
var ErrNotSynced = errors.New("the objects are not read completely yet")

// APIOptions say what is watched.
type APIOptions struct {
	Client client.WithWatch
	// Kinds are those that are watched; nil: all but NodeEncryption and NodeTunnel.
	Kinds []string
	// Node limits the Nodes to one, by its name; empty: all.
	Node string
	// Secrets reports whether the Secrets that an object names are wanted: each is read by
	// its name. Nil: none.
	Secrets func(model.Decoded) bool
	// Logger is told when the API server cannot be asked, and when it can again; nil: nobody.
	Logger *slog.Logger
}

// API takes snapshots of a cluster: VPNGateways, Sites, Devices, Services, EndpointSlices
// and Nodes of all namespaces, which it watches, and the Secrets that are named, which it
// reads one by one: nobody has to be allowed to list Secrets.
//
// While the API server is away, snapshots stay as they were.
type API struct {
	opts    APIOptions
	tables  []*table
	secrets *secrets
	changed chan struct{} // from the tables, to be settled
	synced  chan struct{} // closed when all tables have been

	complete bool // a snapshot was; Read's own
}

// NewAPI prepares; nothing is asked before Watch.
func NewAPI(opts APIOptions) *API {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	a := &API{opts: opts, changed: make(chan struct{}, 1), synced: make(chan struct{})}
	for _, k := range []struct {
		object metav1.Object
		list   func() client.ObjectList
	}{
		{&v1alpha1.VPNGateway{}, func() client.ObjectList { return &v1alpha1.VPNGatewayList{} }},
		{&v1alpha1.Site{}, func() client.ObjectList { return &v1alpha1.SiteList{} }},
		{&v1alpha1.Device{}, func() client.ObjectList { return &v1alpha1.DeviceList{} }},
		{&corev1.Service{}, func() client.ObjectList { return &corev1.ServiceList{} }},
		{&discoveryv1.EndpointSlice{}, func() client.ObjectList { return &discoveryv1.EndpointSliceList{} }},
		{&corev1.Node{}, func() client.ObjectList { return &corev1.NodeList{} }},
		{&v1alpha1.NodeEncryption{}, func() client.ObjectList { return &v1alpha1.NodeEncryptionList{} }},
		{&v1alpha1.NodeTunnel{}, func() client.ObjectList { return &v1alpha1.NodeTunnelList{} }},
	} {
		if t := newTable(k.object, k.list, a.notify); slices.Contains(opts.Kinds, t.kind) || opts.Kinds == nil && !onRequest(t.kind) {
			a.tables = append(a.tables, t)
		}
	}
	a.secrets = newSecrets(opts.Client, opts.Logger, a.notify)
	return a
}

// onRequest tells whether a kind is watched only when it is named: no gateway needs it.
func onRequest(kind string) bool {
	return kind == model.KindNodeEncryption || kind == model.KindNodeTunnel
}

func (a *API) notify() {
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

// Watch keeps snapshots current until ctx ends, and reports changes; several at once are
// one report, and the first is when everything has been read.
func (a *API) Watch(ctx context.Context) (<-chan struct{}, error) {
	for _, t := range a.tables {
		go a.follow(ctx, t)
	}
	go a.secrets.run(ctx)
	out := make(chan struct{}, 1)
	go func() {
		for _, t := range a.tables {
			select {
			case <-t.synced:
			case <-ctx.Done():
				return
			}
		}
		close(a.synced)
		settleChanges(ctx, a.changed, out)
	}()
	return out, nil
}

// How long changes are collected: until it is quiet, but no longer than a moment.
const (
	quietChanges = 10 * time.Millisecond
	mostChanges  = 100 * time.Millisecond
)

// settleChanges passes on changes, several at once as one. It begins with one.
func settleChanges(ctx context.Context, in <-chan struct{}, out chan<- struct{}) {
	for {
		select {
		case out <- struct{}{}:
		default:
		}
		select {
		case <-ctx.Done():
			return
		case <-in:
		}
		limit := time.After(mostChanges)
	collect:
		for {
			select {
			case <-ctx.Done():
				return
			case <-limit:
				break collect
			case <-time.After(quietChanges):
				break collect
			case <-in:
			}
		}
	}
}

// follow lists and watches one kind for ever. The reflector tries again by itself, with
// growing pauses.
func (a *API) follow(ctx context.Context, t *table) {
	c := a.opts.Client
	outage := &outage{log: a.opts.Logger, what: t.kind}
	narrow := func(o metav1.ListOptions) *client.ListOptions {
		if t.kind == model.KindNode && a.opts.Node != "" {
			o.FieldSelector = "metadata.name=" + a.opts.Node
		}
		return &client.ListOptions{Raw: &o}
	}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list := t.list()
			err := c.List(ctx, list, narrow(o))
			outage.note(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (kubewatch.Interface, error) {
			w, err := c.Watch(ctx, t.list(), narrow(o))
			outage.note(ctx, err)
			return w, err
		},
	}
	object, ok := t.example.(runtime.Object)
	if !ok { // every kind of the list above is one
		return
	}
	silent := logr.Discard() // what matters is said by outage, once
	r := cache.NewReflectorWithOptions(lw, object, t, cache.ReflectorOptions{
		Name: t.kind, Logger: &silent, Backoff: retry(),
	})
	r.RunWithContext(ctx)
}

// Read takes a snapshot; the error is ErrNotSynced before the first one is complete.
// Objects that are being deleted, other than gateways, are gone. Callers must not change
// the objects.
func (a *API) Read() (model.Objects, []model.Problem, error) {
	select {
	case <-a.synced:
	default:
		return model.Objects{}, nil, a.waitsFor()
	}
	var objects model.Objects
	var wanted []model.Ref
	for _, t := range a.tables {
		for _, o := range t.snapshot() {
			d := model.Decoded{Object: o}
			objects.Add(d)
			if a.opts.Secrets != nil && a.opts.Secrets(d) {
				wanted = append(wanted, d.Secrets()...)
			}
		}
	}
	for _, o := range a.secrets.want(wanted) {
		objects.Add(model.Decoded{Object: o})
	}
	if !a.complete && a.secrets.pending() {
		return model.Objects{}, nil, fmt.Errorf("%w: waiting for Secrets that Sites name", ErrNotSynced)
	}
	a.complete = true
	return objects, nil, nil
}

// waitsFor names the kinds that are missing, and why where that is known.
func (a *API) waitsFor() error {
	var missing []string
	for _, t := range a.tables {
		select {
		case <-t.synced:
		default:
			missing = append(missing, t.kind)
		}
	}
	return fmt.Errorf("%w: waiting for the API server's %v", ErrNotSynced, missing)
}

// Stale is always empty: an object of an API server has been checked as a whole.
func (a *API) Stale() map[string][]model.Ref { return nil }

// SecretError says why a Secret could not be read; nil when it could, or was not wanted.
func (a *API) SecretError(ref model.Ref) error { return a.secrets.err(ref) }

// APIServers are the addresses of the API servers, as the cluster's own Service
// default/kubernetes has them, sorted.
func (a *API) APIServers() []string {
	var out []string
	for _, t := range a.tables {
		if t.kind != model.KindEndpointSlice {
			continue
		}
		for _, o := range t.snapshot() {
			s, ok := o.(*discoveryv1.EndpointSlice)
			if !ok || s.Namespace != metav1.NamespaceDefault || s.Labels[discoveryv1.LabelServiceName] != "kubernetes" {
				continue
			}
			for _, e := range s.Endpoints {
				out = append(out, e.Addresses...)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
