// Package workload says which Kubernetes objects follow from the model: what a gateway in
// a cluster consists of, who may read which Secret, the claim of an address, a device's
// configuration.
//
// It is pure: the same model gives the same objects. It must not know what the cluster
// holds already; the operator compares.
package workload

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// Object is a Kubernetes object with its kind and version set, without status.
type Object interface {
	metav1.Object
	runtime.Object
}

// Options are the same for all gateways and hubs.
type Options struct {
	Image           string            // of both containers; never empty
	ImagePullPolicy corev1.PullPolicy // empty: the cluster's default
	// ClusterRole is what a gateway may read and report in the whole cluster; empty: none is
	// bound.
	ClusterRole string
	// Owner is what everything that runs belongs to, rights included: with it, it goes. What
	// is to last (keys, addresses) belongs to the VPNGateway or the Device. Nil: nobody; then
	// only the operator deletes.
	Owner *metav1.OwnerReference
	// Pod is laid over every gateway's pod template as "kubectl patch" does (strategic
	// merge; containers "culvert" and "ipsec"). Nil: nothing.
	Pod []byte
	// HubPod is the same for the pods of hubs (container "culvert").
	HubPod []byte
}

func (o Options) owners() []metav1.OwnerReference {
	if o.Owner == nil {
		return nil
	}
	return []metav1.OwnerReference{*o.Owner}
}

// ownedBy makes the garbage collector delete an object with its owner, which is of the
// same namespace.
func ownedBy(kind, name string, uid types.UID) []metav1.OwnerReference {
	return []metav1.OwnerReference{{
		APIVersion: v1alpha1.GroupVersion.String(), Kind: kind, Name: name, UID: uid, Controller: new(true),
	}}
}

func typeMeta(apiVersion, kind string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: apiVersion, Kind: kind}
}

// Gateway is what a gateway consists of in its own namespace, in the order in which it is
// to be made, and its right to read and report in the whole cluster.
func Gateway(gw *model.Gateway, o Options) ([]Object, error) {
	meta := metav1.ObjectMeta{
		Name: GatewayName(gw.Name), Namespace: gw.Namespace,
		Labels: Labels(gw.ID, ComponentGateway), OwnerReferences: o.owners(),
	}
	set, err := statefulSet(gw, meta, o)
	if err != nil {
		return nil, err
	}
	out := []Object{serviceAccount(meta)}
	out = append(out, ownRights(gw, meta)...)
	if o.ClusterRole != "" {
		out = append(out, clusterRights(gw, o))
	}
	if s := service(gw, meta); s != nil {
		out = append(out, s)
	}
	return append(out, disruptionBudget(gw, meta), set), nil
}
