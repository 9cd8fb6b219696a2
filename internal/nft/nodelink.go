package nft

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Priorities of the node link's chains.
const (
	priorityNodeLink = -150 // of input: before anybody's filter
	priorityKeep     = 95   // srcnat - 5: the first chain that sets a translation up wins
)

// nodeLink guards a link that authenticates nobody: what it takes in is checked by the
// outer source address, what comes out of it by the inner one.
func (r *firewallSets) nodeLink(l *netstate.NodeLink) {
	if l == nil {
		return
	}
	name := r.link(l.Link)
	const otherwise = "counter name spoofed drop"
	r.part.base("link_input", "filter", "input", priorityNodeLink, fmt.Sprintf("udp dport %d goto fw_link_outer", l.Port))
	// A packet that is taken out keeps the mark of the one around it. Cilium marks that with the
	// identity of the pod that has sent it, the gateway's: policies would see it in the place
	// of a site's address.
	unmark := append([]string{"meta mark set 0"}, each("{ip} saddr @fw_outer{n} accept")...)
	r.part.chain("link_outer", append(unmark, otherwise)...)
	r.part.base("link_prerouting", "filter", "prerouting", priorityTunnels, fmt.Sprintf("iifname %s goto fw_link_inner", name))
	r.part.chain("link_inner", append(each("{ip} saddr @fw_inner_hosts{n} accept", "{ip} saddr @fw_inner_nets{n} accept"), otherwise)...)
	for _, a := range l.Outer {
		r.part.sets["fw_outer"+familyOf(a)][a.String()] = ""
	}
	hosts, nets := split(l.Sources)
	for _, a := range hosts {
		r.part.sets["fw_inner_hosts"+familyOf(a)][a.String()] = ""
	}
	fillNets(r.part, "fw_inner_nets", nets)
}

// keep leaves the addresses of some ranges as they are: an identity translation, since
// accept in a chain of ours exempts nothing from another table's masquerade. What somebody
// else sends on to another destination (kube-proxy, for a NodePort) is left to them.
func (r *firewallSets) keep(ranges []netip.Prefix) {
	if len(ranges) == 0 {
		return
	}
	rules := each("{ip} daddr @fw_keep{n} snat {ip} to {ip} saddr")
	rules = append(rules, "ct status dnat accept")
	rules = append(rules, each("{ip} saddr @fw_keep{n} snat {ip} to {ip} saddr")...)
	r.part.base("keep", "nat", "postrouting", priorityKeep, rules...)
	fillNets(r.part, "fw_keep", ranges)
}

func sameNodeLink(a, b *netstate.NodeLink) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Link == b.Link && a.Port == b.Port && slices.Equal(a.Outer, b.Outer) && slices.Equal(a.Sources, b.Sources)
}
