package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// Bytes that WireGuard adds to a packet between nodes: its header and tag (32), UDP (8) and
// the outer IP header (20 or 40).
const (
	overheadNode4 = 60
	overheadNode6 = 80
)

// nodeKeepalive is how often two nodes that have nothing to say to each other prove that
// they could, in seconds.
const nodeKeepalive = 25

// EncryptionName is the name of the NodeEncryption in Waiting.
const EncryptionName = "NodeEncryption cluster"

// EncryptionFacts is what the planner must know of a node to encrypt its traffic with
// other nodes.
type EncryptionFacts struct {
	// PrivateKey is the node's; zero in a dry run.
	PrivateKey secret.Bytes
	PublicKey  netstate.Key
	// Local are the links that pods are attached to, as of netstate.Guard.
	Local []string
	// Pods are ranges of the cluster's pods in addition to those of the Nodes, so that also
	// a node that has just joined is not spoken to in the clear.
	Pods []netip.Prefix
	// Exempt are the listeners that need no encryption.
	Exempt []netstate.Exemption
	// UnderlayMTU is that of the way to the other nodes, in bytes; 0: 1500.
	UnderlayMTU int
	// Enforced: this node dropped plain packets before.
	Enforced bool
	// Alive are the peers that have answered lately, by their key.
	Alive map[netstate.Key]bool
	// Met are the peers that have ever answered under a key.
	Met map[netstate.Key]bool
	// Mismatch says why plain packets cannot be told from others on this node: a pod with
	// an address that is in no range. Empty: they can.
	Mismatch string
	// Refused says why nothing can be promised beside the cluster's network plugin, the same on
	// all nodes. Empty: it can.
	Refused string
	// Overlay is the UDP port of the network plugin's overlay, by which it carries pods' packets
	// past the routes; 0: it has none.
	Overlay uint16
	// Loose are the links to check the reverse path loosely on, where that must not be said of all:
	// Cilium's for pods have no addresses, and the kernel then drops whatever comes by them.
	Loose []string
}

// EncryptionResult is what follows for a node from a NodeEncryption beside the state.
type EncryptionResult struct {
	// Strict: plain packets are dropped.
	Strict bool
	// Enforce: Strict can be declared in effect in the cluster.
	Enforce bool
	// Peers are the other nodes that have a key, by their keys.
	Peers map[netstate.Key]string
	// Nodes is how many other nodes there are.
	Nodes int
}

// encryptionPlanner plans the traffic between nodes.
type encryptionPlanner struct {
	*nodePlanner
	e     *model.NodeEncryption
	facts EncryptionFacts
	out   *EncryptionResult
	own   model.Node

	pods    []netip.Prefix            // of the cluster
	claimed map[string][]netip.Prefix // by node
	wg      netstate.WireGuard
	outer   netstate.Family // IPv6 when any peer is reached over it
}

// encryption adds what keeps the traffic between nodes encrypted.
func (p *nodePlanner) encryption() {
	if p.m.NodeEncryption == nil {
		return
	}
	p.out.Encryption = &EncryptionResult{Peers: map[netstate.Key]string{}}
	e := &encryptionPlanner{
		nodePlanner: p, e: p.m.NodeEncryption, facts: p.facts.Encryption, out: p.out.Encryption,
		own: p.facts.Node, claimed: map[string][]netip.Prefix{}, outer: netstate.IPv4,
	}
	e.podRanges()
	e.enforcement()
	e.device()
	e.claims()
	for _, n := range e.m.Nodes {
		if n.Name != e.own.Name {
			e.out.Nodes++
			e.peer(n)
		}
	}
	e.link()
	e.closed()
	e.encryptionRules()
	e.guard()
}

// podRanges are those of all nodes and those that are known otherwise.
func (p *encryptionPlanner) podRanges() {
	p.pods = slices.Clone(p.facts.Pods)
	for _, n := range append(slices.Clone(p.m.Nodes), p.own) {
		p.pods = append(p.pods, n.PodCIDRs...)
	}
	slices.SortFunc(p.pods, netstate.ComparePrefixes)
	p.pods = slices.Compact(p.pods)
}

