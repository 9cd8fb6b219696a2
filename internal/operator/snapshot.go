package operator

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// snapshot is what the cluster holds, as far as it matters here. Nothing of it may be
// changed: the cache shares it.
type snapshot struct {
	objects  model.Objects // gateways, sites, devices, remote clusters; without those that are being deleted, alone or with their namespace
	gateways map[model.ID]*v1alpha1.VPNGateway
	sites    map[model.ID]*v1alpha1.Site
	devices  map[model.ID]*v1alpha1.Device // those that are being deleted, too
	remotes  map[model.ID]*v1alpha1.RemoteCluster

	nodes        []corev1.Node
	serviceCIDRs []networkingv1.ServiceCIDR
	apiServers   []netip.Addr

	services map[model.ID]*corev1.Service // of gateways
	// readyPods is how many pods of a StatefulSet are ready, where any are.
	readyPods map[model.ID]int32
	claims    map[string]heldClaim      // by namespace/name of the Lease
	owned     map[objectKey]ownedObject // what the operator made, claims excepted
}

// objectKey names an object of any kind.
type objectKey struct {
	kind            schema.GroupKind
	namespace, name string
}

// ownedObject is what is known of an object that the operator made.
type ownedObject struct {
	meta    metav1.ObjectMeta
	version string // of its kind
}

// heldClaim is a claim of an address in the cluster.
type heldClaim struct {
	workload.Claim
	lease *metav1.PartialObjectMetadata // nil: not in the cache yet
}

// ownedKinds are the kinds of what the operator makes. Of most only the metadata is read.
var ownedKinds = []schema.GroupVersionKind{
	{Group: "", Version: "v1", Kind: "ServiceAccount"},
	{Group: "policy", Version: "v1", Kind: "PodDisruptionBudget"},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "Role"},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "RoleBinding"},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRoleBinding"},
}

var leaseKind = schema.GroupVersionKind{Group: "coordination.k8s.io", Version: "v1", Kind: "Lease"}

// ours selects what the operator made.
var ours = client.MatchingLabels{workload.LabelManagedBy: workload.Operator}

