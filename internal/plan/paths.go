package plan

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// PathFacts is what probes have found out about the paths to one site.
type PathFacts struct {
	// Active is the index of the path that is used; negative: none carries packets.
	Active int
	// Down are the paths that do not answer, by index; it may be shorter than their number.
	Down []bool
}

// PathLink is the link of a site's i-th path, which it shares with the i-th paths of other
// sites.
func PathLink(i int) string { return fmt.Sprintf("cvtwg%d", i) }

// ProbeName names a path where it is probed and reported: "site default/berlin path 1".
func ProbeName(id model.ID, i int) string { return fmt.Sprintf("%s path %d", SiteName(id), i) }

// pathFacts are those of a site; by default its preferred path carries packets.
func (p *planner) pathFacts(s *model.Site) PathFacts {
	if f, ok := p.facts.Paths[s.ID]; ok && f.Active <= len(s.WireGuard.Alternatives) {
		return f
	}
	return PathFacts{Active: s.WireGuard.Preferred}
}

// pathSite joins a site by several tunnels, or by one that is probed. Each has a link of
// its own, since to WireGuard a range belongs to one peer of a device. All of them let the
// site in; what is opened towards it follows the active one.
func (p *planner) pathSite(s *model.Site) {
	known := p.pathFacts(s)
	for i, path := range s.WireGuard.Paths() {
		probe := host(path.Probe.Address)
		prefixes := slices.Clone(s.CIDRs)
		if !slices.ContainsFunc(prefixes, func(c netip.Prefix) bool { return c.Contains(probe.Addr()) }) {
			prefixes = append(prefixes, probe)
		}
		name, link := ProbeName(s.ID, i), PathLink(i)
		if i == 0 {
			name = SiteName(s.ID)
		}
		peer := netstate.WireGuardPeer{
			Name: name, PublicKey: path.PublicKey, PresharedKey: path.PresharedKey,
			PersistentKeepaliveSeconds: s.WireGuard.PersistentKeepaliveSeconds,
			Endpoint:                   p.endpoint(s.ID, path, pathField(i)), AllowedIPs: prefixes,
		}
		peer.Initiate = peer.Endpoint.IsValid()
		p.pathDevice(i, peer, path.Probe.Local)
		p.tunnel(netstate.Tunnel{Name: name, Kind: netstate.TunnelSite, Link: link, Prefixes: slices.Clone(prefixes), Access: s.Access})
		if !slices.Contains(s.CIDRs, probe) {
			p.route(probe, link)
		}
		if i < len(known.Down) && known.Down[i] {
			continue // what was pinned to it follows the active one
		}
		for _, c := range s.CIDRs {
			p.unicast(c, link, netstate.PathTable+i)
		}
	}
	for _, c := range s.CIDRs {
		if known.Active >= 0 {
			p.unicast(c, PathLink(known.Active), netstate.Table)
		}
		p.unreachable(c)
	}
}

// pathField is the field of a site's i-th path.
func pathField(i int) string {
	if i == 0 {
		return "spec.wireguard"
	}
	return fmt.Sprintf("spec.wireguard.alternatives[%d]", i-1)
}

// pathDevice adds a peer to the device of the i-th paths, and the address that the gateway
// has in its tunnel to it.
func (p *planner) pathDevice(i int, peer netstate.WireGuardPeer, local netip.Addr) {
	for len(p.paths) <= i {
		p.paths = append(p.paths, pathDevice{})
	}
	d := &p.paths[i]
	d.peers = append(d.peers, peer)
	if !slices.Contains(d.addresses, host(local)) {
		d.addresses = append(d.addresses, host(local))
	}
}

// pathDevice is what the i-th paths of all sites share.
type pathDevice struct {
	peers     []netstate.WireGuardPeer
	addresses []netip.Prefix
}

// finishPaths adds the devices of paths, and what keeps connections on them. That of the
// first paths is the gateway's own.
func (p *planner) finishPaths() {
	for i, d := range p.paths {
		if i == 0 {
			p.wg.Peers = append(p.wg.Peers, d.peers...)
		} else {
			p.out.State.Links = append(p.out.State.Links, netstate.Link{
				Name: PathLink(i), Kind: netstate.LinkWireGuard, MTU: p.mtu(overheadWireGuard), Addresses: d.addresses,
			})
			p.out.State.WireGuard = append(p.out.State.WireGuard, netstate.WireGuard{
				Link: PathLink(i), PrivateKey: p.facts.PrivateKey, PublicKey: p.facts.PublicKey,
				ListenPort: p.pathPort(i), FirewallMark: netstate.MarkOuter, Peers: d.peers,
			})
		}
		if i == 1 {
			p.looseReversePath() // what comes in by a path that is not in use is no stray
		}
		if len(p.paths) > 1 {
			p.out.State.Firewall.Pins = append(p.out.State.Firewall.Pins, netstate.Pin{Link: PathLink(i), Mark: netstate.MarkPath(i)})
		}
	}
}

// pathPort is the UDP port of the device of the i-th paths.
func (p *planner) pathPort(i int) uint16 {
	if int(p.gw.WireGuardPort)+netstate.MostPaths > 65535 {
		return p.gw.WireGuardPort - uint16(i)
	}
	return p.gw.WireGuardPort + uint16(i)
}

// pathRules lead pinned packets to their path's table.
func (p *planner) pathRules(f netstate.Family) {
	for i := range p.out.State.Firewall.Pins {
		p.out.State.Rules = append(p.out.State.Rules, netstate.Rule{
			Family: f, Priority: netstate.RulePriorityPath, Mark: netstate.MarkPath(i), MarkMask: netstate.MarkMask, Table: netstate.PathTable + i,
		})
	}
}