// enforcement decides whether plain packets are dropped. A cluster in which a node is not
// ready waits, but what has once been strict does not become lax because a node joins.
func (p *encryptionPlanner) enforcement() {
	if !p.e.Strict {
		return
	}
	p.out.Strict = p.e.Enforced || p.facts.Enforced
	var missing []string
	for _, n := range p.m.Nodes {
		switch i := slices.IndexFunc(p.e.Nodes, func(t model.NodeTunnel) bool { return t.Name == n.Name }); {
		case i < 0:
			missing = append(missing, n.Name+" (no key)")
		case !p.e.Nodes[i].Ready:
			missing = append(missing, n.Name+" (not all others answer it)")
		}
	}
	why := p.facts.Refused
	if why == "" {
		why = p.facts.Mismatch
	}
	switch {
	case len(missing) == 0 && why == "":
		p.out.Enforce = true
		p.out.Strict = true
	case p.out.Strict:
	case why != "":
		p.waits(EncryptionName, "Strict waits: "+why)
	default:
		p.waits(EncryptionName, fmt.Sprintf("Strict waits for %s", strings.Join(missing, ", ")))
	}
}

// waits says why something is not in effect.
func (p *encryptionPlanner) waits(name, why string) { p.nodePlanner.out.Waiting[name] = why }

func (p *encryptionPlanner) device() {
	p.wg = netstate.WireGuard{
		Link: netstate.EncryptionLink, PrivateKey: p.facts.PrivateKey, PublicKey: p.facts.PublicKey,
		ListenPort: p.e.Port, FirewallMark: netstate.MarkOuter,
	}
}

// claim is an address or pod range of a node.
type claim struct {
	prefix netip.Prefix
	node   string
}

// claims gives every address and pod range to one node: what two claim belongs to this
// node, or to the one that claims more around it, or whose name comes first.
func (p *encryptionPlanner) claims() {
	var all []claim
	for _, n := range append(slices.Clone(p.m.Nodes), p.own) {
		for _, c := range n.PodCIDRs {
			all = append(all, claim{c, n.Name})
		}
		for _, a := range n.Addresses {
			all = append(all, claim{host(a), n.Name})
		}
	}
	slices.SortFunc(all, func(a, b claim) int {
		if c := netstate.ComparePrefixes(a.prefix, b.prefix); c != 0 {
			return c
		}
		switch {
		case a.node == b.node:
			return 0
		case a.node == p.own.Name:
			return -1
		case b.node == p.own.Name:
			return 1
		}
		return compareStrings(a.node, b.node)
	})
	var around claim // the last one that was not inside another
	for _, c := range all {
		if around.node != "" && around.prefix.Overlaps(c.prefix) {
			if c.node != around.node {
				p.waits("node "+c.node, fmt.Sprintf("%s belongs to node %s already: it is not sent there", c.prefix, around.node))
				continue
			}
		} else {
			around = c
		}
		if mine := p.claimed[c.node]; !slices.Contains(mine, c.prefix) {
			p.claimed[c.node] = append(mine, c.prefix)
		}
	}
}

// peer leads to another node what is for it and its pods.
func (p *encryptionPlanner) peer(n model.Node) {
	mine := p.claimed[n.Name]
	i := slices.IndexFunc(p.e.Nodes, func(t model.NodeTunnel) bool { return t.Name == n.Name })
	if i < 0 {
		p.waits("node "+n.Name, "has no key yet: no agent runs there, or it does not reach the API server")
		return
	}
	t := p.e.Nodes[i]
	endpoint := p.endpoint(n)
	if !endpoint.IsValid() {
		p.waits("node "+n.Name, "has no address of a family that this node has")
		return
	}
	if netstate.FamilyOf(endpoint.Addr()) == netstate.IPv6 {
		p.outer = netstate.IPv6
	}
	use := t.PublicKey
	keys := []netstate.Key{t.PublicKey}
	if !t.NextPublicKey.IsZero() && t.NextPublicKey != t.PublicKey {
		keys = append(keys, t.NextPublicKey)
		if p.facts.Met[t.NextPublicKey] {
			use = t.NextPublicKey
		}
	}
	for _, k := range keys {
		peer := netstate.WireGuardPeer{Name: "node " + n.Name, PublicKey: k}
		if k == use {
			peer.Endpoint, peer.Initiate, peer.PersistentKeepaliveSeconds, peer.AllowedIPs = endpoint, true, nodeKeepalive, slices.Clone(mine)
			p.out.Peers[k] = n.Name
		}
		p.wg.Peers = append(p.wg.Peers, peer)
	}
	if !p.out.Strict && !p.facts.Alive[use] {
		p.waits("node "+n.Name, "has not answered yet: what is for it leaves as it is")
		return
	}
	for _, c := range mine {
		p.leads(n, c)
	}
}

