package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// VPNGateway terminates the tunnels of sites and devices and forwards between them and a
// cluster, or, standalone, a local network.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=vpngateways,singular=vpngateway,shortName=vgw,categories=culvert
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Address",type=string,JSONPath=`.status.address`
// +kubebuilder:printcolumn:name="Sites",type=integer,JSONPath=`.status.sites`
// +kubebuilder:printcolumn:name="Devices",type=integer,JSONPath=`.status.devices`
// +kubebuilder:printcolumn:name="Services",type=string,priority=1,JSONPath=`.spec.clusterTraffic.services`
// +kubebuilder:printcolumn:name="Source",type=string,priority=1,JSONPath=`.spec.clusterTraffic.source`
// +kubebuilder:printcolumn:name="Public key",type=string,priority=1,JSONPath=`.status.publicKey`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type VPNGateway struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	//
	// +optional
	// +kubebuilder:default={}
	Spec VPNGatewaySpec `json:"spec,omitempty"`

	// Status is what was found and done.
	//
	// +optional
	Status VPNGatewayStatus `json:"status,omitempty"`
}

// VPNGatewayList is a list of VPNGateways.
//
// +kubebuilder:object:root=true
type VPNGatewayList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VPNGateway `json:"items"`
}

// VPNGatewaySpec is what is wanted of a gateway.
type VPNGatewaySpec struct {
	// Cluster names the ranges behind the gateway. In a cluster, what is left out is found
	// and shown in status. A standalone gateway puts its own network into nodeCIDRs.
	//
	// +optional
	Cluster ClusterRanges `json:"cluster,omitzero"`

	// DeviceCIDRs are the ranges that Devices get their addresses from. The first usable
	// address of each is the gateway's own. An IPv4 range has at most 30 bits of prefix, an
	// IPv6 range at most 126. Empty: no devices.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:XValidation:rule="!isCIDR(self) || cidr(self).prefixLength() <= (cidr(self).ip().family() == 4 ? 30 : 126)",message="has no room for a gateway and a device: the prefix length must be at most 30 (IPv4) or 126 (IPv6)"
	DeviceCIDRs []RoutedCIDR `json:"deviceCIDRs,omitempty"`

	// AllowedSites says which namespaces may attach which ranges as Sites; one matching
	// entry is enough for each range. Empty: the gateway's own namespace, any range that is
	// not reserved.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	AllowedSites []AllowedSites `json:"allowedSites,omitempty"`

	// AllowedDevices says which namespaces may attach Devices.
	//
	// +optional
	AllowedDevices AllowedDevices `json:"allowedDevices,omitzero"`

	// Expose says how the far sides reach the gateway.
	//
	// +optional
	// +kubebuilder:default={}
	Expose Expose `json:"expose,omitzero"`

	// WireGuard has the settings of the one WireGuard device.
	//
	// +optional
	// +kubebuilder:default={}
	WireGuard WireGuardListener `json:"wireguard,omitzero"`

	// IPsec has the settings that all IPsec sites share.
	//
	// +optional
	IPsec IPsecListener `json:"ipsec,omitzero"`

	// ClusterTraffic says how traffic from the tunnels enters the cluster.
	//
	// +optional
	// +kubebuilder:default={}
	ClusterTraffic ClusterTraffic `json:"clusterTraffic,omitzero"`

	// MTU of the tunnels' links, in bytes of an inner packet. Absent: worked out from the
	// link that the tunnels run over.
	//
	// +optional
	// +kubebuilder:validation:Minimum=1280
	// +kubebuilder:validation:Maximum=9000
	MTU *int32 `json:"mtu,omitempty"`

	// Replicas is the number of gateway pods: one works, the others stand by. A standalone
	// gateway ignores it.
	//
	// +optional
	// +kubebuilder:default=1
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=32
	Replicas *int32 `json:"replicas,omitempty"`

	// DNS lists the name servers that devices are told to use. They should be reachable
	// through the tunnel.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=4
	DNS []IP `json:"dns,omitempty"`
}

// ClusterRanges are the ranges behind a gateway.
type ClusterRanges struct {
	// PodCIDRs are the ranges of pod addresses.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	PodCIDRs []RoutedCIDR `json:"podCIDRs,omitempty"`

	// ServiceCIDRs are the ranges of Service addresses.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=16
	ServiceCIDRs []RoutedCIDR `json:"serviceCIDRs,omitempty"`

	// NodeCIDRs are the ranges of node addresses; on a standalone gateway, the local
	// network.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	NodeCIDRs []RoutedCIDR `json:"nodeCIDRs,omitempty"`
}

