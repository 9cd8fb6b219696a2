// Package cilium tells Cilium which ranges lie behind gateway pods: the way of nodeLink:
// CiliumEndpoint, for clusters whose Cilium carries the traffic of sites and devices itself.
//
// Two objects of others are changed, and nothing else of them:
//
//   - the CiliumEndpoint of a gateway pod lists the ranges in status.networking.addressing
//     beside the pod's own addresses. Cilium writes only addresses there, so whatever has a
//     prefix length is ours. Cilium puts its own list back whenever its idea of the pod
//     changes (a label, a restart of its agent): the ranges are written again at once.
//   - the ConfigMap kube-system/ip-masq-agent, if there is one, lists them in
//     nonMasqueradeCIDRs. An annotation on it says which ones are ours.
//
// The package knows the API server only as a dynamic client, so that no code of Cilium's is
// needed. What was tried with Cilium stands in docs/node-link.md.
package cilium

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Endpoint is a gateway pod and the ranges behind it, which may be none.
type Endpoint struct {
	Namespace, Pod string
	Ranges         []netip.Prefix
}

// Options configure a Cilium.
type Options struct {
	Client dynamic.Interface
	Logger *slog.Logger // nil: nobody is told
}

// Cilium keeps Cilium's objects as they should be. Make it with New.
type Cilium struct {
	client dynamic.Interface
	log    *slog.Logger
	wake   chan struct{}

	mu            sync.Mutex
	want          map[name][]netip.Prefix // by pod; nil: Set was not called yet
	unmasqueraded []netip.Prefix
}

type name struct{ namespace, name string }

var (
	endpoints  = schema.GroupVersionResource{Group: "cilium.io", Version: "v2", Resource: "ciliumendpoints"}
	configMaps = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
)

// Pauses before another attempt.
const (
	retryFirst = 200 * time.Millisecond
	retryLast  = 5 * time.Second
)

// New prepares; nothing is asked before Run.
func New(o Options) *Cilium {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Cilium{client: o.Client, log: o.Logger, wake: make(chan struct{}, 1)}
}

// Set says which gateway pods there are, all of them, and what is behind each; and which
// ranges are not to be masqueraded, whether a pod leads to them just now or not. A pod that
// is left out is gone, or never had ranges: its CiliumEndpoint is not looked at any more.
// Set returns at once; Run does the work.
func (c *Cilium) Set(want []Endpoint, unmasqueraded []netip.Prefix) {
	next := make(map[name][]netip.Prefix, len(want))
	for _, e := range want {
		ranges := slices.Clone(e.Ranges)
		slices.SortFunc(ranges, netstate.ComparePrefixes)
		next[name{e.Namespace, e.Pod}] = slices.Compact(ranges)
	}
	unmasqueraded = slices.SortedFunc(slices.Values(unmasqueraded), netstate.ComparePrefixes)
	c.mu.Lock()
	c.want, c.unmasqueraded = next, slices.Compact(unmasqueraded)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *Cilium) wanted() map[name][]netip.Prefix {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.want
}

func (c *Cilium) kept() []netip.Prefix {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unmasqueraded
}

// Run does what Set asks for until ctx ends. What was written stays then.
func (c *Cilium) Run(ctx context.Context) error {
	var group sync.WaitGroup
	defer group.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	masquerade := newFollower(c.client.Resource(configMaps).Namespace(masqNamespace), masqName, c.setMasquerade)
	pods := map[name]*follower{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		}
		want := c.wanted()
		for k := range want {
			if pods[k] == nil {
				pods[k] = newFollower(c.client.Resource(endpoints).Namespace(k.namespace), k.name, func(ctx context.Context, o *unstructured.Unstructured) error {
					return c.setEndpoint(ctx, k, o)
				})
				pods[k].start(ctx, &group, c.log)
			}
			pods[k].again()
		}
		for k, f := range pods {
			if _, there := want[k]; !there {
				f.stop()
				delete(pods, k)
			}
		}
		masquerade.start(ctx, &group, c.log)
		masquerade.again()
	}
}

// follower watches one object by its name and settles it after each change.
type follower struct {
	resource dynamic.ResourceInterface
	name     string
	settle   func(context.Context, *unstructured.Unstructured) error

	wake   chan struct{}
	cancel context.CancelFunc // nil: not started
	said   string
}

func newFollower(r dynamic.ResourceInterface, name string, settle func(context.Context, *unstructured.Unstructured) error) *follower {
	return &follower{resource: r, name: name, settle: settle, wake: make(chan struct{}, 1)}
}

// start starts it, unless it runs.
func (f *follower) start(ctx context.Context, group *sync.WaitGroup, log *slog.Logger) {
	if f.cancel != nil {
		return
	}
	ctx, f.cancel = context.WithCancel(ctx)
	group.Go(func() { f.run(ctx, log) })
}

func (f *follower) stop() { f.cancel() }

// again settles the object anew: something else is wanted.
func (f *follower) again() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *follower) run(ctx context.Context, log *slog.Logger) {
	pause := retryFirst
	for ctx.Err() == nil {
		err := f.watch(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			f.said, pause = "", retryFirst
			continue
		case errors.Is(err, errClosed):
		case f.said != err.Error():
			f.said = err.Error()
			log.Warn("cannot keep an object of Cilium's", "object", f.name, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, retryLast)
	}
}

// watch settles the object as it is, and then as often as it or what is wanted changes;
// nil when it is to be called again at once.
func (f *follower) watch(ctx context.Context) error {
	selector := "metadata.name=" + f.name
	list, err := f.resource.List(ctx, metav1.ListOptions{FieldSelector: selector})
	if err != nil {
		return err
	}
	w, err := f.resource.Watch(ctx, metav1.ListOptions{FieldSelector: selector, ResourceVersion: list.GetResourceVersion()})
	if err != nil {
		return err
	}
	defer w.Stop()
	for i := range list.Items {
		if err := f.settle(ctx, &list.Items[i]); err != nil {
			return err
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.wake:
			return nil
		case event, ok := <-w.ResultChan():
			if !ok {
				return errClosed
			}
			o, is := event.Object.(*unstructured.Unstructured)
			if !is || event.Type == "DELETED" || event.Type == "ERROR" {
				return nil
			}
			if err := f.settle(ctx, o); err != nil {
				return err
			}
		}
	}
}

// errClosed is no failure: API servers end watches every few minutes.
var errClosed = errors.New("the API server has ended the watch")
