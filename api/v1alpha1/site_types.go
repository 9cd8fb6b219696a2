package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Site is a network that is joined through a gateway, over IPsec or WireGuard.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=sites,singular=site,shortName=vsite,categories=culvert
// +kubebuilder:printcolumn:name="Gateway",type=string,JSONPath=`.spec.gatewayRef.name`
// +kubebuilder:printcolumn:name="CIDRs",type=string,JSONPath=`.spec.cidrs`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Connected",type=string,JSONPath=`.status.conditions[?(@.type=="Connected")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Connected")].reason`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Connected")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Site struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	//
	// +required
	Spec SiteSpec `json:"spec"`

	// Status is what was found and done.
	//
	// +optional
	Status SiteStatus `json:"status,omitempty"`
}

// SiteList is a list of Sites.
//
// +kubebuilder:object:root=true
type SiteList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Site `json:"items"`
}

// SiteSpec is what is wanted of a site.
//
// +kubebuilder:validation:XValidation:rule="has(self.ipsec) != has(self.wireguard)",message="exactly one of ipsec and wireguard must be set"
type SiteSpec struct {
	// GatewayRef is the gateway that the site is joined through.
	//
	// +required
	GatewayRef GatewayReference `json:"gatewayRef"`

	// CIDRs are the site's ranges. They must not overlap each other, another site's or
	// device's ranges, or the cluster's.
	//
	// +required
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:XValidation:rule="!self.exists(a, isCIDR(a) && self.exists(b, b != a && isCIDR(b) && cidr(b).containsCIDR(a)))",message="a range must not lie in another one of the same site; leave it out"
	// +kubebuilder:validation:XValidation:rule="self.all(a, self.exists_one(b, b == a))",message="a range must not be listed twice"
	CIDRs []RoutedCIDR `json:"cidrs"`

	// Access says what the site may open connections to.
	//
	// +optional
	// +kubebuilder:default={}
	Access Access `json:"access,omitzero"`

	// IPsec joins the site over IKEv2 and ESP (RFC 7296, RFC 4303).
	//
	// +optional
	IPsec *SiteIPsec `json:"ipsec,omitempty"`

	// WireGuard joins the site over WireGuard.
	//
	// +optional
	WireGuard *SiteWireGuard `json:"wireguard,omitempty"`
}

// Initiate says who opens a connection.
//
// +kubebuilder:validation:Enum=Always;OnTraffic;Never
type Initiate string

// Who opens a connection.
const (
	InitiateAlways    Initiate = "Always"    // the gateway, at once, and again when it is lost
	InitiateOnTraffic Initiate = "OnTraffic" // the gateway, when there is something to send
	InitiateNever     Initiate = "Never"     // the site
)

// ChildSAs says how traffic selectors are spread over child SAs.
//
// +kubebuilder:validation:Enum=PerFamily;PerPair
type ChildSAs string

// How traffic selectors are spread over child SAs.
const (
	ChildSAsPerFamily ChildSAs = "PerFamily" // one child SA for all ranges of an address family
	ChildSAsPerPair   ChildSAs = "PerPair"   // one child SA for each pair of a local and a remote range
)

// SiteIPsec is how a site is reached over IKEv2. A site that dials in is told from others
// by its identity.
//
// +kubebuilder:validation:XValidation:rule="has(self.address) || has(self.remoteID)",message="a site without address dials in and is recognised by remoteID: set one of the two"
// +kubebuilder:validation:XValidation:rule="has(self.address) || !has(self.initiate) || self.initiate == 'Never'",message="initiate: Always and OnTraffic need address: the gateway must know where to connect to"
// +kubebuilder:validation:XValidation:rule="self.childLifetimeSeconds <= self.ikeLifetimeSeconds",message="childLifetimeSeconds must not be longer than ikeLifetimeSeconds"
type SiteIPsec struct {
	// Address where the site is: an IP address or a DNS name. Absent: the site dials in.
	//
	// +optional
	Address Host `json:"address,omitempty"`

	// LocalAddress is the gateway's address to use. Absent: any.
	//
	// +optional
	LocalAddress IP `json:"localAddress,omitempty"`

	// LocalID is what the gateway calls itself towards this site. Absent: the gateway's
	// spec.ipsec.localID, else its address or the subject of its certificate.
	//
	// +optional
	LocalID Identity `json:"localID,omitempty"`

	// RemoteID is what the site must call itself. Absent: its address.
	//
	// +optional
	RemoteID Identity `json:"remoteID,omitempty"`

	// Auth is how both sides prove who they are.
	//
	// +required
	Auth IPsecAuth `json:"auth"`

	// Proposals are the algorithms on offer. Absent: strong ones.
	//
	// +optional
	Proposals IPsecProposals `json:"proposals,omitzero"`

	// Initiate says who opens the connection. Absent: Always when there is an address,
	// else Never.
	//
	// +optional
	Initiate Initiate `json:"initiate,omitempty"`

	// ChildSAs says how traffic selectors are spread over child SAs. Some appliances accept
	// one range on each side of a child SA only: use PerPair for them.
	//
	// +optional
	// +kubebuilder:default=PerFamily
	ChildSAs ChildSAs `json:"childSAs,omitempty"`

	// IKELifetimeSeconds is the time after which the IKE SA is rekeyed.
	//
	// +optional
	// +kubebuilder:default=14400
	// +kubebuilder:validation:Minimum=10
	// +kubebuilder:validation:Maximum=604800
	IKELifetimeSeconds int32 `json:"ikeLifetimeSeconds,omitempty"`

	// ChildLifetimeSeconds is the time after which a child SA is rekeyed.
	//
	// +optional
	// +kubebuilder:default=3600
	// +kubebuilder:validation:Minimum=10
	// +kubebuilder:validation:Maximum=604800
	ChildLifetimeSeconds int32 `json:"childLifetimeSeconds,omitempty"`

	// DPDDelaySeconds is the time of silence after which the gateway asks whether the site
	// is still there (RFC 7296, section 2.4); 0: never.
	//
	// +optional
	// +kubebuilder:default=10
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=3600
	DPDDelaySeconds *int32 `json:"dpdDelaySeconds,omitempty"`
}

