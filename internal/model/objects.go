package model

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// Kinds of the objects that a snapshot can hold.
const (
	KindGateway        = "VPNGateway"
	KindSite           = "Site"
	KindDevice         = "Device"
	KindRemoteCluster  = "RemoteCluster"
	KindNodeEncryption = "NodeEncryption"
	KindNodeTunnel     = "NodeTunnel"
	KindService        = "Service"
	KindEndpointSlice  = "EndpointSlice"
	KindSecret         = "Secret"
	KindNode           = "Node"
)

// DefaultNamespace is where objects of namespaced kinds are that do not say.
const DefaultNamespace = "default"

// Ref names an object of a snapshot.
type Ref struct {
	Kind string
	ID   ID
}

// String is "Site default/berlin".
func (r Ref) String() string { return r.Kind + " " + r.ID.String() }

// Decoded is one object of a snapshot.
type Decoded struct {
	// Object is one of *v1alpha1.{VPNGateway,Site,Device,RemoteCluster,NodeEncryption,NodeTunnel},
	// *corev1.{Service,Secret,Node} and *discoveryv1.EndpointSlice.
	Object metav1.Object
	// Origin is where it was read, "site.yaml:12"; empty for objects from an API server.
	Origin string
}

// Kind is the object's kind, or "" for a type that no snapshot holds.
func (d Decoded) Kind() string {
	switch d.Object.(type) {
	case *v1alpha1.VPNGateway:
		return KindGateway
	case *v1alpha1.Site:
		return KindSite
	case *v1alpha1.Device:
		return KindDevice
	case *v1alpha1.RemoteCluster:
		return KindRemoteCluster
	case *v1alpha1.NodeEncryption:
		return KindNodeEncryption
	case *v1alpha1.NodeTunnel:
		return KindNodeTunnel
	case *corev1.Service:
		return KindService
	case *discoveryv1.EndpointSlice:
		return KindEndpointSlice
	case *corev1.Secret:
		return KindSecret
	case *corev1.Node:
		return KindNode
	}
	return ""
}

// Ours reports whether the object is of one of Culvert's own kinds.
func (d Decoded) Ours() bool {
	switch d.Kind() {
	case KindService, KindEndpointSlice, KindSecret, KindNode, "":
		return false
	}
	return true
}

// Ref names the object. A namespaced object that names no namespace is in DefaultNamespace.
func (d Decoded) Ref() Ref {
	kind := d.Kind()
	ref := Ref{Kind: kind, ID: ID{Name: d.Object.GetName()}}
	if kind != KindNodeEncryption && kind != KindNodeTunnel && kind != KindNode {
		ref.ID.Namespace = namespaceOf(d.Object)
	}
	return ref
}

func namespaceOf(o metav1.Object) string {
	if ns := o.GetNamespace(); ns != "" {
		return ns
	}
	return DefaultNamespace
}

// SetCreated gives an object without a creation time one; others keep theirs.
func (d Decoded) SetCreated(t time.Time) {
	if created := d.Object.GetCreationTimestamp(); created.IsZero() {
		d.Object.SetCreationTimestamp(metav1.NewTime(t))
	}
}

// Equal reports whether both ask for the same: kind, name and spec (or data) are equal.
// Origin, status and other metadata are not compared.
func (d Decoded) Equal(o Decoded) bool {
	if d.Object == o.Object {
		return true
	}
	if d.Ref() != o.Ref() {
		return false
	}
	eq := equality.Semantic.DeepEqual
	switch a := d.Object.(type) {
	case *v1alpha1.VPNGateway:
		return eq(a.Spec, o.Object.(*v1alpha1.VPNGateway).Spec)
	case *v1alpha1.Site:
		return eq(a.Spec, o.Object.(*v1alpha1.Site).Spec)
	case *v1alpha1.Device:
		return eq(a.Spec, o.Object.(*v1alpha1.Device).Spec)
	case *v1alpha1.RemoteCluster:
		b := o.Object.(*v1alpha1.RemoteCluster)
		return eq(a.Spec, b.Spec) && eq(a.Annotations, b.Annotations)
	case *v1alpha1.NodeEncryption:
		return eq(a.Spec, o.Object.(*v1alpha1.NodeEncryption).Spec)
	case *v1alpha1.NodeTunnel:
		return eq(a.Spec, o.Object.(*v1alpha1.NodeTunnel).Spec)
	case *corev1.Service:
		b := o.Object.(*corev1.Service)
		return eq(a.Spec, b.Spec) && eq(a.Annotations, b.Annotations)
	case *discoveryv1.EndpointSlice:
		b := o.Object.(*discoveryv1.EndpointSlice)
		return eq(a.Endpoints, b.Endpoints) && eq(a.Ports, b.Ports) && eq(a.Labels, b.Labels) && a.AddressType == b.AddressType
	case *corev1.Secret:
		b := o.Object.(*corev1.Secret)
		return eq(a.Data, b.Data) && eq(a.StringData, b.StringData)
	case *corev1.Node:
		b := o.Object.(*corev1.Node)
		return eq(a.Spec.PodCIDRs, b.Spec.PodCIDRs) && eq(a.Status.Addresses, b.Status.Addresses) && eq(a.Labels, b.Labels) &&
			a.Annotations[LinkAddressesAnnotation] == b.Annotations[LinkAddressesAnnotation]
	}
	return false
}

