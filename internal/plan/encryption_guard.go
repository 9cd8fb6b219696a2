package plan

import (
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// closed is what is left when the link is gone: nothing follows another route. Packets of
// hosts are the guard's: an unreachable route would also stop those that are exempt.
func (p *encryptionPlanner) closed() {
	for _, c := range p.own.PodCIDRs {
		p.route(netstate.Route{Destination: c, Kind: netstate.RouteThrow, Metric: netstate.MetricTunnel}, netstate.EncryptionTable)
	}
	if !p.out.Strict {
		return
	}
	behind := netstate.Route{Kind: netstate.RouteUnreachable, Metric: netstate.MetricUnreachable}
	for _, c := range p.pods {
		if slices.Contains(p.own.PodCIDRs, c) {
			continue
		}
		behind.Destination = c
		p.route(behind, netstate.EncryptionTable)
	}
	for _, n := range p.m.Nodes {
		if n.Name == p.own.Name {
			continue
		}
		for _, a := range n.Addresses {
			if slices.Contains(p.claimed[n.Name], host(a)) {
				behind.Destination = host(a)
				p.route(behind, netstate.ForwardedTable)
			}
		}
	}
}

func (p *encryptionPlanner) encryptionRules() {
	for _, f := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		if !slices.ContainsFunc(p.nodePlanner.out.State.Routes, func(r netstate.Route) bool {
			return netstate.FamilyOf(r.Destination.Addr()) == f && (r.Table == netstate.EncryptionTable || r.Table == netstate.ForwardedTable)
		}) {
			continue
		}
		p.nodePlanner.out.State.Rules = append(p.nodePlanner.out.State.Rules,
			netstate.Rule{Family: f, Priority: netstate.RulePriorityOuter, Mark: netstate.MarkOuter, MarkMask: netstate.MarkNodeMask, Table: mainTable},
			netstate.Rule{Family: f, Priority: netstate.RulePriorityExempt, Mark: netstate.MarkExempt, MarkMask: netstate.MarkNodeMask, Table: mainTable},
			netstate.Rule{Family: f, Priority: netstate.RulePriorityPodsToNodes, Forwarded: true, Table: netstate.ForwardedTable},
			netstate.Rule{Family: f, Priority: netstate.RulePriorityBetweenNodes, Table: netstate.EncryptionTable})
		if p.facts.Overlay != 0 && !p.e.AllTraffic { // otherwise it goes there with all the rest
			p.nodePlanner.out.State.Rules = append(p.nodePlanner.out.State.Rules,
				netstate.Rule{Family: f, Priority: netstate.RulePriorityPodsToNodes, UDPPort: p.facts.Overlay, Table: netstate.ForwardedTable})
		}
	}
}

func (p *encryptionPlanner) guard() {
	g := &netstate.Guard{
		Link: netstate.EncryptionLink, Port: p.e.Port, Local: slices.Clone(p.facts.Local), Pods: p.pods,
		Overlay: p.facts.Overlay, AllTraffic: p.e.AllTraffic, Strict: p.out.Strict, Exempt: slices.Clone(p.facts.Exempt),
	}
	for _, n := range append(slices.Clone(p.m.Nodes), p.own) {
		g.Nodes = append(g.Nodes, n.Addresses...)
	}
	slices.SortFunc(g.Nodes, netip.Addr.Compare)
	g.Nodes = slices.Compact(g.Nodes)
	for _, gw := range p.m.Gateways {
		if !gw.Masquerade { // with nodeLink Direct nothing encrypts them: they are not to leave
			g.Sites = append(g.Sites, p.ranges(gw)...)
		}
	}
	slices.SortFunc(g.Sites, netstate.ComparePrefixes)
	g.Sites = slices.Compact(g.Sites)
	p.nodePlanner.out.State.Guard = g
}