// IPsecAuth is how both sides prove who they are.
//
// +kubebuilder:validation:XValidation:rule="has(self.presharedKeySecretRef) != has(self.certificate)",message="exactly one of presharedKeySecretRef and certificate must be set"
type IPsecAuth struct {
	// PresharedKeySecretRef names a key that both sides know: at least 8 bytes, better 32
	// random ones. A newline at its end is not part of it.
	//
	// +optional
	PresharedKeySecretRef *SecretKeyReference `json:"presharedKeySecretRef,omitempty"`

	// Certificate uses X.509 certificates on both sides.
	//
	// +optional
	Certificate *IPsecCertificate `json:"certificate,omitempty"`
}

// IPsecCertificate names the gateway's certificate and those who may vouch for the site.
type IPsecCertificate struct {
	// CertificateSecretRef names a Secret of type kubernetes.io/tls: the gateway's
	// certificate with intermediates in tls.crt, its private key in tls.key, both PEM.
	//
	// +required
	CertificateSecretRef SecretReference `json:"certificateSecretRef"`

	// CASecretRef names the PEM certificates of the authorities that the site's certificate
	// must come from.
	//
	// +required
	CASecretRef SecretKeyReference `json:"caSecretRef"`

	// CRLSecretRef names PEM certificate revocation lists.
	//
	// +optional
	CRLSecretRef *SecretKeyReference `json:"crlSecretRef,omitempty"`
}

// Proposal is one set of algorithms in strongSwan's notation: keywords joined by '-', such
// as "aes256gcm16-prfsha384-ecp384".
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=255
// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9_]+(-[a-z0-9_]+)*$')",message="must be algorithm keywords joined by '-', such as aes256gcm16-prfsha384-ecp384"
type Proposal string

// WeakAlgorithm is the keyword of an algorithm that is refused unless it is listed.
//
// +kubebuilder:validation:Enum=3des;des;null;cast128;blowfish;blowfish128;blowfish192;blowfish256;md5;md5_128;sha;sha1;sha1_160;sha256_96;sha2_256_96;prfmd5;prfsha1;modpnull;modpnone;modp768;modp1024;modp1024s160;modp1536;modp2048s224;modp2048s256;ecp192;ecp224;ecp224bp
type WeakAlgorithm string

// IPsecProposals are the algorithms on offer, best first.
type IPsecProposals struct {
	// IKE proposals: encryption, (integrity,) pseudo-random function, key exchange. Absent:
	// AES-256-GCM with SHA-384 or SHA-256 and curve25519, ecp384 or modp4096.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	IKE []Proposal `json:"ike,omitempty"`

	// ESP proposals: encryption, (integrity,) key exchange for perfect forward secrecy.
	// Absent: AES-256-GCM with curve25519, ecp384 or modp4096, or, last, without a key
	// exchange of its own.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	ESP []Proposal `json:"esp,omitempty"`

	// AllowWeak lists, by keyword, the weak algorithms that ike and esp may name, for
	// appliances that know no better. Listing one does not offer it.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	AllowWeak []WeakAlgorithm `json:"allowWeak,omitempty"`
}

