// Package netstate is the desired network configuration of one host or pod, as plain
// data: what lies between the pure half of Culvert (objects, model, plan) and the half
// that touches the kernel (the appliers).
//
// A State is sorted (Sort), comparable (Diff) and printable (Lines, String); printing
// never shows a key. The package knows neither Kubernetes nor how anything is applied.
package netstate

import (
	"net/netip"
	"time"

	"github.com/culvert-vpn/culvert/internal/secret"
)

// RouteProtocol marks every route and rule that Culvert owns (rtm_protocol, see
// rtnetlink(7); 0–4 and the numbers in iproute2's rt_protos are taken by others).
const RouteProtocol = 196

// Table is the routing table for tunnel routes. It is looked up before main, so that a
// range that belongs to a tunnel never follows another route.
const Table = 19600

// Priorities of our routing rules.
const (
	RulePriorityOuter  = 19600 // encapsulated packets (MarkOuter): main
	RulePriorityProxy  = 19601 // relayed packets (MarkProxy): local delivery
	RulePriorityPath   = 19601 // pinned packets (MarkPath): the path's table
	RulePriorityTunnel = 19602 // everything else: Table
)

// NodeTable is the routing table of the node link: on a node, the ranges of sites and
// devices; in a gateway's pod, the nodes and their pods.
const NodeTable = 19610

// Priorities of the rules that lead to NodeTable.
const (
	RulePriorityForwarded = 19603 // in a gateway's pod: what it forwards, never its own packets
	RulePriorityNode      = 19610 // on a node: everything
)

// ProxyTable holds the local default route for packets that the relay accepts.
const ProxyTable = 19601

// RelayPort is the port that the relay listens on, TCP and UDP, on 127.0.0.1 and ::1;
// TPROXY hands it the packets.
const RelayPort = 19605

// Marks set on packets and sockets. Mark bits outside MarkMask are never touched. Connection
// marks (ct mark) are used for two things: the mark of a connection from Sources to
// a translated service is 0 right after its first packet was translated (prerouting, after
// priority -100), and one that it was given before that is lost; and connections through
// links with Pins have the pin's mark in the bits of MarkMask.
const (
	MarkMask  = 0x00ff0000
	MarkOuter = 0x00c10000 // our own encapsulated packets
	MarkProxy = 0x00c20000 // handed to the relay by TPROXY
)

// State is everything that Culvert configures on one host or pod. The zero value is
// "nothing of ours".
type State struct {
	Sysctls   []Sysctl
	Links     []Link
	WireGuard []WireGuard
	IPsec     *IPsec // nil: no IKE daemon is needed
	Rules     []Rule
	Routes    []Route
	Firewall  Firewall
	Services  Services
	Guard     *Guard // nil: none
}

// Sysctl is one kernel setting, as a path below /proc/sys with slashes.
type Sysctl struct {
	Path  string // "net/ipv4/ip_forward"
	Value string
}

// LinkKind says which applier makes the link.
type LinkKind string

// The kinds of links.
const (
	LinkWireGuard LinkKind = "wireguard" // made by internal/wireguard, in the kernel or on a TUN
	LinkXFRM      LinkKind = "xfrm"      // made by internal/route; used by internal/ipsec
	LinkLibIPsec  LinkKind = "libipsec"  // made by charon's kernel-libipsec; always "ipsec0"
	LinkVXLAN     LinkKind = "vxlan"     // made by internal/route: the node link
)

// LibIPsecLink is the name that kernel-libipsec gives its one TUN device.
const LibIPsecLink = "ipsec0"

// Link is one network interface of ours, always up. Names start with "cvt", except
// LibIPsecLink.
type Link struct {
	Name        string
	Kind        LinkKind
	MTU         int            // bytes of an inner packet
	Addresses   []netip.Prefix // host bits kept: "10.99.0.1/24"
	InterfaceID uint32         // LinkXFRM only: XFRMA_IF_ID, not zero
	VXLAN       *VXLAN         // LinkVXLAN only, and there not nil
}

// Key is a Curve25519 public key (https://www.wireguard.com/protocol/).
type Key [32]byte

