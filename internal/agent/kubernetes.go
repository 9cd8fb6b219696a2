package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/source"
)

// KubernetesOptions say where an agent's API server is.
type KubernetesOptions struct {
	Config *rest.Config
	Node   string
	// Namespace and DaemonSet are what the agent is a pod of; with DaemonSet empty it is
	// never taken for removed.
	Namespace, DaemonSet string
	Logger               *slog.Logger
}

// Kubernetes is the Cluster of an API server.
type Kubernetes struct {
	*source.API
	opts     KubernetesOptions
	client   client.Client
	metadata metadata.Interface
	dialed   *connections
	removed  atomic.Bool // the DaemonSet was seen being deleted
}

var daemonSets = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "daemonsets"}

// NewKubernetes prepares; nothing is asked yet.
func NewKubernetes(opts KubernetesOptions) (*Kubernetes, error) {
	dialed := newConnections()
	opts.Config = rest.CopyConfig(opts.Config)
	opts.Config.Dial = dialed.dial
	c, err := kube.NewClient(opts.Config)
	if err != nil {
		return nil, err
	}
	m, err := metadata.NewForConfig(opts.Config)
	if err != nil {
		return nil, err
	}
	api := source.NewAPI(source.APIOptions{
		Client: c, Logger: opts.Logger,
		Kinds: []string{model.KindGateway, model.KindSite, model.KindNode, model.KindNodeEncryption, model.KindNodeTunnel},
	})
	return &Kubernetes{API: api, opts: opts, client: c, metadata: m, dialed: dialed}, nil
}

// Watch implements Cluster. When the agent's DaemonSet is deleted it takes the Node's
// annotation away at once: moments later the agent will not be allowed to any more.
func (k *Kubernetes) Watch(ctx context.Context) (<-chan struct{}, error) {
	if k.opts.DaemonSet != "" {
		go k.watchDaemonSet(ctx)
	}
	return k.API.Watch(ctx)
}

// watchDaemonSet ends when the DaemonSet is being deleted; without the right to look it
// tries for ever, now and then.
func (k *Kubernetes) watchDaemonSet(ctx context.Context) {
	own := k.metadata.Resource(daemonSets).Namespace(k.opts.Namespace)
	for ctx.Err() == nil {
		w, err := own.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + k.opts.DaemonSet})
		if err == nil {
			removed := deleted(w.ResultChan())
			w.Stop()
			if removed {
				k.removed.Store(true)
				// Best effort: it is only an annotation.
				if err := k.SetLinkAddresses(ctx, k.opts.Node, nil); err != nil && k.opts.Logger != nil {
					k.opts.Logger.Info("the node's annotation stays", "error", err)
				}
				return
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(watchPause):
		}
	}
}

const watchPause = 5 * time.Second

// deleted waits for the end of a watch; true when the object is being deleted.
func deleted(events <-chan watch.Event) bool {
	for e := range events {
		o, ok := e.Object.(metav1.Object)
		if e.Type == watch.Deleted || ok && o.GetDeletionTimestamp() != nil {
			return true
		}
	}
	return false
}

// Moved implements Mover.
func (k *Kubernetes) Moved() { k.dialed.prune() }

// SetLinkAddresses implements Cluster.
func (k *Kubernetes) SetLinkAddresses(ctx context.Context, node string, addrs []netip.Addr) error {
	list := make([]string, len(addrs))
	for i, a := range addrs {
		list[i] = a.String()
	}
	var value any // null takes the annotation away
	if len(list) > 0 {
		value = strings.Join(list, ",")
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{model.LinkAddressesAnnotation: value}}})
	if err != nil {
		return err
	}
	if k.removed.Load() && len(addrs) > 0 {
		return nil // not any more
	}
	o := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}
	return k.client.Patch(ctx, o, client.RawPatch(types.MergePatchType, patch))
}