// AllowedSites lets namespaces attach ranges.
type AllowedSites struct {
	// Namespaces that this entry is for; "*": all. Empty: the gateway's own.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	Namespaces []Namespace `json:"namespaces,omitempty"`

	// CIDRs that a Site's ranges must lie in. Empty: any range that is not reserved.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	CIDRs []CIDR `json:"cidrs,omitempty"`
}

// AllowedDevices lets namespaces attach devices.
type AllowedDevices struct {
	// Namespaces whose Devices may use this gateway; "*": all. Empty: the gateway's own.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	Namespaces []Namespace `json:"namespaces,omitempty"`
}

// ExposeType is a way to make a gateway reachable.
//
// +kubebuilder:validation:Enum=LoadBalancer;NodePort;HostPort;None
type ExposeType string

// The ways to make a gateway reachable.
const (
	ExposeLoadBalancer ExposeType = "LoadBalancer" // a Service of that type
	ExposeNodePort     ExposeType = "NodePort"     // a Service of that type
	ExposeHostPort     ExposeType = "HostPort"     // ports of the node that the pod runs on
	ExposeNone         ExposeType = "None"         // nothing: somebody else does it
)

// Expose says how the far sides reach a gateway.
//
// +kubebuilder:validation:XValidation:rule="!has(self.loadBalancerClass) || self.type == 'LoadBalancer'",message="loadBalancerClass needs type LoadBalancer"
// +kubebuilder:validation:XValidation:rule="!has(self.annotations) || self.annotations.size() == 0 || self.type == 'LoadBalancer' || self.type == 'NodePort'",message="annotations are put on the Service, and this type has none; use LoadBalancer or NodePort"
type Expose struct {
	// Type of exposure.
	//
	// +optional
	// +kubebuilder:default=LoadBalancer
	Type ExposeType `json:"type,omitempty"`

	// Address where the far sides reach the gateway: an IP address or a DNS name. Absent:
	// what the load balancer got, or nothing.
	//
	// +optional
	Address Host `json:"address,omitempty"`

	// Annotations of the Service.
	//
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	Annotations map[string]string `json:"annotations,omitempty"`

	// LoadBalancerClass of the Service.
	//
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	LoadBalancerClass string `json:"loadBalancerClass,omitempty"`
}

// WireGuardListener has the settings of a gateway's WireGuard device.
type WireGuardListener struct {
	// Port is the UDP port.
	//
	// +optional
	// +kubebuilder:default=51820
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	// +kubebuilder:validation:XValidation:rule="self != 500 && self != 4500",message="ports 500 and 4500 are taken by IKE; 51820 is WireGuard's usual one"
	Port int32 `json:"port,omitempty"`
}

// IPsecListener has the settings that all IPsec sites of a gateway share.
type IPsecListener struct {
	// LocalID is what the gateway calls itself, for sites that do not say otherwise.
	// Absent: its address, or the subject of its certificate.
	//
	// +optional
	LocalID Identity `json:"localID,omitempty"`
}

// ServicesMode says how traffic from tunnels to Service addresses reaches a backend.
//
// +kubebuilder:validation:Enum=Translate;Proxy;Route
type ServicesMode string

// The ways to reach a backend.
const (
	ServicesTranslate ServicesMode = "Translate" // the gateway translates the destination, as kube-proxy does
	ServicesProxy     ServicesMode = "Proxy"     // the gateway relays connections
	ServicesRoute     ServicesMode = "Route"     // the node translates: the packets are passed on as they are
)

// SourceMode says which source address the cluster sees.
//
// +kubebuilder:validation:Enum=Preserve;Masquerade
type SourceMode string

// Which source address the cluster sees.
const (
	SourcePreserve   SourceMode = "Preserve"   // the far side's own; both directions work
	SourceMasquerade SourceMode = "Masquerade" // the gateway's; connections into the cluster only
)

// NodeLink says how gateways and nodes exchange site and device traffic.
//
// +kubebuilder:validation:Enum=Encapsulated;Direct;CiliumEndpoint
type NodeLink string

// How gateways and nodes exchange site and device traffic.
const (
	NodeLinkEncapsulated   NodeLink = "Encapsulated"   // a link of our own; works on any network
	NodeLinkDirect         NodeLink = "Direct"         // plain next hop; for flat networks that allow it
	NodeLinkCiliumEndpoint NodeLink = "CiliumEndpoint" // Cilium is told that the gateway pod has the ranges
)

