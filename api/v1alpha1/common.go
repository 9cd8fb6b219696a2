package v1alpha1

// CIDR is an IPv4 or IPv6 range such as "10.0.0.0/8" or "fd00:12::/48". Bits after the
// prefix length must be zero. IPv4 ranges are written as IPv4.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=43
// +kubebuilder:validation:XValidation:rule="isCIDR(self)",message="must be a range in CIDR notation, such as 10.1.0.0/16 or fd00:12::/48"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || cidr(self) == cidr(self).masked()",message="has bits set after the prefix length; write the range's first address"
type CIDR string

// RoutedCIDR is a CIDR that Culvert routes, or that traffic is sent to: it must not
// overlap what can never be on the far side of a tunnel or inside a cluster, which is
// 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255, ::, ::1,
// ::ffff:0:0/96, fe80::/10 and ff00::/8. That excludes 0.0.0.0/0, ::/0 and their halves.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=43
// +kubebuilder:validation:XValidation:rule="isCIDR(self)",message="must be a range in CIDR notation, such as 10.1.0.0/16 or fd00:12::/48"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || cidr(self) == cidr(self).masked()",message="has bits set after the prefix length; write the range's first address"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || !['0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '255.255.255.255/32', '::/127', 'fe80::/10', 'ff00::/8'].exists(r, cidr(r).containsCIDR(self) || cidr(self).containsCIDR(r))",message="overlaps a reserved range (this network, loopback, link-local, multicast, broadcast or unspecified); name the ranges that really are there"
type RoutedCIDR string

// IP is an IPv4 or IPv6 address without a zone, such as "10.1.2.3" or "fd00:12::1".
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=39
// +kubebuilder:validation:XValidation:rule="isIP(self)",message="must be an IP address, such as 10.1.2.3 or fd00:12::1"
type IP string

// Key is a WireGuard public key: 32 bytes in base64, as "wg pubkey" prints it.
//
// +kubebuilder:validation:MaxLength=44
// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$')",message="must be a WireGuard key: 32 bytes in base64, 44 characters ending in '='"
// +kubebuilder:validation:XValidation:rule="self != 'AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA='",message="is all zeros, which is no key; run 'wg pubkey' on the far side and use what it prints"
type Key string

// Host is an IP address or a DNS name.
//
// +kubebuilder:validation:MaxLength=253
// +kubebuilder:validation:XValidation:rule="isIP(self) || (self.matches('^([a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?[.])*[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?$') && !self.matches('^[0-9.]+$'))",message="must be an IP address or a DNS name"
type Host string

// HostPort is an IP address or DNS name with a port: "vpn.example.com:51820",
// "192.0.2.1:51820" or "[2001:db8::1]:51820".
//
// +kubebuilder:validation:MaxLength=261
// +kubebuilder:validation:XValidation:rule="self.matches('^([^\\\\[\\\\]:]+|[\\\\[][0-9a-fA-F:.]+[\\\\]]):[0-9]{1,5}$')",message="must be host:port, such as vpn.example.com:51820, 192.0.2.1:51820 or [2001:db8::1]:51820"
type HostPort string

// Namespace is the name of a namespace, or "*" for all of them.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^([*]|[a-z0-9]([-a-z0-9]*[a-z0-9])?)$')",message="must be the name of a namespace, or * for all"
type Namespace string

// Identity is what an IKE peer calls itself: an IP address, a DNS name, an e-mail address
// or a distinguished name such as "C=DE, O=Example, CN=vpn". Control characters, quotes,
// braces, backslashes and '#' are refused, and so are wildcards: one identity, one peer.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=255
// +kubebuilder:validation:XValidation:rule="self.matches('^[^\\\\x00-\\\\x1f\\\\x7f\\\"{}\\\\\\\\#%*]+$')",message="must not contain control characters, quotes, braces, backslashes, '#', '%' or '*'"
// +kubebuilder:validation:XValidation:rule="!self.matches('^[ ]|[ ]$')",message="must not begin or end with a blank"
type Identity string

// GatewayReference names a VPNGateway.
type GatewayReference struct {
	// Name of the VPNGateway.
	//
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`

	// Namespace of the VPNGateway; empty: the object's own. A gateway in another namespace
	// must allow it (allowedSites, allowedDevices).
	//
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace,omitempty"`
}

// SecretReference names a Secret in the object's own namespace.
type SecretReference struct {
	// Name of the Secret.
	//
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// SecretKeyReference names one key of a Secret in the object's own namespace.
type SecretKeyReference struct {
	// Name of the Secret.
	//
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`

	// Key in the Secret's data.
	//
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[-._a-zA-Z0-9]+$`
	Key string `json:"key"`
}

// AccessTarget is a kind of place that can be reached through a gateway.
//
// +kubebuilder:validation:Enum=Pods;Services;Nodes;Sites
type AccessTarget string

// The places that can be reached.
const (
	AccessPods     AccessTarget = "Pods"     // the gateway's cluster.podCIDRs
	AccessServices AccessTarget = "Services" // ports of Services in cluster.serviceCIDRs
	AccessNodes    AccessTarget = "Nodes"    // the gateway's cluster.nodeCIDRs
	AccessSites    AccessTarget = "Sites"    // the ranges of the gateway's (other) sites
)

// Access says where connections may be opened to. Replies always pass; connections in the
// other direction, out of the cluster, are not limited by it.
type Access struct {
	// To lists the places. Absent: Pods and Services. Empty: none, the far side can only
	// answer. For an IPsec site it also decides the local traffic selectors.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=4
	// +kubebuilder:default={Pods,Services}
	To []AccessTarget `json:"to,omitzero"`
}

// Condition types, kept with their observedGeneration on every kind.
const (
	ConditionAccepted     = "Accepted"     // the object is valid and fits the others
	ConditionResolvedRefs = "ResolvedRefs" // everything that it refers to is there
	ConditionProgrammed   = "Programmed"   // it is in effect in the data plane
	ConditionReady        = "Ready"        // Culvert did its part
	ConditionConnected    = "Connected"    // the far side is there
)
