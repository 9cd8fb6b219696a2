package workload

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"strings"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// Keys of a device's Secret.
const (
	SecretPrivateKey = "private-key" // as "wg genkey" prints it
	SecretPublicKey  = "public-key"
	SecretConfig     = "wg0.conf" // a wg-quick(8) file; missing until the gateway has a key and an address
)

// Holder is a Device for good: a later one of the same name is another.
type Holder struct {
	model.ID
	UID types.UID
}

// String is "namespace/name/uid".
func (h Holder) String() string { return fmt.Sprintf("%s/%s/%s", h.Namespace, h.Name, h.UID) }

// Claim is one address in use. The API server lets only one exist per gateway and address.
type Claim struct {
	Gateway model.ID
	Address netip.Addr
	Holder  Holder
}

// Lease is the claim as an object, owned by the gateway: it dies with it.
func (c Claim) Lease(gateway types.UID) *coordinationv1.Lease {
	l := &coordinationv1.Lease{TypeMeta: typeMeta("coordination.k8s.io/v1", "Lease"), ObjectMeta: metav1.ObjectMeta{
		Name: ClaimName(c.Gateway.Name, c.Address), Namespace: c.Gateway.Namespace,
		Labels: Labels(c.Gateway, ComponentAddress),
		Annotations: map[string]string{
			AnnotationDevice:  c.Holder.String(),
			AnnotationAddress: c.Address.String(),
			AnnotationGateway: c.Gateway.String(),
		},
		OwnerReferences: ownedBy(model.KindGateway, c.Gateway.Name, gateway),
	}}
	l.Spec.HolderIdentity = new(c.Holder.ID.String())
	return l
}

// ParseClaim reads a claim from its Lease; ok is false for what is none.
func ParseClaim(o metav1.Object) (c Claim, ok bool) {
	a := o.GetAnnotations()
	addr, err := netip.ParseAddr(a[AnnotationAddress])
	holder := strings.Split(a[AnnotationDevice], "/")
	ns, name, found := strings.Cut(a[AnnotationGateway], "/")
	if err != nil || len(holder) != 3 || !found || ns != o.GetNamespace() {
		return Claim{}, false
	}
	c = Claim{
		Gateway: model.ID{Namespace: ns, Name: name}, Address: addr,
		Holder: Holder{model.ID{Namespace: holder[0], Name: holder[1]}, types.UID(holder[2])},
	}
	return c, o.GetName() == ClaimName(name, addr)
}

// Keys are a device's key pair, and its configuration when that is known.
type Keys struct {
	Private secret.Bytes
	Public  netstate.Key
	Config  secret.Bytes // zero: not known yet
}

// Secret is what a person takes to a device, owned by the Device.
func (k Keys) Secret(h Holder) *corev1.Secret {
	s := &corev1.Secret{
		TypeMeta: typeMeta("v1", "Secret"),
		ObjectMeta: metav1.ObjectMeta{
			Name: DeviceSecret(h.Name), Namespace: h.Namespace,
			Labels:          map[string]string{LabelName: Name, LabelComponent: ComponentDevice, LabelManagedBy: Operator},
			OwnerReferences: ownedBy(model.KindDevice, h.Name, h.UID),
		},
		Type: corev1.SecretTypeOpaque,
		Data: map[string][]byte{
			SecretPrivateKey: []byte(base64.StdEncoding.EncodeToString(k.Private.Reveal())),
			SecretPublicKey:  []byte(k.Public.String()),
		},
	}
	if !k.Config.IsZero() {
		s.Data[SecretConfig] = k.Config.Reveal()
	}
	return s
}