// WireGuard is one WireGuard device.
type WireGuard struct {
	Link         string       // the LinkWireGuard it belongs to
	PrivateKey   secret.Bytes // 32 bytes
	PublicKey    Key          // of PrivateKey: printed and compared in its place
	ListenPort   uint16       // never zero
	FirewallMark uint32       // set on outer packets
	Peers        []WireGuardPeer
}

// WireGuardPeer is one peer of a device.
type WireGuardPeer struct {
	Name         string // for messages and metrics: "site default/berlin", "device default/phone"
	PublicKey    Key
	PresharedKey secret.Bytes // 32 bytes; zero: none
	// Endpoint is where to send first; the zero value means that the peer dials in. The
	// peer roams: what it last sent from wins over this. An applier sets it when the peer
	// is new or when this value differs from the one it was given before.
	Endpoint netip.AddrPort
	// Initiate asks for a handshake at once, repeated until one is answered, without
	// waiting for traffic.
	Initiate                   bool
	PersistentKeepaliveSeconds uint16 // 0: off
	AllowedIPs                 []netip.Prefix
}

// IPsecDatapath says who encrypts ESP.
type IPsecDatapath string

// The ESP datapaths.
const (
	KernelESP IPsecDatapath = "kernel"   // XFRM with an interface per site
	LibIPsec  IPsecDatapath = "libipsec" // strongSwan's user space, one ipsec0 for all
)

// IPsec is the configuration of the IKE daemon.
type IPsec struct {
	Datapath    IPsecDatapath
	Connections []IPsecConnection
}

// IPsecInitiate says who opens a connection.
type IPsecInitiate string

// Who opens a connection.
const (
	InitiateAlways    IPsecInitiate = "Always"    // at once, and again when lost
	InitiateOnTraffic IPsecInitiate = "OnTraffic" // trap policy
	InitiateNever     IPsecInitiate = "Never"     // the peer does
)

// IPsecConnection is one IKEv2 connection (RFC 7296) with its child SAs.
type IPsecConnection struct {
	Name            string   // unique; letters, digits, '-', '.': also the vici section's name
	LocalAddresses  []string // addresses or DNS names; empty: any
	RemoteAddresses []string // addresses, prefixes or DNS names; empty: any
	LocalID         string   // empty: the local address, or the certificate's subject
	RemoteID        string   // empty: any identity that the credentials allow
	Auth            IPsecAuth
	IKEProposals    []string // strongSwan's notation: "aes256gcm16-prfsha384-x25519"
	ESPProposals    []string
	LocalSelectors  []netip.Prefix // never empty
	RemoteSelectors []netip.Prefix // never empty
	// ChildPerPair makes one child SA per pair of selectors, for peers that accept only
	// one selector on each side; otherwise one child carries all of a family.
	ChildPerPair  bool
	Initiate      IPsecInitiate
	IKELifetime   time.Duration // until the IKE SA is rekeyed
	ChildLifetime time.Duration // until a child SA is rekeyed
	DPDDelay      time.Duration // 0: no dead peer detection
	InterfaceID   uint32        // KernelESP: the link's; else 0
	Link          string        // the link that carries it
}

// IPsecAuth is how both sides prove who they are: exactly one of PresharedKey and
// Certificate is set.
type IPsecAuth struct {
	PresharedKey secret.Bytes
	Certificate  []byte       // ours: PEM, leaf first, then intermediates
	PrivateKey   secret.Bytes // ours: PEM (PKCS #1, SEC 1 or PKCS #8)
	RemoteCAs    []byte       // PEM bundle that the peer's certificate must chain to
	RevokedBy    []byte       // PEM CRLs; empty: none
}

// RouteKind is the type of a route.
type RouteKind string

// The route kinds in use.
const (
	RouteUnicast     RouteKind = "unicast"
	RouteUnreachable RouteKind = "unreachable"
	RouteLocal       RouteKind = "local"
	RouteThrow       RouteKind = "throw"
)

// Metrics: the tunnel's own route, and the fail-closed one behind it.
const (
	MetricTunnel      = 100
	MetricUnreachable = 4000
)