// Removed implements Cluster: the agent's DaemonSet is gone or being deleted. With it, an
// uninstallation also takes the agent's rights and its service account away: an agent that
// may no longer ask is being removed, too. An API server that is just starting refuses
// everybody for a moment: who is refused keeps asking.
func (k *Kubernetes) Removed(ctx context.Context) (bool, error) {
	if k.opts.DaemonSet == "" {
		return false, nil
	}
	if k.removed.Load() {
		return true, nil
	}
	var refused time.Time // since when, with nothing else in between
	for {
		o, err := k.metadata.Resource(daemonSets).Namespace(k.opts.Namespace).Get(ctx, k.opts.DaemonSet, metav1.GetOptions{})
		switch {
		case err == nil:
			return o.DeletionTimestamp != nil, nil
		case apierrors.IsNotFound(err):
			return true, nil
		case !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err):
			refused = time.Time{}
		case refused.IsZero():
			refused = time.Now()
		case time.Since(refused) >= refusedFor:
			return true, nil
		}
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("get DaemonSet %s/%s: %w", k.opts.Namespace, k.opts.DaemonSet, err)
		case <-time.After(removedPause):
		}
	}
}

// How often an agent that is stopped asks whether it is removed, and for how long it must be
// refused an answer to take that for one. An API server that starts has the roles within a
// second or two.
const (
	removedPause = 500 * time.Millisecond
	refusedFor   = 4 * time.Second
)

// APIServers implements EncryptionCluster: what the Service default/kubernetes leads to, the
// Service itself, and the address that this agent uses.
func (k *Kubernetes) APIServers(ctx context.Context) ([]netstate.Exemption, error) {
	var out []netstate.Exemption
	add := func(host string, port int32) {
		a, err := netip.ParseAddr(host)
		x := netstate.Exemption{Name: "API server", Protocol: netstate.TCP, Address: a.Unmap().WithZone(""), Port: uint16(port)}
		if err == nil && !slices.Contains(out, x) {
			out = append(out, x)
		}
	}
	var slicesOf discoveryv1.EndpointSliceList
	if err := k.client.List(ctx, &slicesOf, client.InNamespace(metav1.NamespaceDefault), client.MatchingLabels{discoveryv1.LabelServiceName: "kubernetes"}); err != nil {
		return nil, fmt.Errorf("list the EndpointSlices of Service default/kubernetes: %w", err)
	}
	for _, s := range slicesOf.Items {
		for _, e := range s.Endpoints {
			for _, p := range s.Ports {
				for _, a := range e.Addresses {
					if p.Port != nil {
						add(a, *p.Port)
					}
				}
			}
		}
	}
	var service corev1.Service
	if err := k.client.Get(ctx, client.ObjectKey{Namespace: metav1.NamespaceDefault, Name: "kubernetes"}, &service); err != nil {
		return nil, fmt.Errorf("get Service default/kubernetes: %w", err)
	}
	for _, p := range service.Spec.Ports {
		for _, a := range service.Spec.ClusterIPs {
			add(a, p.Port)
		}
	}
	if u, err := url.Parse(k.opts.Config.Host); err == nil {
		port := 443
		if n, err := strconv.Atoi(u.Port()); err == nil {
			port = n
		}
		add(u.Hostname(), int32(port))
	}
	if len(out) == 0 {
		return nil, errors.New("the Service default/kubernetes has no endpoints")
	}
	slices.SortFunc(out, func(a, b netstate.Exemption) int { return strings.Compare(a.String(), b.String()) })
	return out, nil
}

// fieldManager owns what agents write; it is one for all, as all write the same into the
// NodeEncryption.
const fieldManager = "culvert-agent"

// Apply implements EncryptionCluster.
func (k *Kubernetes) Apply(ctx context.Context, object map[string]any, subresource string) error {
	a := client.ApplyConfigurationFromUnstructured(&unstructured.Unstructured{Object: object})
	if subresource != "" {
		return k.client.SubResource(subresource).Apply(ctx, a, client.FieldOwner(fieldManager), client.ForceOwnership)
	}
	return k.client.Apply(ctx, a, client.FieldOwner(fieldManager), client.ForceOwnership)
}