// gather reads everything once.
func (o *Operator) gather(ctx context.Context) (*snapshot, error) {
	s := &snapshot{
		gateways: map[model.ID]*v1alpha1.VPNGateway{}, sites: map[model.ID]*v1alpha1.Site{}, devices: map[model.ID]*v1alpha1.Device{},
		remotes: map[model.ID]*v1alpha1.RemoteCluster{}, readyPods: map[model.ID]int32{},
		services: map[model.ID]*corev1.Service{}, claims: map[string]heldClaim{}, owned: map[objectKey]ownedObject{},
	}
	for _, read := range []func(context.Context, *snapshot) error{o.gatherObjects, o.gatherCluster, o.gatherOwned, o.gatherClaims} {
		if err := read(ctx, s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// list reads from the cache, sharing its objects.
func (o *Operator) list(ctx context.Context, into client.ObjectList, opts ...client.ListOption) error {
	shared := true
	opts = append(opts, &client.ListOptions{UnsafeDisableDeepCopy: &shared})
	if err := o.Cached.List(ctx, into, opts...); err != nil {
		return fmt.Errorf("list %T: %w", into, err)
	}
	return nil
}

func (o *Operator) gatherObjects(ctx context.Context, s *snapshot) error {
	var gateways v1alpha1.VPNGatewayList
	var sites v1alpha1.SiteList
	var devices v1alpha1.DeviceList
	var remotes v1alpha1.RemoteClusterList
	for _, l := range []client.ObjectList{&gateways, &sites, &devices, &remotes} {
		if err := o.list(ctx, l); err != nil {
			return err
		}
	}
	leaving, err := o.leaving(ctx)
	if err != nil {
		return err
	}
	add := func(x metav1.Object) {
		if !x.GetDeletionTimestamp().IsZero() || err != nil {
			return
		}
		var gone bool
		if gone, err = leaving(x.GetNamespace()); !gone {
			s.objects.Add(model.Decoded{Object: x})
		}
	}
	for i := range gateways.Items {
		x := &gateways.Items[i]
		s.gateways[idOf(x)] = x
		add(x)
	}
	for i := range sites.Items {
		x := &sites.Items[i]
		s.sites[idOf(x)] = x
		add(x)
	}
	for i := range devices.Items {
		x := &devices.Items[i]
		s.devices[idOf(x)] = x
		add(x)
	}
	for i := range remotes.Items {
		x := &remotes.Items[i]
		s.remotes[idOf(x)] = x
		add(x)
	}
	return err
}

func idOf(o metav1.Object) model.ID { return model.ID{Namespace: o.GetNamespace(), Name: o.GetName()} }

func (o *Operator) gatherCluster(ctx context.Context, s *snapshot) error {
	var nodes corev1.NodeList
	if err := o.list(ctx, &nodes); err != nil {
		return err
	}
	s.nodes = nodes.Items
	if o.ServiceCIDRs {
		var cidrs networkingv1.ServiceCIDRList
		if err := o.list(ctx, &cidrs); err != nil {
			return err
		}
		s.serviceCIDRs = cidrs.Items
	}
	var apiServers discoveryv1.EndpointSliceList
	if err := o.list(ctx, &apiServers, client.InNamespace(metav1.NamespaceDefault), client.MatchingLabels{discoveryv1.LabelServiceName: "kubernetes"}); err != nil {
		return err
	}
	for _, slice := range apiServers.Items {
		for _, e := range slice.Endpoints {
			for _, a := range e.Addresses {
				if addr, err := netip.ParseAddr(a); err == nil {
					s.apiServers = append(s.apiServers, addr.Unmap().WithZone(""))
				}
			}
		}
	}
	slices.SortFunc(s.apiServers, netip.Addr.Compare)
	s.apiServers = slices.Compact(s.apiServers)
	return nil
}

func (o *Operator) gatherOwned(ctx context.Context, s *snapshot) error {
	for _, kind := range ownedKinds {
		var l metav1.PartialObjectMetadataList
		l.SetGroupVersionKind(kind.GroupVersion().WithKind(kind.Kind + "List"))
		if err := o.list(ctx, &l, ours); err != nil {
			return err
		}
		for i := range l.Items {
			m := l.Items[i].ObjectMeta
			s.owned[objectKey{kind.GroupKind(), m.Namespace, m.Name}] = ownedObject{m, kind.Version}
		}
	}
	var sets appsv1.StatefulSetList
	if err := o.list(ctx, &sets, ours); err != nil {
		return err
	}
	for i := range sets.Items {
		x := &sets.Items[i]
		s.readyPods[idOf(x)] = x.Status.ReadyReplicas
		s.owned[objectKey{schema.GroupKind{Group: "apps", Kind: "StatefulSet"}, x.Namespace, x.Name}] = ownedObject{x.ObjectMeta, "v1"}
	}
	var services corev1.ServiceList
	if err := o.list(ctx, &services, ours); err != nil {
		return err
	}
	for i := range services.Items {
		x := &services.Items[i]
		s.services[idOf(x)] = x
		s.owned[objectKey{schema.GroupKind{Kind: "Service"}, x.Namespace, x.Name}] = ownedObject{x.ObjectMeta, "v1"}
	}
	return nil
}

func (o *Operator) gatherClaims(ctx context.Context, s *snapshot) error {
	var l metav1.PartialObjectMetadataList
	l.SetGroupVersionKind(leaseKind.GroupVersion().WithKind("LeaseList"))
	if err := o.list(ctx, &l, ours, client.MatchingLabels{workload.LabelComponent: workload.ComponentAddress}); err != nil {
		return err
	}
	for i := range l.Items {
		if c, ok := workload.ParseClaim(&l.Items[i]); ok {
			s.claims[idOf(&l.Items[i]).String()] = heldClaim{c, &l.Items[i]}
		}
	}
	for name, recent := range o.claimed {
		if _, seen := s.claims[name]; seen || o.Now().Sub(recent.at) > cacheLag {
			delete(o.claimed, name)
			continue
		}
		s.claims[name] = heldClaim{Claim: recent.claim}
	}
	return nil
}