// ClusterTraffic says how traffic from the tunnels enters the cluster.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.services) && self.services == 'Route' && (!has(self.source) || self.source == 'Preserve'))",message="services: Route cannot work with source: Preserve: the node's replies would not come back through the gateway; use services: Translate, or source: Masquerade"
type ClusterTraffic struct {
	// Services says how traffic to Service addresses reaches a backend.
	//
	// +optional
	// +kubebuilder:default=Translate
	Services ServicesMode `json:"services,omitempty"`

	// Source says which source address the cluster sees.
	//
	// +optional
	// +kubebuilder:default=Preserve
	Source SourceMode `json:"source,omitempty"`

	// NodeLink says how gateways and nodes exchange site and device traffic.
	//
	// +optional
	// +kubebuilder:default=Encapsulated
	NodeLink NodeLink `json:"nodeLink,omitempty"`
}

// VPNGatewayStatus is what was found and done.
type VPNGatewayStatus struct {
	// ObservedGeneration is the generation of the spec that this status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Conditions: Accepted, ResolvedRefs, Programmed, Ready.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Address where the far sides reach the gateway: an IP address or a DNS name.
	//
	// +optional
	Address string `json:"address,omitempty"`

	// WireGuardPort is the UDP port where the far sides reach the gateway, when it is not
	// spec.wireguard.port: a Service of type NodePort.
	//
	// +optional
	WireGuardPort int32 `json:"wireguardPort,omitempty"`

	// PublicKey is the gateway's WireGuard public key.
	//
	// +optional
	PublicKey string `json:"publicKey,omitempty"`

	// Cluster shows the ranges in use: those of the spec, or those found.
	//
	// +optional
	Cluster ClusterRangesStatus `json:"cluster,omitzero"`

	// NodeLink is the one in use: that of the spec once it is accepted, and until then, also where
	// the network plugin cannot carry that, the last one that was. Absent: none is in use.
	//
	// +optional
	NodeLink NodeLink `json:"nodeLink,omitempty"`

	// Sites is the number of accepted Sites.
	//
	// +optional
	Sites int32 `json:"sites,omitempty"`

	// Devices is the number of accepted Devices.
	//
	// +optional
	Devices int32 `json:"devices,omitempty"`

	// Replicas shows each gateway pod; a pod writes its own entry only.
	//
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=32
	Replicas []GatewayReplica `json:"replicas,omitempty"`

	// Endpoints are where the gateway pods are inside the cluster: the nodes find them here.
	// A pod writes its own entry only; the one that takes over also says that the other is not
	// active any more.
	//
	// +optional
	// +listType=map
	// +listMapKey=pod
	// +kubebuilder:validation:MaxItems=32
	Endpoints []GatewayEndpoint `json:"endpoints,omitempty"`
}

// GatewayEndpoint is where one gateway pod is inside the cluster.
type GatewayEndpoint struct {
	// Pod is the name of the pod.
	Pod string `json:"pod"`

	// Node is where the pod runs.
	//
	// +optional
	Node string `json:"node,omitempty"`

	// PodIPs are the pod's addresses, at most one IPv4 and one IPv6 address.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=2
	PodIPs []IP `json:"podIPs,omitempty"`

	// HostIPs are the addresses of the node, at most one IPv4 and one IPv6 address.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=2
	HostIPs []IP `json:"hostIPs,omitempty"`

	// Active says that the nodes send traffic for sites and devices to this pod.
	//
	// +optional
	Active bool `json:"active,omitempty"`
}

// ClusterRangesStatus shows the ranges in use.
type ClusterRangesStatus struct {
	// PodCIDRs in use.
	//
	// +optional
	// +listType=atomic
	PodCIDRs []string `json:"podCIDRs,omitempty"`

	// ServiceCIDRs in use.
	//
	// +optional
	// +listType=atomic
	ServiceCIDRs []string `json:"serviceCIDRs,omitempty"`

	// NodeCIDRs in use.
	//
	// +optional
	// +listType=atomic
	NodeCIDRs []string `json:"nodeCIDRs,omitempty"`
}

// GatewayReplica shows one gateway pod.
type GatewayReplica struct {
	// Name of the pod.
	Name string `json:"name"`

	// NodeName is where it runs.
	//
	// +optional
	NodeName string `json:"nodeName,omitempty"`

	// WireGuardDatapath is "kernel" or "userspace"; empty when WireGuard is not used.
	//
	// +optional
	WireGuardDatapath string `json:"wireguardDatapath,omitempty"`

	// IPsecDatapath is "kernel" or "libipsec"; empty when IPsec is not used.
	//
	// +optional
	IPsecDatapath string `json:"ipsecDatapath,omitempty"`

	// MTU of the tunnels' links, in bytes of an inner packet.
	//
	// +optional
	MTU int32 `json:"mtu,omitempty"`
}