// endpoint is where a node's WireGuard listens.
func (p *encryptionPlanner) endpoint(n model.Node) netip.AddrPort {
	for _, f := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		if a := addressOf(n.Addresses, f); a.IsValid() && addressOf(p.own.Addresses, f).IsValid() {
			return netip.AddrPortFrom(a, p.e.Port)
		}
	}
	return netip.AddrPort{}
}

// leads adds the routes to a range or address of another node.
func (p *encryptionPlanner) leads(n model.Node, c netip.Prefix) {
	r := netstate.Route{
		Destination: c, Kind: netstate.RouteUnicast, Link: netstate.EncryptionLink, Metric: netstate.MetricTunnel,
		Source: addressOf(p.own.Addresses, netstate.FamilyOf(c.Addr())),
	}
	node := c.IsSingleIP() && slices.Contains(n.Addresses, c.Addr())
	if !node || p.e.AllTraffic {
		p.route(r, netstate.EncryptionTable)
	}
	if node {
		p.route(r, netstate.ForwardedTable)
	}
}

func (p *encryptionPlanner) route(r netstate.Route, table int) {
	r.Table = table
	p.nodePlanner.out.State.Routes = append(p.nodePlanner.out.State.Routes, r)
}

// link is the WireGuard link. It has the node's own addresses, for those who choose a
// source by the link that a packet leaves by.
func (p *encryptionPlanner) link() {
	mtu := p.facts.UnderlayMTU
	if mtu == 0 {
		mtu = defaultMTU
	}
	if mtu -= overheadNode4; p.outer == netstate.IPv6 {
		mtu -= overheadNode6 - overheadNode4
	}
	mtu = max(mtu, minimumMTU)
	l := netstate.Link{Name: netstate.EncryptionLink, Kind: netstate.LinkWireGuard, MTU: mtu}
	for _, f := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		if a := addressOf(p.own.Addresses, f); a.IsValid() {
			l.Addresses = append(l.Addresses, host(a))
		}
	}
	s := &p.nodePlanner.out.State
	p.insideOf(mtu)
	s.Links = append(s.Links, l)
	s.WireGuard = append(s.WireGuard, p.wg)
	s.Firewall.Clamps = append(s.Firewall.Clamps, netstate.Clamp{Link: l.Name, MSS4: uint16(mtu - 40), MSS6: uint16(mtu - 60)})
	// Nodes answer by the link although the kernel would send to them by another one: the
	// check of the reverse path knows no marks, and ARP has none.
	s.Sysctls = append(s.Sysctls, p.loose()...)
	s.Sysctls = append(s.Sysctls, netstate.Sysctl{Path: "net/ipv4/ip_forward", Value: "1"})
	if slices.Contains(p.families, netstate.IPv6) {
		s.Sysctls = append(s.Sysctls, netstate.Sysctl{Path: "net/ipv6/conf/all/forwarding", Value: "1"})
	}
}

func (p *encryptionPlanner) loose() []netstate.Sysctl {
	if len(p.facts.Loose) == 0 {
		return []netstate.Sysctl{looseReversePath}
	}
	var out []netstate.Sysctl
	for _, l := range p.facts.Loose {
		out = append(out, netstate.Sysctl{Path: "net/ipv4/conf/" + l + "/rp_filter", Value: looseReversePath.Value})
	}
	return out
}

// insideOf makes the node link fit into the encrypted one, by which it reaches pods of other
// nodes.
func (p *encryptionPlanner) insideOf(mtu int) {
	s := &p.nodePlanner.out.State
	for i := range s.Links {
		if l := &s.Links[i]; l.Name == netstate.NodeLinkName {
			l.MTU = min(l.MTU, linkMTU(mtu, l.VXLAN.Family))
			for j := range s.Firewall.Clamps {
				if c := &s.Firewall.Clamps[j]; c.Link == l.Name {
					c.MSS4, c.MSS6 = uint16(l.MTU-40), uint16(l.MTU-60)
				}
			}
		}
	}
}
