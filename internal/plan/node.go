package plan

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// GatewayPod is one pod of a gateway, as its node link sees it.
type GatewayPod struct {
	Name    string // of the pod; its namespace is the gateway's
	Node    string
	PodIPs  []netip.Addr // at most one per family
	HostIPs []netip.Addr // of its node
	Active  bool         // the nodes send to this one
}

// NodeFacts is what the planner must know of a node beyond the objects.
type NodeFacts struct {
	Node model.Node // this one
	Pods map[model.ID][]GatewayPod
	// UnderlayMTU is that of the way to the gateway pods, in bytes; 0: 1500.
	UnderlayMTU int
	// Links are the links of this node that lead to the gateway pods on it, by the pod's
	// address: the other end of the pod's own link. One that is missing: the node's routes
	// lead to the pod.
	Links map[netip.Addr]string
	// LinkLocals are the link-local addresses of the gateway pods on this node on those links, by
	// the pod's IPv6 address.
	LinkLocals map[netip.Addr]netip.Addr
	// CiliumHost are this node's addresses at the link that leads into Cilium's tunnels; none where
	// Cilium has none.
	CiliumHost []netip.Addr
	// OnLink are the addresses of gateways' nodes that are on a network of this node.
	OnLink map[netip.Addr]bool
	// Encryption counts when there is a NodeEncryption.
	Encryption EncryptionFacts
}

// NodeResult is a node's planned state and what else follows.
type NodeResult struct {
	State netstate.State
	// Waiting says, per object ("gateway vpn/edge"), what is not in effect yet and why.
	Waiting map[string]string
	// Encryption is nil without a NodeEncryption.
	Encryption *EncryptionResult
}

// GatewayName is the name of a gateway in messages.
func GatewayName(id model.ID) string { return "gateway " + id.String() }

// Node plans one node of the cluster: how its pods and itself reach sites and devices.
func Node(m *model.Model, facts NodeFacts) NodeResult {
	p := &nodePlanner{m: m, facts: facts}
	p.out.Waiting = map[string]string{}
	for _, f := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		if p.hasFamily(f) {
			p.families = append(p.families, f)
		}
	}
	for _, gw := range m.Gateways {
		if !gw.Masquerade {
			p.gateway(gw)
		}
	}
	p.finishLink()
	p.rules()
	p.encryption()
	p.out.State.Sort()
	return p.out
}

// GatewayPodSysctls are the kernel settings of the network namespace of a gateway's pod,
// which the pod itself may not write.
func GatewayPodSysctls() []netstate.Sysctl {
	return []netstate.Sysctl{
		{Path: "net/ipv4/ip_forward", Value: "1"},
		{Path: "net/ipv6/conf/all/forwarding", Value: "1"},
		looseReversePath,
	}
}

type nodePlanner struct {
	m        *model.Model
	facts    NodeFacts
	families []netstate.Family // of this node and its pods
	out      NodeResult

	vxlan *netstate.VXLAN // nil: no gateway is encapsulated
	guard netstate.NodeLink
}

func (p *nodePlanner) hasFamily(f netstate.Family) bool {
	return addressOf(p.facts.Node.Addresses, f).IsValid() ||
		slices.ContainsFunc(p.facts.Node.PodCIDRs, func(c netip.Prefix) bool { return netstate.FamilyOf(c.Addr()) == f })
}

// gateway routes the ranges of one gateway, and lets nothing for them leave by another
// way when it has no pod.
func (p *nodePlanner) gateway(gw *model.Gateway) {
	name := GatewayName(gw.ID)
	ranges := p.ranges(gw)
	if len(ranges) == 0 {
		return
	}
	p.out.State.Firewall.Unmasqueraded = append(p.out.State.Firewall.Unmasqueraded, ranges...)
	for _, r := range ranges {
		p.out.State.Routes = append(p.out.State.Routes, netstate.Route{
			Destination: r, Kind: netstate.RouteUnreachable, Metric: netstate.MetricUnreachable, Table: netstate.NodeTable,
		})
	}
	pods := slices.Clone(p.facts.Pods[gw.ID])
	slices.SortFunc(pods, func(a, b GatewayPod) int { return compareStrings(a.Name, b.Name) })
	linked := map[string]bool{} // the pods at the other end of the node link
	if gw.NodeLink == linkEncapsulated {
		p.guard.Sources = append(p.guard.Sources, ranges...)
		for _, pod := range pods {
			linked[pod.Name] = p.encapsulated(gw, pod)
		}
	}
	active := slices.IndexFunc(pods, func(g GatewayPod) bool { return g.Active })
	if active < 0 {
		p.out.Waiting[name] = "no pod of it is active: its sites and devices are unreachable until one is"
		return
	}
	hop := p.direct(pods[active], gw.NodeLink)
	if gw.NodeLink == linkEncapsulated {
		hop = overLink(pods[active])
	}
	if gw.NodeLink != linkEncapsulated || linked[pods[active].Name] {
		p.routes(gw, ranges, hop)
	}
}

