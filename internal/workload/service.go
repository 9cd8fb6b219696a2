package workload

import (
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// UDP ports of IKE and of ESP in UDP (RFC 7296, section 2; RFC 3948).
const (
	portIKE  = 500
	portNATT = 4500
)

// Names of the ports of a gateway's Service and containers.
const (
	PortWireGuard = "wireguard"
	PortIKE       = "ike"
	PortNATT      = "ipsec-nat-t"
)

// Node ports that Kubernetes hands out, unless its API server was told otherwise.
const (
	firstNodePort = 30000
	lastNodePort  = 32767
)

type udpPort struct {
	name string
	port int32
}

func udpPorts(gw *model.Gateway) []udpPort {
	return []udpPort{{PortWireGuard, int32(gw.WireGuardPort)}, {PortIKE, portIKE}, {PortNATT, portNATT}}
}

// service is how the far sides reach the gateway; nil when that is not by a Service.
//
// A load balancer keeps the peers' addresses (externalTrafficPolicy: Local): the limits for
// strangers' handshakes are per address. With node ports any node's address leads to the
// gateway (Cluster): far sides know one node, and the gateway may run on another one.
//
// It selects no pods: the one that works puts itself into its EndpointSlices.
func service(gw *model.Gateway, meta metav1.ObjectMeta) *corev1.Service {
	s := &corev1.Service{TypeMeta: typeMeta("v1", "Service"), ObjectMeta: meta}
	s.Annotations = maps.Clone(gw.Expose.Annotations)
	s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack)
	switch v1alpha1.ExposeType(gw.Expose.Type) {
	case v1alpha1.ExposeLoadBalancer:
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		if c := gw.Expose.LoadBalancerClass; c != "" {
			s.Spec.LoadBalancerClass = &c
		}
	case v1alpha1.ExposeNodePort:
		s.Spec.Type = corev1.ServiceTypeNodePort
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	default:
		return nil
	}
	for _, p := range udpPorts(gw) {
		x := corev1.ServicePort{Name: p.name, Protocol: corev1.ProtocolUDP, Port: p.port, TargetPort: intstr.FromString(p.name)}
		if s.Spec.Type == corev1.ServiceTypeNodePort && p.port >= firstNodePort && p.port <= lastNodePort {
			x.NodePort = p.port
		}
		s.Spec.Ports = append(s.Spec.Ports, x)
	}
	return s
}
