package netstate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// EncryptionLink is the WireGuard link between the nodes of a cluster.
const EncryptionLink = "cvtnode0"

// Routing tables of the encryption between nodes. EncryptionTable is for all packets,
// ForwardedTable for those only that came in over a link: what pods send to nodes.
const (
	EncryptionTable = 19630
	ForwardedTable  = 19631
)

// Priorities of the rules of the encryption between nodes.
const (
	RulePriorityExempt       = 19630 // exempt flows (MarkExempt): main
	RulePriorityPodsToNodes  = 19631 // what is forwarded: ForwardedTable
	RulePriorityBetweenNodes = 19632 // everything: EncryptionTable
)

// MarkExempt is on packets between nodes that are let out, and in, as they are.
const MarkExempt = 0x00c30000

// MarkNodeMask are the bits in which a packet on a node must be like MarkOuter or MarkExempt to
// be what they say. Cilium writes the number of a pod's identity over the bits of MarkMask, any
// number, and then says so in the bits 8 to 11, which are 0 when a packet of ours is routed.
const MarkNodeMask = MarkMask | 0x00000f00

// Guard keeps plain packets of a cluster off the network between its nodes. What is to be
// encrypted leaves and arrives by Link; on all other links that lead out of the node,
// dropped is
//
//   - from and to the network: what has a pod or site at its end, but for what pods and the
//     world outside the cluster say to each other;
//   - packets of overlay networks between nodes;
//   - with AllTraffic: what a node says to a node.
//
// What Exempt names passes between nodes, and so do the packets of WireGuard itself,
// neighbour discovery, MLD and DHCP.
type Guard struct {
	Link string
	Port uint16 // UDP, of WireGuard at all nodes; never zero
	// Local are the links that do not lead out of the node, in addition to the loopback and
	// those of ours: what pods are attached to. A trailing "*" stands for any rest of a name.
	Local       []string
	Nodes       []netip.Addr   // addresses of all nodes, this one's too
	Pods, Sites []netip.Prefix // of the whole cluster
	AllTraffic  bool
	// Overlay is the UDP port of the network plugin's overlay, whose packets pass by Link only: on
	// other links they are dropped when they arrive, whoever sent them, and when the host sends them,
	// to whomever. 0: nothing is known of one.
	Overlay uint16
	// Strict drops; otherwise what would be dropped is counted only.
	Strict bool
	Exempt []Exemption
}

// Exemption is a listener whose connections with hosts are protected by other means.
type Exemption struct {
	Name     string // for people: "API server"
	Protocol Protocol
	Address  netip.Addr
	Port     uint16
}

// String is ""API server" tcp 172.30.0.11:6443".
func (e Exemption) String() string {
	return fmt.Sprintf("%q %s %s", e.Name, e.Protocol, netip.AddrPortFrom(e.Address, e.Port))
}

func compareExemptions(a, b Exemption) int { return strings.Compare(a.String(), b.String()) }

func (g *Guard) sort() {
	if g == nil {
		return
	}
	slices.Sort(g.Local)
	slices.SortFunc(g.Nodes, netip.Addr.Compare)
	slices.SortFunc(g.Pods, ComparePrefixes)
	slices.SortFunc(g.Sites, ComparePrefixes)
	slices.SortFunc(g.Exempt, compareExemptions)
}

func (g *Guard) lines() []string {
	if g == nil {
		return nil
	}
	does, scope := "counts", "pods"
	if g.Strict {
		does = "drops"
	}
	if g.AllTraffic {
		scope = "all"
	}
	out := []string{fmt.Sprintf("guard %s plain packets scope %s link %s udp %d", does, scope, g.Link, g.Port)}
	if len(g.Local) > 0 {
		out = append(out, "guard local "+strings.Join(g.Local, ","))
	}
	for _, l := range []struct{ name, text string }{{"nodes", list(" ", g.Nodes)}, {"pods", list(" ", g.Pods)}, {"sites", list(" ", g.Sites)}} {
		if l.text != "" {
			out = append(out, "guard "+l.name+l.text)
		}
	}
	if g.Overlay != 0 {
		out = append(out, fmt.Sprintf("guard overlay udp %d", g.Overlay))
	}
	for _, e := range g.Exempt {
		out = append(out, "guard exempt "+e.String())
	}
	return out
}
