package plan

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Values of spec.clusterTraffic.nodeLink.
const (
	linkEncapsulated   = "Encapsulated"
	linkDirect         = "Direct"
	linkCiliumEndpoint = "CiliumEndpoint"
)

// Bytes that a packet grows by in the node link: inner Ethernet (14), VXLAN (8, RFC 7348),
// UDP (8) and the outer IP header (20 or 40).
const (
	overheadVXLAN4 = 50
	overheadVXLAN6 = 70
)

// metricOwnNode is that of the route for pods of which no node says that they are on it.
const metricOwnNode = netstate.MetricTunnel + 100

// nodeLink plans the gateway's end of the node link: its own address is only ever seen
// outside, the addresses of sites and devices travel inside.
func (p *planner) nodeLink() {
	families := p.families()
	if p.gw.Masquerade || p.gw.NodeLink != linkEncapsulated || len(p.facts.PodIPs) == 0 || len(families) == 0 {
		return
	}
	family := outerFamily(p.facts.PodIPs)
	v := &netstate.VXLAN{
		ID: netstate.NodeLinkID, Port: netstate.NodeLinkPort, Family: family, MAC: linkMAC(addressOf(p.facts.PodIPs, family)),
	}
	guard := &netstate.NodeLink{Link: netstate.NodeLinkName, Port: netstate.NodeLinkPort, Sources: slices.Clone(p.gw.Pods)}
	for _, n := range p.facts.Nodes {
		guard.Outer = append(append(guard.Outer, n.Addresses...), n.LinkAddresses...)
		guard.Sources = append(guard.Sources, n.PodCIDRs...)
		for _, a := range n.Addresses {
			guard.Sources = append(guard.Sources, host(a))
		}
		if peer, ok := linkPeer("node "+n.Name, n.Addresses, family, families); ok {
			v.Peers = append(v.Peers, peer)
			p.nodeRoutes(n, peer)
		} else {
			p.out.Waiting["node "+n.Name] = fmt.Sprintf("has no IPv%d address, which the gateway's pods have: its pods and the sites do not reach each other", family)
		}
	}
	p.podsBeyond(families)
	s := &p.out.State
	s.Links = append(s.Links, netstate.Link{
		Name: netstate.NodeLinkName, Kind: netstate.LinkVXLAN, MTU: linkMTU(p.facts.UnderlayMTU, family), VXLAN: v,
	})
	s.Firewall.NodeLink = guard
	for _, f := range families {
		s.Rules = append(s.Rules, netstate.Rule{Family: f, Priority: netstate.RulePriorityForwarded, Forwarded: true, Table: netstate.NodeTable})
	}
	p.looseReversePath()
}

func (p *planner) looseReversePath() {
	if s := &p.out.State; !slices.Contains(s.Sysctls, looseReversePath) {
		s.Sysctls = append(s.Sysctls, looseReversePath)
	}
}

// looseReversePath lets packets in by a link other than the one that the answer leaves
// by: the kernel's check knows nothing of rules for forwarded packets.
var looseReversePath = netstate.Sysctl{Path: "net/ipv4/conf/all/rp_filter", Value: "2"}

// nodeRoutes leads to a node's pods and, when somebody may reach nodes, to itself.
func (p *planner) nodeRoutes(n model.Node, peer netstate.VXLANPeer) {
	for _, c := range n.PodCIDRs {
		p.linkRoute(c, peer, netstate.MetricTunnel)
	}
	if p.gw.Pods != nil && n.Name == p.facts.NodeName {
		// Pods whose range no node has: the node that the gateway is on knows the way.
		for _, c := range p.gw.Pods {
			p.linkRoute(c, peer, metricOwnNode)
		}
	}
	if !p.reachesNodes() {
		return
	}
	for _, a := range n.Addresses {
		p.linkRoute(host(a), peer, netstate.MetricTunnel)
		// A service with this node for an endpoint is reached by the same way.
		p.out.State.Services.Pods = append(p.out.State.Services.Pods, host(a))
	}
}

// reachesNodes tells whether a site or device may open connections to nodes.
func (p *planner) reachesNodes() bool {
	return slices.ContainsFunc(p.out.State.Firewall.Tunnels, func(t netstate.Tunnel) bool { return t.Access&netstate.AccessNodes != 0 })
}