// Secrets names the Secrets that the object refers to.
func (d Decoded) Secrets() []Ref {
	var names []string
	key := func(r *v1alpha1.SecretKeyReference) {
		if r != nil {
			names = append(names, r.Name)
		}
	}
	switch o := d.Object.(type) {
	case *v1alpha1.Site:
		if o.Spec.WireGuard != nil {
			key(o.Spec.WireGuard.PresharedKeySecretRef)
			for i := range o.Spec.WireGuard.Alternatives {
				key(o.Spec.WireGuard.Alternatives[i].PresharedKeySecretRef)
			}
		}
		if o.Spec.IPsec != nil {
			key(o.Spec.IPsec.Auth.PresharedKeySecretRef)
			if c := o.Spec.IPsec.Auth.Certificate; c != nil {
				names = append(names, c.CertificateSecretRef.Name)
				key(&c.CASecretRef)
				key(c.CRLSecretRef)
			}
		}
	case *v1alpha1.Device:
		key(o.Spec.PresharedKeySecretRef)
	}
	slices.Sort(names)
	var out []Ref
	for _, n := range slices.Compact(names) {
		out = append(out, Ref{KindSecret, ID{namespaceOf(d.Object), n}})
	}
	return out
}

// Objects is a snapshot: every object that Parse looks at, in the order in which they
// were read. The zero value is empty. A copy shares the objects, which Parse never
// changes.
type Objects struct{ list []Decoded }

// Add appends an object. One of a type that no snapshot holds is left out.
func (o *Objects) Add(d Decoded) {
	if d.Object != nil && d.Kind() != "" {
		o.list = append(o.list, d)
	}
}

// With is a copy in which each of list takes the place of the object of its name, or is
// added. Of several of one name the last counts.
func (o Objects) With(list ...Decoded) Objects {
	place := make(map[Ref]Decoded, len(list))
	for _, d := range list {
		place[d.Ref()] = d
	}
	out := Objects{list: make([]Decoded, 0, len(o.list)+len(list))}
	done := make(map[Ref]bool, len(list))
	for _, x := range o.list {
		ref := x.Ref()
		d, ok := place[ref]
		switch {
		case !ok:
			out.list = append(out.list, x)
		case !done[ref]:
			out.list = append(out.list, d)
			done[ref] = true
		}
	}
	for _, d := range list {
		if ref := d.Ref(); !done[ref] {
			out.Add(place[ref])
			done[ref] = true
		}
	}
	return out
}

// Grow makes room for n more objects.
func (o *Objects) Grow(n int) { o.list = slices.Grow(o.list, n) }

// All lists the objects in their order.
func (o Objects) All() []Decoded { return slices.Clone(o.list) }

// Ours lists the objects of Culvert's own kinds in their order.
func (o Objects) Ours() []Decoded {
	var out []Decoded
	for _, d := range o.list {
		if d.Ours() {
			out = append(out, d)
		}
	}
	return out
}

// Since says how this snapshot came from an earlier one: come stands where gone stood, and the
// very same objects stand before and behind, if perhaps at another place of their file. The two
// are not to be changed.
func (o Objects) Since(earlier Objects) (gone, come []Decoded) {
	gone, come = earlier.list, o.list
	for len(gone) > 0 && len(come) > 0 && gone[0].Object == come[0].Object {
		gone, come = gone[1:], come[1:]
	}
	for len(gone) > 0 && len(come) > 0 && gone[len(gone)-1].Object == come[len(come)-1].Object {
		gone, come = gone[:len(gone)-1], come[:len(come)-1]
	}
	return gone, come
}

// Count is the number of objects.
func (o Objects) Count() int { return len(o.list) }
