package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Priorities: translation is at -100 (dstnat), so the tunnel chains see the endpoint.
const (
	priorityRelay     = -150 // mangle: before translation
	priorityTranslate = -100 // dstnat
	priorityUnmark    = -95
	priorityTunnels   = -90
	priorityUnserved  = -85
	priorityForward   = -150
	priorityLeaving   = 0
	priorityMasque    = 100 // srcnat
)

var proxied = fmt.Sprintf("meta mark & %#x == %#x", netstate.MarkMask, netstate.MarkProxy)

// family is what differs between the families in rules.
type family struct {
	n, ip, nfproto, echo string
	number               byte // NFPROTO_*
}

var families = []family{
	{"4", "ip", "ipv4", "icmp type echo-request", unix.NFPROTO_IPV4},
	{"6", "ip6", "ipv6", "icmpv6 type echo-request", unix.NFPROTO_IPV6},
}

func familyOf(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// each formats a rule for both families: {ip}, {n}, {nfproto} and {echo} are replaced.
func each(rules ...string) []string {
	var out []string
	for _, r := range rules {
		for _, f := range families {
			out = append(out, strings.NewReplacer("{ip}", f.ip, "{n}", f.n, "{nfproto}", f.nfproto, "{echo}", f.echo).Replace(r))
		}
	}
	return out
}

// translated matches connections that went to a service address.
var translated = each("ct status dnat ct original {ip} daddr @svc_nets{n}", "ct status dnat ct original {ip} daddr @svc_hosts{n}")

// with appends a verdict to matches.
func with(matches []string, verdict string) []string {
	out := make([]string, len(matches))
	for i, m := range matches {
		out[i] = m + " " + verdict
	}
	return out
}

// firewallChains adds the chains that do not depend on tunnels.
func firewallChains(p *part, masquerade bool) {
	p.base("prerouting", "filter", "prerouting", priorityTunnels, "iifname @fw_links goto fw_from")
	p.chain("from", append(each("iifname . {ip} saddr vmap @fw_hosts{n}", "iifname . {ip} saddr vmap @fw_nets{n}"),
		"counter name spoofed drop")...)
	p.base("forward", "filter", "forward", priorityForward,
		"oifname @fw_links ct state invalid counter name invalid drop",
		"tcp flags & (syn | rst) == syn goto fw_opening")
	p.chain("opening", "iifname vmap @fw_clamps", "oifname vmap @fw_clamps")
	leaks := each(
		"{ip} daddr . meta nfproto @fw_tunnel_nets{n} counter name leak drop",
		"{ip} daddr @fw_tunnel_hosts{n} counter name leak drop")
	// What an xfrm interface has taken comes here once more on its way into ESP, still with
	// its inner addresses, and with the underlay's link as the one that it leaves by. What
	// our own user space has encrypted comes from a socket, unlike what is forwarded. Pods
	// are no tunnel's: model refuses a range that is both.
	p.base("postrouting", "filter", "postrouting", priorityLeaving,
		slices.Concat([]string{
			`oifname "lo" accept`, "rt ipsec exists accept", "oifname @fw_links goto fw_out",
			fmt.Sprintf("meta mark & %#x == %#x meta skuid 0 accept", netstate.MarkMask, netstate.MarkOuter),
		}, each("{ip} daddr @fw_pods{n} accept"), leaks)...)
	p.chain("out", slices.Concat(each(
		"{ip} daddr . oifname @fw_out_nets{n} accept",
		"{ip} daddr . oifname @fw_out_hosts{n} accept"), leaks)...)
	var masq []string
	if masquerade {
		masq = []string{"iifname @fw_links oifname != @fw_links masquerade"}
	}
	// Also without rules: connections lose their translation when the last chain of type nat goes.
	p.base("masquerade", "nat", "postrouting", priorityMasque, masq...)
}

// verdict leads to the chain of an access.
func verdict(a netstate.Access) string { return "goto fw_to_" + accessName(a) }

func accessName(a netstate.Access) string { return strings.ReplaceAll(a.String(), ",", "_") }

// accessChain adds the chains of what an access may open.
func (r *firewallSets) accessChain(a netstate.Access) {
	suffix := accessName(a)
	services := a&netstate.AccessServices != 0
	rules := []string{
		"ct state invalid counter name invalid drop",
		"ct direction reply ct state established,related accept",
	}
	if services {
		rules = append(rules, proxied+" accept")
	}
	rules = append(rules, "fib daddr type local goto fw_host_"+suffix)
	pods := each("{ip} daddr @fw_pods{n} accept")
	if services && a&netstate.AccessPods != 0 {
		rules = append(rules, pods...) // most packets are for pods: nothing below would change that
	}
	if a&netstate.AccessSites != 0 {
		rules = append(rules, each("{ip} daddr . meta nfproto @fw_site_nets{n} accept", "{ip} daddr @fw_site_hosts{n} accept")...)
	}
	rules = append(rules, each("{ip} daddr . meta nfproto @fw_tunnel_nets{n} counter name denied drop", "{ip} daddr @fw_tunnel_hosts{n} counter name denied drop")...)
	if services {
		rules = append(rules, with(translated, "accept")...)
		// No endpoint: svc_unserved rejects, unless services are routed.
		rules = append(rules, each("{ip} daddr @svc_nets{n} accept", "{ip} daddr @svc_hosts{n} accept", "{ip} daddr @fw_services{n} accept")...)
	} else {
		rules = append(rules, with(translated, "counter name denied drop")...)
	}
	if !services && a&netstate.AccessPods != 0 {
		rules = append(rules, pods...)
	}
	if a&netstate.AccessNodes != 0 {
		rules = append(rules, each("{ip} daddr @fw_nodes{n} accept")...)
	}
	r.part.chain("to_"+suffix, append(rules, "counter name denied drop")...)
	r.hostChain(suffix, a)
}

// hostChain is what an access may open on the host itself. A service whose endpoint is
// on the host is a service, not the host.
func (r *firewallSets) hostChain(suffix string, a netstate.Access) {
	verdict := "counter name denied drop"
	if a&netstate.AccessServices != 0 {
		verdict = "accept"
	}
	rules := append(with(translated, verdict), each("{echo} accept")...)
	if a&netstate.AccessServices != 0 {
		// A service's address that is the host's own, with no such port: svc_unserved rejects.
		rules = append(rules, each("{ip} daddr @svc_nets{n} accept", "{ip} daddr @svc_hosts{n} accept")...)
	}
	if a&netstate.AccessNodes != 0 {
		rules = append(rules, each("{ip} daddr @fw_nodes{n} accept")...)
	}
	r.part.chain("host_"+suffix, append(rules, "counter name denied drop")...)
}