func (p *planner) linkRoute(dst netip.Prefix, peer netstate.VXLANPeer, metric int) {
	via := addressOf(peer.Via, netstate.FamilyOf(dst.Addr()))
	if !via.IsValid() {
		return
	}
	p.out.State.Routes = append(p.out.State.Routes, netstate.Route{
		Destination: dst, Kind: netstate.RouteUnicast, Link: netstate.NodeLinkName, Via: via, OnLink: true, Metric: metric, Table: netstate.NodeTable,
	})
}

// podsBeyond keeps what sites and devices send to pods from leaving by any other way.
func (p *planner) podsBeyond(families []netstate.Family) {
	for _, c := range p.gw.Pods {
		if slices.Contains(families, netstate.FamilyOf(c.Addr())) {
			p.out.State.Routes = append(p.out.State.Routes, netstate.Route{
				Destination: c, Kind: netstate.RouteUnreachable, Metric: netstate.MetricUnreachable, Table: netstate.NodeTable,
			})
		}
	}
}

// linkMTU is the node link's MTU. Below 1280 no link may carry IPv6 (RFC 8200, section 5):
// the outer packets are then fragmented instead.
func linkMTU(underlay int, outer netstate.Family) int {
	if underlay == 0 {
		underlay = defaultMTU
	}
	if outer == netstate.IPv4 {
		return max(underlay-overheadVXLAN4, minimumMTU)
	}
	return max(underlay-overheadVXLAN6, minimumMTU)
}

// outerFamily is the family that the node link runs over: IPv4 where there is one. Both
// ends decide by the gateway pod's addresses.
func outerFamily(podIPs []netip.Addr) netstate.Family {
	if addressOf(podIPs, netstate.IPv4).IsValid() {
		return netstate.IPv4
	}
	return netstate.IPv6
}

// addressOf is the first address of a family; the zero value when there is none.
func addressOf(list []netip.Addr, f netstate.Family) netip.Addr {
	for _, a := range list {
		if netstate.FamilyOf(a) == f {
			return a
		}
	}
	return netip.Addr{}
}

// linkPeer is a far end of the node link, by its addresses.
func linkPeer(name string, addrs []netip.Addr, outer netstate.Family, inner []netstate.Family) (netstate.VXLANPeer, bool) {
	a := addressOf(addrs, outer)
	if !a.IsValid() {
		return netstate.VXLANPeer{}, false
	}
	peer := netstate.VXLANPeer{Name: name, Outer: a, MAC: linkMAC(a)}
	for _, f := range inner {
		if via := nextHop(a, f); via.IsValid() {
			peer.Via = append(peer.Via, via)
		}
	}
	return peer, true
}

// linkMAC is the Ethernet address of the end of the node link that has an outer address:
// so both ends know each other's without telling. It is locally administered.
func linkMAC(outer netip.Addr) netstate.MAC {
	if outer.Is4() {
		b := outer.As4()
		return netstate.MAC{0x02, 0xc7, b[0], b[1], b[2], b[3]}
	}
	h := hash64(outer)
	return netstate.MAC{0x06, h[3], h[4], h[5], h[6], h[7]}
}

// nextHop is the address of that end for routes inside the link: the outer address itself
// (routes are on-link, so nothing looks for it elsewhere), or for IPv6 a link-local one.
// IPv4 over an outer IPv6 address has none.
func nextHop(outer netip.Addr, inner netstate.Family) netip.Addr {
	switch {
	case inner == netstate.IPv4 && outer.Is4():
		return outer
	case inner == netstate.IPv4:
		return netip.Addr{}
	}
	local := [16]byte{0: 0xfe, 1: 0x80}
	if outer.Is4() {
		copy(local[12:], outer.AsSlice())
	} else {
		h := hash64(outer)
		copy(local[8:], h[:])
	}
	return netip.AddrFrom16(local)
}

func hash64(a netip.Addr) [8]byte {
	h := fnv.New64a()
	_, _ = h.Write(a.AsSlice())
	return [8]byte(binary.BigEndian.AppendUint64(nil, h.Sum64()))
}
