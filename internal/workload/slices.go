package workload

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/internal/model"
)

// GatewayPod is where one pod of a gateway is.
type GatewayPod struct {
	Name, Node string
	IPs        []netip.Addr // at most one per family
}

// SliceName names the EndpointSlice of a gateway's Service for a family.
func SliceName(gateway string, family discoveryv1.AddressType) string {
	return GatewayName(gateway) + "-" + strings.ToLower(string(family))
}

// EndpointSlices lead a gateway's Service, whose UID is given, to one pod: UDP 500 and 4500
// and WireGuard's port always to the same one. They go with the Service.
func EndpointSlices(gw *model.Gateway, service types.UID, pod GatewayPod) []*discoveryv1.EndpointSlice {
	var out []*discoveryv1.EndpointSlice
	for _, ip := range pod.IPs {
		family := discoveryv1.AddressTypeIPv4
		if ip.Is6() {
			family = discoveryv1.AddressTypeIPv6
		}
		labels := Labels(gw.ID, ComponentGateway)
		labels[LabelManagedBy] = "culvert-gateway"
		labels[discoveryv1.LabelServiceName] = GatewayName(gw.Name)
		labels[discoveryv1.LabelManagedBy] = "gateway.culvert.dev"
		s := &discoveryv1.EndpointSlice{
			TypeMeta: typeMeta("discovery.k8s.io/v1", "EndpointSlice"),
			ObjectMeta: metav1.ObjectMeta{
				Namespace: gw.Namespace, Name: SliceName(gw.Name, family), Labels: labels,
				OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: GatewayName(gw.Name), UID: service}},
			},
			AddressType: family,
			Endpoints: []discoveryv1.Endpoint{{
				Addresses: []string{ip.String()}, Conditions: discoveryv1.EndpointConditions{Ready: new(true)},
				TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: gw.Namespace, Name: pod.Name},
			}},
		}
		if pod.Node != "" {
			s.Endpoints[0].NodeName = new(pod.Node)
		}
		for _, p := range udpPorts(gw) {
			s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: new(p.name), Port: new(p.port), Protocol: new(corev1.ProtocolUDP)})
		}
		out = append(out, s)
	}
	return out
}

// SameEndpoints reports whether an EndpointSlice leads to where another does; b may be nil.
func SameEndpoints(a, b *discoveryv1.EndpointSlice) bool {
	if b == nil || !slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y discoveryv1.Endpoint) bool {
		return slices.Equal(x.Addresses, y.Addresses) && equality.Semantic.DeepEqual(x.NodeName, y.NodeName)
	}) {
		return false
	}
	return equality.Semantic.DeepEqual(a.Ports, b.Ports)
}
