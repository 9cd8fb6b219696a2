// Package model turns a snapshot of objects into parsed, cross-checked values.
//
// Parse is the only way in: the operator, the standalone gateway and "culvert validate"
// all run it, so they never disagree on what is valid. One broken object never takes
// another one down: it is left out of the result and named in the problems. The package
// touches no clock, file, socket or kernel.
package model

import (
	"net/netip"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// ID names an object within its kind; Namespace is empty for cluster-scoped kinds.
type ID struct{ Namespace, Name string }

// String is "namespace/name", or "name" for cluster-scoped objects.
func (id ID) String() string {
	if id.Namespace == "" {
		return id.Name
	}
	return id.Namespace + "/" + id.Name
}

// Model is what a snapshot means: every accepted object, parsed.
type Model struct {
	Gateways       []*Gateway // by ID
	RemoteClusters []*RemoteCluster
	NodeEncryption *NodeEncryption // nil: off
	Nodes          []Node          // by name; empty for a standalone gateway
	Problems       []Problem       // in the order of the objects; empty when all is well
}

// Problem is one reason why an object, or a part of one, is not in effect.
type Problem struct {
	Kind   string // "Site"
	Object ID
	Origin string // "site.yaml:12", or empty for objects from an API server
	Field  string // "spec.cidrs[1]"; empty: the object as a whole
	// Reason is the condition's reason, CamelCase: "InvalidSpec", "Overlap",
	// "NotAllowed", "ReservedRange", "MissingReference", "SecretNotFound", …
	Reason string
	// Message says in one line what is wrong, why, and what to do.
	Message string
	// Pending problems end by themselves (a reference that may still come): they do not
	// make "culvert validate" fail for the object's own sake.
	Pending bool
}

// Gateway is one VPNGateway with everything that is attached to it.
type Gateway struct {
	ID
	Generation int64

	Pods, ServiceRanges, Nodes []netip.Prefix
	DeviceRanges               []netip.Prefix

	Address       string // where peers dial: address or DNS name; may be empty
	WireGuardPort uint16 // never zero
	ServicesMode  netstate.ServicesMode
	Masquerade    bool   // clusterTraffic.source: Masquerade
	NodeLink      string // the one in use: Encapsulated, Direct or CiliumEndpoint
	AskedLink     string // that of the spec: the operator may not have accepted it (yet)
	MTU           int    // of the tunnel links; 0: worked out from the underlay
	DNS           []netip.Addr

	Expose   Expose
	Replicas int // of the gateway's pods; at least 1

	Sites   []*Site                // by ID
	Devices []*Device              // by ID; suspended and expired ones too
	Ports   []netstate.ServicePort // sorted, see netstate.CompareServicePorts
}

// Expose is how the far sides reach a gateway.
type Expose struct {
	Type              string            // LoadBalancer, NodePort, HostPort or None
	Annotations       map[string]string // of the Service
	LoadBalancerClass string
}

// Site is an accepted Site. Exactly one of IPsec and WireGuard is set.
type Site struct {
	ID
	Generation int64
	CIDRs      []netip.Prefix // masked, sorted
	Access     netstate.Access
	IPsec      *IPsecSite
	WireGuard  *WireGuardSite
}

// IPsecSite is how a site is reached over IKEv2.
type IPsecSite struct {
	Address       string // where the peer is: address or DNS name; empty: it dials in
	LocalAddress  string
	LocalID       string
	RemoteID      string
	Auth          netstate.IPsecAuth
	IKEProposals  []string // strongSwan's notation; never empty
	ESPProposals  []string
	Initiate      netstate.IPsecInitiate
	ChildPerPair  bool
	IKELifetime   time.Duration
	ChildLifetime time.Duration
	DPDDelay      time.Duration
}

// WireGuardSite is how a site is reached over WireGuard.
type WireGuardSite struct {
	PublicKey                  netstate.Key
	PresharedKey               secret.Bytes // zero: none
	Endpoint                   Endpoint     // zero: it dials in
	PersistentKeepaliveSeconds uint16
	// Probe finds out whether the tunnel carries packets; zero: nobody asks.
	Probe Probe
	// Alternatives are further gateways in front of the site, at most netstate.MostPaths - 1;
	// with any, every path has a Probe, with an address of its own.
	Alternatives []WireGuardPath
	// Preferred is the index of the path that is used while all carry packets: 0 is the one
	// above, the alternatives follow.
	Preferred int
}

// WireGuardPath is one of several tunnels to a site.
type WireGuardPath struct {
	PublicKey    netstate.Key
	PresharedKey secret.Bytes // zero: none
	Endpoint     Endpoint     // zero: it dials in
	Probe        Probe
}

// Paths are all tunnels to the site, at least one.
func (w *WireGuardSite) Paths() []WireGuardPath {
	return append([]WireGuardPath{{w.PublicKey, w.PresharedKey, w.Endpoint, w.Probe}}, w.Alternatives...)
}

// Probe is whom to ask through a tunnel, and as whom: two addresses of one family.
type Probe struct{ Address, Local netip.Addr }

// IsZero reports whether there is no probe.
func (p Probe) IsZero() bool { return p == Probe{} }

// Endpoint is a UDP endpoint whose host may be a DNS name.
type Endpoint struct {
	Host string
	Port uint16
}

// IsZero reports whether there is no endpoint.
func (e Endpoint) IsZero() bool { return e == Endpoint{} }

// Device is an accepted Device.
type Device struct {
	ID
	Generation   int64
	PublicKey    netstate.Key // zero: a key pair is to be made
	PresharedKey secret.Bytes // zero: none
	// Address is the wish of the spec, one per family at most; what is missing is
	// allocated by ipam.
	Addresses                  []netip.Addr
	Access                     netstate.Access
	PersistentKeepaliveSeconds uint16 // for the device's own configuration
	Suspended                  bool
	Expires                    time.Time // zero: never
}

// RemoteCluster is an accepted RemoteCluster.
type RemoteCluster struct {
	ID
	Generation int64
	UID        string // metadata.uid, or that of a predecessor (IdentityAnnotation); may be empty in manifests
	Targets    []Target
	Exports    []Export
	Replicas   int
	FrontName  string // server name; may be empty
	FrontHost  string // address or DNS name with port; may be empty
}

// Target is a set of destinations that may be dialled.
type Target struct {
	CIDRs []netip.Prefix
	Names []string // DNS names, lower case; "*." prefix allowed
	Ports []PortRange
}

// PortRange is an inclusive range of ports; never zero.
type PortRange struct{ First, Last uint16 }

// Export is one listener that the spoke offers, and where it comes out.
type Export struct {
	Name   string
	Listen netip.AddrPort
	Target string // "host:port", dialled on the hub's side
}

// NodeEncryption is the accepted NodeEncryption.
type NodeEncryption struct {
	ID
	Generation int64
	AllTraffic bool // scope: All
	Strict     bool
	Port       uint16
	// KeyLifetime is the age at which nodes change their keys; 0: when asked to only.
	KeyLifetime time.Duration
	// Enforced: Strict has been in effect in the cluster (condition Enforced of the status).
	Enforced bool
	Nodes    []NodeTunnel // by name
}

// NodeTunnel is one node's part.
type NodeTunnel struct {
	Name      string
	PublicKey netstate.Key
	// NextPublicKey is a key that the node is about to change to; zero: none.
	NextPublicKey netstate.Key
	// Ready: all other nodes have answered this one, as it says itself.
	Ready bool
}

// Node is a node of the cluster.
type Node struct {
	Name string
	// Addresses are the node's InternalIPs, sorted; most often one, or one per family.
	Addresses []netip.Addr
	// LinkAddresses are further addresses that the node sends from to gateway pods, as its
	// agent has found: those of its end of the CNI's bridge or overlay. Sorted.
	LinkAddresses []netip.Addr
	// PodCIDRs are the ranges of the pods on it (spec.podCIDRs), masked and sorted; empty when
	// the CNI assigns ranges in another way.
	PodCIDRs []netip.Prefix
	Zone     string // topology.kubernetes.io/zone; may be empty
}
