package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// renderServices is everything of s but the translated ports.
func renderServices(s netstate.Services) (*part, error) {
	p := newPart(partServices)
	servicesChains(p, s.Mode)
	switch s.Mode {
	case "", netstate.ServicesRoute:
		return p, nil
	case netstate.ServicesTranslate, netstate.ServicesProxy:
	default:
		return nil, fmt.Errorf("unknown services mode %q", s.Mode)
	}
	for _, name := range s.Sources {
		l, err := link(name)
		if err != nil {
			return nil, err
		}
		p.sets["svc_sources"][l] = ""
	}
	ranges := outermost(s.Ranges)
	fillNets(p, "svc_nets", ranges)
	fillNets(p, "svc_pods", s.Pods)
	for _, port := range s.Ports {
		a := port.Address.Unmap()
		if !a.IsValid() || a.Zone() != "" {
			return nil, fmt.Errorf("service port %q: address %q is not valid here", port.Name, a)
		}
		if !contains(ranges, a) {
			p.sets["svc_hosts"+familyOf(a)][a.String()] = ""
		}
		relayed := port.Protocol == netstate.TCP || port.Protocol == netstate.UDP
		if s.Mode == netstate.ServicesProxy && relayed && len(port.Endpoints) > 0 {
			p.sets["svc_relay"+familyOf(a)][keyOf(port).text()] = ""
		}
	}
	return p, nil
}

func contains(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func servicesChains(p *part, mode netstate.ServicesMode) {
	var relay, translate, unmark, unserved, masq []string
	switch mode {
	case netstate.ServicesRoute:
	case netstate.ServicesProxy:
		// What was translated before the mode changed stays so.
		relay = each("iifname @svc_sources ct status & dnat == 0 {ip} daddr . meta l4proto . th dport @svc_relay{n} goto svc_relay")
	case netstate.ServicesTranslate:
		translate = each("iifname @svc_sources {ip} daddr . meta l4proto . th dport vmap @svc_picks{n}")
		unmark = []string{"ct status & (dnat | confirmed) != dnat accept"} // not the first packet
		for _, m := range translated {
			unmark = append(unmark, "iifname @svc_sources "+strings.TrimPrefix(m, "ct status dnat ")+" ct mark set 0")
		}
		masq = each(
			"iifname @svc_sources oifname != @fw_links ct status dnat ct original {ip} daddr @svc_nets{n} {ip} daddr != @svc_pods{n} masquerade",
			"iifname @svc_sources oifname != @fw_links ct status dnat ct original {ip} daddr @svc_hosts{n} {ip} daddr != @svc_pods{n} masquerade")
	}
	if mode != netstate.ServicesRoute {
		unserved = []string{proxied + " accept", "iifname @svc_sources goto svc_unserved", "iifname @fw_links goto svc_unserved"}
	}
	p.baseUnlessEmpty("relaying", "filter", "prerouting", priorityRelay, relay)
	mark := fmt.Sprintf("meta mark set meta mark & %#x | %#x accept", ^uint32(netstate.MarkMask), netstate.MarkProxy)
	p.chain("relay",
		fmt.Sprintf("meta nfproto ipv4 meta l4proto { tcp, udp } tproxy ip to 127.0.0.1:%d %s", netstate.RelayPort, mark),
		fmt.Sprintf("meta nfproto ipv6 meta l4proto { tcp, udp } tproxy ip6 to [::1]:%d %s", netstate.RelayPort, mark))
	p.baseUnlessEmpty("translating", "nat", "prerouting", priorityTranslate, translate)
	p.baseUnlessEmpty("unmark", "filter", "prerouting", priorityUnmark, unmark)
	p.baseUnlessEmpty("rejecting", "filter", "prerouting", priorityUnserved, unserved)
	p.chain("unserved", slices.Concat(
		each("{ip} daddr @fw_pods{n} accept"), []string{"ct direction reply accept"}, // the host's own: probes
		each("{ip} daddr @svc_nets{n} goto svc_reject", "{ip} daddr @svc_hosts{n} goto svc_reject", "{ip} daddr @fw_services{n} goto svc_reject"))...)
	p.chain("reject", "counter name rejected", "meta l4proto tcp reject with tcp reset", "reject with icmpx port-unreachable")
	p.baseUnlessEmpty("masquerade", "nat", "postrouting", priorityMasque, masq)
}

// baseUnlessEmpty adds a base chain that has rules: each costs every packet a little.
func (p *part) baseUnlessEmpty(name, kind, hook string, priority int, rules []string) {
	if len(rules) > 0 {
		p.base(name, kind, hook, priority, rules...)
	}
}

// pick is a chain that draws one of n backends. All ports with as many backends and the
// same affinity share it, except IPv6 ports with affinity: they have one each.
type pick struct {
	family   string // "4" or "6"
	backends int
	affinity int     // seconds; 0: none
	port     portKey // IPv6 with affinity only
}

func (p *port) pick(k portKey) pick {
	out := pick{familyOf(k.addr), len(p.eps), p.affinity, portKey{}}
	if p.affinity > 0 && k.addr.Is6() {
		out.port = k
	}
	return out
}

// name is the chain's, without the part.
func (k pick) name() string {
	switch {
	case k.affinity == 0:
		return fmt.Sprintf("pick%s_%d", k.family, k.backends)
	case k.family == "4":
		return fmt.Sprintf("sticky4_%ds_%d", k.affinity, k.backends)
	}
	return "sticky6_" + k.suffix()
}

// suffix tells IPv6 ports with affinity apart.
func (k pick) suffix() string {
	return fmt.Sprintf("%ds_%d_%d_%x", k.affinity, k.port.proto, k.port.port, k.port.addr.As16())
}

// chain draws an endpoint. It runs for the first packet of a connection; slot and number
// go from rule to rule in the connection's mark, which is 0 until then and afterwards.
func (k pick) chain() chain {
	f := families[0]
	if k.family == "6" {
		f = families[1]
	}
	key := f.ip + " daddr . meta l4proto . th dport"
	dnat := fmt.Sprintf("meta l4proto { tcp, udp, sctp } dnat %s to ct mark map @svc_eps%s", f.ip, f.n)
	draw := fmt.Sprintf("ct mark set numgen random mod %d", k.backends)
	if k.backends == 1 {
		draw = "ct mark set 0"
	}
	c := chain{rules: []string{draw, fmt.Sprintf("ct mark set %s . ct mark map @svc_slots%s", key, f.n), dnat}}
	if k.affinity == 0 {
		return c
	}
	aff, sticky := "svc_aff4", "ip saddr . "+key
	if k.family == "6" {
		aff, sticky = affinityMap+k.suffix(), "ip6 saddr"
		c.affinity6 = aff
	}
	update := fmt.Sprintf("update @%s { %s timeout %ds : ct mark }", aff, sticky, k.affinity)
	c.rules = []string{
		// Numbers begin at 1. One that is gone misses in the last of these rules.
		"ct mark set 0",
		fmt.Sprintf("ct mark set %s map @%s", sticky, aff),
		"ct mark != 0 " + update,
		dnat,
		c.rules[0], c.rules[1],
		// "update" alone keeps the stale number.
		fmt.Sprintf("delete @%s { %s : ct mark }", aff, sticky),
		update,
		dnat,
	}
	return c
}

// affinityMap begins the name of the map of an IPv6 port with affinity.
const affinityMap = "svc_aff6_"

func (p *part) addPicks(picks map[pick]bool) {
	for k := range picks {
		p.chains[p.name+"_"+k.name()] = k.chain()
	}
}