// Route is one route with our protocol number.
type Route struct {
	Destination netip.Prefix
	Kind        RouteKind
	Link        string     // unicast and local
	Via         netip.Addr // zero: on-link
	Source      netip.Addr // preferred source; zero: the kernel's choice
	OnLink      bool       // Via is reached through Link whatever the routes say
	Metric      int
	Table       int
}

// Rule is one policy routing rule for one family.
type Rule struct {
	Family   Family
	Priority int
	Mark     uint32 // 0: any
	MarkMask uint32 // 0 with Mark 0
	// Forwarded limits the rule to packets that came in over a link: those of the host's
	// own processes, and reverse-path lookups, do not match.
	Forwarded bool
	// UDPPort limits the rule to UDP packets for this port; 0: any packets. With it neither Mark
	// nor Forwarded.
	UDPPort uint16
	Table   int
}

// Family is an address family.
type Family int

// The address families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// FamilyOf is the family of a valid, unmapped address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Access is a set of places that a tunnel may open connections to.
type Access uint8

// What can be opened.
const (
	AccessPods Access = 1 << iota
	AccessServices
	AccessNodes
	AccessSites
)

// Firewall says who may talk to whom through the tunnels. What concerns neither a
// tunnel's link nor a tunnel's range is not touched.
//
//   - A packet from a tunnel's link must carry a source out of that tunnel's prefixes.
//   - A tunnel opens connections only to what its Access names; replies pass.
//   - The cluster (anything that does not come from a tunnel) may open connections to every tunnel.
//   - A packet for a tunnel's prefix leaves through that tunnel's link or not at all.
//   - Connections to the host itself: ICMP echo, relayed service traffic, and what
//     AccessNodes covers; nothing else.
type Firewall struct {
	Pods, Services, Nodes []netip.Prefix
	Tunnels               []Tunnel
	// Pools are ranges that belong to a link as a whole, whether a tunnel uses an address
	// or not: a packet for one leaves through that link or not at all.
	Pools []Pool
	// Masquerade rewrites the source of everything that tunnels open towards the cluster
	// to the gateway's own address.
	Masquerade bool
	Clamps     []Clamp
	NodeLink   *NodeLink // nil: no node link ends here
	Pins       []Pin     // of links that are paths to the same sites
	// Unmasqueraded are ranges whose packets, from and to, keep their addresses, whatever
	// translation of sources others have set up on the host.
	Unmasqueraded []netip.Prefix
}

// Pool is a set of ranges that belong to a link.
type Pool struct {
	Link     string
	Prefixes []netip.Prefix
}

// TunnelKind tells sites from devices.
type TunnelKind string

// The kinds of tunnels.
const (
	TunnelSite   TunnelKind = "site"
	TunnelDevice TunnelKind = "device"
)

// Tunnel is one site or device as the firewall sees it.
type Tunnel struct {
	Name     string // "site default/berlin"
	Kind     TunnelKind
	Link     string
	Prefixes []netip.Prefix // inner source addresses; never empty
	Access   Access
}

// Clamp limits the TCP maximum segment size of connections through a link, both ways.
type Clamp struct {
	Link string
	MSS4 uint16 // bytes; IPv4
	MSS6 uint16 // bytes; IPv6
}

// ServicesMode says how tunnel traffic to service addresses reaches a backend.
type ServicesMode string

// The services modes.
const (
	ServicesTranslate ServicesMode = "Translate" // nftables maps, by internal/nft
	ServicesProxy     ServicesMode = "Proxy"     // transparent proxy, by internal/relay
	ServicesRoute     ServicesMode = "Route"     // left to the node
)

// Services are the service addresses that tunnels may reach.
type Services struct {
	Mode    ServicesMode // empty: no services
	Ranges  []netip.Prefix
	Ports   []ServicePort
	Pods    []netip.Prefix // endpoints outside these are masqueraded
	Sources []string       // links whose traffic is translated or relayed
}

// Protocol is an IP protocol number (IANA).
type Protocol uint8

// The protocols of service ports.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// ServicePort is one port of one service address.
type ServicePort struct {
	Name            string // "default/web:http"
	Address         netip.Addr
	Protocol        Protocol
	Port            uint16
	AffinitySeconds int              // ClientIP session affinity; 0: none
	Endpoints       []netip.AddrPort // of Address's family; empty: connections are rejected
}
