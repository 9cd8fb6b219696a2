package netstate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// NodeLinkName is the VXLAN link between gateways and nodes, at both ends.
const NodeLinkName = "cvtnodes"

// Of the node link: its VXLAN network identifier (VNI, RFC 7348) and UDP port.
const (
	NodeLinkID   = 0xC17
	NodeLinkPort = 19604
)

// MAC is an Ethernet address.
type MAC [6]byte

// String is "02:c7:ac:1e:00:0b".
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// VXLAN is the encapsulation of a link (RFC 7348), unicast only: nothing is learned or
// flooded, every far end is listed.
type VXLAN struct {
	ID     uint32 // VNI, 24 bits
	Port   uint16 // UDP, at all ends
	Family Family // of the outer addresses, at all ends
	MAC    MAC    // this end's; far ends must know it
	Peers  []VXLANPeer
}

// VXLANPeer is a far end.
type VXLANPeer struct {
	Name  string       // for people: "node worker-1", "gateway vpn/edge-0"
	Outer netip.Addr   // where encapsulated packets are sent
	MAC   MAC          // the far end's
	Via   []netip.Addr // next hops of routes that lead to it
}

// NodeLink protects the host from what comes over a VXLAN link, which authenticates
// nobody: encapsulated packets are taken from Outer only, and what they carry must come
// from Sources.
type NodeLink struct {
	Link    string
	Port    uint16         // UDP, not zero
	Outer   []netip.Addr   // source addresses of encapsulated packets
	Sources []netip.Prefix // source addresses inside them
}

func (v *VXLAN) sort() {
	if v == nil {
		return
	}
	slices.SortFunc(v.Peers, func(a, b VXLANPeer) int { return a.Outer.Compare(b.Outer) })
	for i := range v.Peers {
		slices.SortFunc(v.Peers[i].Via, netip.Addr.Compare)
	}
}

// text is the link's part of its line.
func (v *VXLAN) text() string {
	if v == nil {
		return ""
	}
	return fmt.Sprintf(" vni %d port %d over ipv%d mac %s", v.ID, v.Port, v.Family, v.MAC)
}

func (v *VXLAN) lines(link string) []string {
	if v == nil {
		return nil
	}
	var out []string
	for _, p := range v.Peers {
		out = append(out, fmt.Sprintf("vxlan %s peer %q outer %s mac %s%s", link, p.Name, p.Outer, p.MAC, list(" via ", p.Via)))
	}
	return out
}

func (l *NodeLink) sort() {
	if l == nil {
		return
	}
	slices.SortFunc(l.Outer, netip.Addr.Compare)
	slices.SortFunc(l.Sources, ComparePrefixes)
}

func (l *NodeLink) lines() []string {
	if l == nil {
		return nil
	}
	return []string{strings.TrimRight(fmt.Sprintf("firewall node-link %s udp %d outer%s inner%s", l.Link, l.Port, list(" ", l.Outer), list(" ", l.Sources)), " ")}
}