// SiteWireGuard is how a site is reached over WireGuard.
//
// +kubebuilder:validation:XValidation:rule="!has(self.alternatives) || size(self.alternatives) == 0 || has(self.probe)",message="alternatives need probe, to find out which tunnel carries packets"
type SiteWireGuard struct {
	// PublicKey of the site.
	//
	// +required
	PublicKey Key `json:"publicKey"`

	// Endpoint where the site is. Absent: the site dials in. It must not lie in the site's
	// own ranges.
	//
	// +optional
	Endpoint HostPort `json:"endpoint,omitempty"`

	// PresharedKeySecretRef names a WireGuard pre-shared key: 32 bytes in base64, as
	// "wg genpsk" prints it.
	//
	// +optional
	PresharedKeySecretRef *SecretKeyReference `json:"presharedKeySecretRef,omitempty"`

	// PersistentKeepaliveSeconds is the interval at which the gateway sends something, to
	// keep a NAT on its own side open; 0 or absent: off.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=65535
	PersistentKeepaliveSeconds int32 `json:"persistentKeepaliveSeconds,omitempty"`

	// Probe finds out whether the tunnel carries packets. Needed with alternatives.
	//
	// +optional
	Probe *Probe `json:"probe,omitempty"`

	// Alternatives are further gateways in front of the same site. The gateway holds a tunnel
	// to each. What it opens goes through one of them: the preferred one while that answers
	// probes, else the next one that does; what the site opens is answered the way it came.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=3
	Alternatives []WireGuardAlternative `json:"alternatives,omitempty"`

	// Prefer says which tunnel is used while all of them answer. First (the default): the one
	// of publicKey. EvenOdd: that one when the last byte of probe.localAddress is even, else
	// the first alternative, so that many clusters spread over two gateways (with more of
	// them: the remainder of a division by their number).
	//
	// +optional
	Prefer PathPreference `json:"prefer,omitempty"`
}

// PathPreference says which tunnel to a site is used while several answer.
//
// +kubebuilder:validation:Enum=First;EvenOdd
type PathPreference string

// Which tunnel is preferred.
const (
	PreferFirst   PathPreference = "First"
	PreferEvenOdd PathPreference = "EvenOdd"
)

// WireGuardAlternative is a further gateway in front of a site.
type WireGuardAlternative struct {
	// PublicKey of this gateway; no two have the same one.
	//
	// +required
	PublicKey Key `json:"publicKey"`

	// Endpoint where it is. Absent: it dials in. It must not lie in the site's own ranges.
	//
	// +optional
	Endpoint HostPort `json:"endpoint,omitempty"`

	// PresharedKeySecretRef names a WireGuard pre-shared key.
	//
	// +optional
	PresharedKeySecretRef *SecretKeyReference `json:"presharedKeySecretRef,omitempty"`

	// Probe finds out whether this tunnel carries packets.
	//
	// +required
	Probe Probe `json:"probe"`
}

// Probe is whom to ask through a tunnel, and as whom. Both addresses are of one family.
type Probe struct {
	// Address that answers ICMP echo requests at the far end of the tunnel and is reached
	// through no other one: most often the far gateway's own tunnel address.
	//
	// +required
	Address IP `json:"address"`

	// LocalAddress is this gateway's own address in the tunnel, as the far gateway allows
	// it: the address that it gives to this gateway as a Device, or one of the ranges that
	// it expects from this gateway as a Site.
	//
	// +required
	LocalAddress IP `json:"localAddress"`
}

// SiteStatus is what was found and done.
type SiteStatus struct {
	// ObservedGeneration is the generation of the spec that this status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Conditions: Accepted, ResolvedRefs, Programmed, Ready, Connected.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Paths shows the site as each gateway pod sees it; a pod writes its own entry only.
	//
	// +optional
	// +listType=map
	// +listMapKey=replica
	// +kubebuilder:validation:MaxItems=32
	Paths []SitePath `json:"paths,omitempty"`
}

// PathState says whether a path carries traffic.
//
// +kubebuilder:validation:Enum=Up;Down
type PathState string

// Whether a path carries traffic.
const (
	PathUp   PathState = "Up"
	PathDown PathState = "Down"
)

// SitePath is a site as one gateway pod sees it.
type SitePath struct {
	// Replica is the name of the gateway pod.
	Replica string `json:"replica"`

	// State of the path.
	//
	// +optional
	State PathState `json:"state,omitempty"`

	// Endpoint is where the site was last seen, as address:port.
	//
	// +optional
	Endpoint string `json:"endpoint,omitempty"`

	// LastTransitionTime is when the state last changed.
	//
	// +optional
	LastTransitionTime *metav1.Time `json:"lastTransitionTime,omitempty"`

	// Message says in one line why the path is down.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Message string `json:"message,omitempty"`
}