func compareStrings(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// ranges are what is behind a gateway, of the node's families. What is the cluster's own
// never leads out of it, whatever an object says.
func (p *nodePlanner) ranges(gw *model.Gateway) []netip.Prefix {
	all := slices.Clone(gw.DeviceRanges)
	for _, s := range gw.Sites {
		all = append(all, s.CIDRs...)
	}
	slices.SortFunc(all, netstate.ComparePrefixes)
	var out []netip.Prefix
	for _, r := range slices.Compact(all) {
		if !slices.Contains(p.families, netstate.FamilyOf(r.Addr())) {
			continue
		}
		if own := p.clusters(gw, r); own != "" {
			p.out.Waiting[GatewayName(gw.ID)] = fmt.Sprintf("%s overlaps %s: no node routes it", r, own)
			continue
		}
		out = append(out, r)
	}
	return out
}

// clusters names what of the cluster a range overlaps, or "".
func (p *nodePlanner) clusters(gw *model.Gateway, r netip.Prefix) string {
	for _, list := range [][]netip.Prefix{gw.Pods, gw.ServiceRanges, gw.Nodes} {
		if i := slices.IndexFunc(list, r.Overlaps); i >= 0 {
			return list[i].String() + " of the cluster"
		}
	}
	for _, n := range append(slices.Clone(p.m.Nodes), p.facts.Node) {
		if slices.ContainsFunc(n.Addresses, r.Contains) || slices.ContainsFunc(n.PodCIDRs, r.Overlaps) {
			return "the addresses of node " + n.Name
		}
	}
	return ""
}

// encapsulated adds a pod to the far ends of the node link; false: it cannot be one.
func (p *nodePlanner) encapsulated(gw *model.Gateway, pod GatewayPod) bool {
	family := outerFamily(pod.PodIPs)
	own := addressOf(p.facts.Node.Addresses, family)
	name := fmt.Sprintf("gateway %s/%s", gw.Namespace, pod.Name)
	peer, ok := linkPeer(name, pod.PodIPs, family, p.families)
	switch {
	case !ok:
		p.out.Waiting[GatewayName(gw.ID)] = "pod " + pod.Name + " has no address yet"
		return false
	case !own.IsValid():
		p.out.Waiting[GatewayName(gw.ID)] = fmt.Sprintf("this node has no IPv%d address, which the gateway's pods have", family)
		return false
	}
	if p.vxlan == nil {
		p.vxlan = &netstate.VXLAN{ID: netstate.NodeLinkID, Port: netstate.NodeLinkPort, Family: family, MAC: linkMAC(own)}
	}
	if p.vxlan.Family != family {
		p.out.Waiting[GatewayName(gw.ID)] = fmt.Sprintf("the node link runs over IPv%d here, and pod %s has no such address", p.vxlan.Family, pod.Name)
		return false
	}
	p.guard.Outer = append(append(p.guard.Outer, pod.PodIPs...), pod.HostIPs...)
	same := func(o netstate.VXLANPeer) bool { return o.MAC == peer.MAC }
	if !slices.ContainsFunc(p.vxlan.Peers, same) {
		p.vxlan.Peers = append(p.vxlan.Peers, peer)
	}
	return true
}

// overLink is the next hop to a pod over the node link.
func overLink(pod GatewayPod) func(netstate.Family) netstate.Route {
	return func(f netstate.Family) netstate.Route {
		via := nextHop(addressOf(pod.PodIPs, outerFamily(pod.PodIPs)), f)
		return netstate.Route{Link: netstate.NodeLinkName, Via: via, OnLink: true}
	}
}

// direct is the next hop to a pod without encapsulation: the pod itself on its own node,
// its node on the others.
func (p *nodePlanner) direct(pod GatewayPod, mode string) func(netstate.Family) netstate.Route {
	return func(f netstate.Family) netstate.Route {
		if pod.Node == p.facts.Node.Name {
			via := addressOf(pod.PodIPs, f)
			link := p.facts.Links[via]
			if local := p.facts.LinkLocals[via]; mode == linkCiliumEndpoint && f == netstate.IPv6 && link != "" && local.IsValid() {
				return netstate.Route{Via: local, Link: link} // the kernel takes no other IPv6 address whose route is Cilium's own link
			}
			return netstate.Route{Via: via, Link: link, OnLink: link != ""}
		}
		if own := addressOf(p.facts.CiliumHost, f); mode == linkCiliumEndpoint && own.IsValid() {
			r := netstate.Route{Link: CiliumHost, Source: own}
			if f == netstate.IPv4 {
				r.Via = own // as Cilium's own routes; IPv6 has no next hop that is the host
			}
			return r
		}
		via := addressOf(pod.HostIPs, f)
		if via.IsValid() && !p.facts.OnLink[via] {
			if mode == linkDirect {
				p.out.Waiting["node "+pod.Node] = fmt.Sprintf("%s is on no network of this node, so that it cannot be a next hop: use nodeLink: Encapsulated", via)
			}
			return netstate.Route{} // Cilium's own data path leads there
		}
		return netstate.Route{Via: via}
	}
}

func (p *nodePlanner) routes(gw *model.Gateway, ranges []netip.Prefix, hop func(netstate.Family) netstate.Route) {
	for _, dst := range ranges {
		f := netstate.FamilyOf(dst.Addr())
		r := hop(f)
		if !r.Via.IsValid() && r.Link == "" {
			if gw.NodeLink != linkCiliumEndpoint {
				p.waiting(gw.ID, fmt.Sprintf("%s: the gateway's pod is not reached over IPv%d", dst, f))
			}
			continue
		}
		r.Destination, r.Kind, r.Metric, r.Table = dst, netstate.RouteUnicast, netstate.MetricTunnel, netstate.NodeTable
		if !r.Source.IsValid() {
			r.Source = addressOf(p.facts.Node.Addresses, f)
		}
		p.out.State.Routes = append(p.out.State.Routes, r)
	}
}

// waiting keeps the first reason.
func (p *nodePlanner) waiting(id model.ID, why string) {
	if p.out.Waiting[GatewayName(id)] == "" {
		p.out.Waiting[GatewayName(id)] = why
	}
}

// finishLink adds the link and its guard when a gateway is encapsulated.
func (p *nodePlanner) finishLink() {
	if p.vxlan == nil {
		return
	}
	mtu := linkMTU(p.facts.UnderlayMTU, p.vxlan.Family)
	s := &p.out.State
	s.Links = []netstate.Link{{Name: netstate.NodeLinkName, Kind: netstate.LinkVXLAN, MTU: mtu, VXLAN: p.vxlan}}
	slices.SortFunc(p.guard.Outer, netip.Addr.Compare)
	p.guard.Outer = slices.Compact(p.guard.Outer)
	p.guard.Link, p.guard.Port = netstate.NodeLinkName, netstate.NodeLinkPort
	s.Firewall.NodeLink = &p.guard
	s.Firewall.Clamps = []netstate.Clamp{{Link: netstate.NodeLinkName, MSS4: uint16(mtu - 40), MSS6: uint16(mtu - 60)}}
}

// rules lead to the routes.
func (p *nodePlanner) rules() {
	for _, f := range p.families {
		if slices.ContainsFunc(p.out.State.Routes, func(r netstate.Route) bool { return netstate.FamilyOf(r.Destination.Addr()) == f }) {
			p.out.State.Rules = append(p.out.State.Rules, netstate.Rule{Family: f, Priority: netstate.RulePriorityNode, Table: netstate.NodeTable})
		}
	}
}
