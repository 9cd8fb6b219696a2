package nft

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// rendered is what the part of the firewall was made from, and what the next one can
// build on.
type rendered struct {
	from     netstate.Firewall
	conflict error          // of tunnels that cannot have what they ask for
	ranges   []owned        // of links, sorted; none inside another of the same link
	users    map[string]int // how many tunnels and pools need a link or a verdict
	shared   bool           // tunnels of a link have an address in common
}

// renderFirewall makes the part from nothing. Of two tunnels that cannot both have what
// they ask for one is left out; the part's conflict says so.
func renderFirewall(f netstate.Firewall) (*part, error) {
	p := newPart(partFirewall)
	firewallChains(p, f.Masquerade)
	f.Tunnels = slices.Clone(f.Tunnels)
	p.firewall = &rendered{from: f, users: map[string]int{}}
	r := firewallSets{part: p, rendered: p.firewall, links: map[string]string{}, verdicts: map[netstate.Access]string{}}
	for _, t := range f.Tunnels {
		r.tunnel(t)
	}
	for _, pool := range f.Pools {
		r.leaving(pool.Link, pool.Prefixes)
	}
	for _, c := range f.Clamps {
		r.clamp(c)
	}
	fillNets(p, "fw_pods", f.Pods)
	fillNets(p, "fw_services", f.Services)
	fillNets(p, "fw_nodes", f.Nodes)
	r.nodeLink(f.NodeLink)
	r.pins(f.Pins)
	r.keep(f.Unmasqueraded)
	r.finish()
	return p, r.err
}

// firewallSets fills the sets of the firewall.
type firewallSets struct {
	part     *part
	rendered *rendered
	err      error

	links    map[string]string // quoted
	verdicts map[netstate.Access]string
	hosts    []host
	// The rest are prefixes that are not single addresses.
	sources []owned
	out     []owned
	sites   []netip.Prefix
}

// owned is a prefix on a link; chain is where packets from it go.
type owned struct {
	link   string
	prefix netip.Prefix
	chain  string
	owner  string
}

var linkName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,15}$`)

// link quotes the name of a link; one that nft(8) could read as anything else is an error.
func link(name string) (string, error) {
	if !linkName.MatchString(name) {
		return "", fmt.Errorf("link name %q: want 1 to 15 letters, digits, '_', '.' or '-'", name)
	}
	return `"` + name + `"`, nil
}

func (r *firewallSets) link(name string) string {
	if l, ok := r.links[name]; ok {
		return l
	}
	l, err := link(name)
	r.links[name] = l
	if r.err == nil {
		r.err = err
	}
	return l
}

func (r *firewallSets) tunnel(t netstate.Tunnel) {
	l, to := r.link(t.Link), r.verdict(t.Access)
	for _, p := range t.Prefixes {
		p = p.Masked()
		if !p.IsSingleIP() {
			r.sources = append(r.sources, owned{l, p, to, t.Name})
			continue
		}
		r.hosts = append(r.hosts, host{l, p.Addr(), to, false, t.Name})
	}
	if t.Kind == netstate.TunnelSite {
		r.sites = append(r.sites, t.Prefixes...)
	}
	r.leaving(t.Link, t.Prefixes)
	r.rendered.users[to]++
}

// verdict leads to the chain of an access.
func (r *firewallSets) verdict(a netstate.Access) string {
	v, ok := r.verdicts[a]
	if !ok {
		r.accessChain(a)
		v = verdict(a)
		r.verdicts[a] = v
	}
	return v
}

// leaving says that what is for these prefixes leaves through the link.
func (r *firewallSets) leaving(name string, prefixes []netip.Prefix) {
	l := r.link(name)
	r.part.sets["fw_links"][l] = ""
	r.rendered.users[l]++
	for _, p := range prefixes {
		if !p.IsSingleIP() {
			r.out = append(r.out, owned{link: l, prefix: p.Masked()})
		}
	}
}

func (r *firewallSets) clamp(c netstate.Clamp) {
	name := fmt.Sprintf("clamp_%d_%d", c.MSS4, c.MSS6)
	if _, ok := r.part.chains["fw_"+name]; !ok {
		var rules []string
		for i, mss := range []uint16{c.MSS4, c.MSS6} {
			if mss != 0 {
				rules = append(rules, fmt.Sprintf("meta nfproto %s tcp flags & (syn | rst) == syn tcp option maxseg size > %d tcp option maxseg size set %d",
					families[i].nfproto, mss, mss))
			}
		}
		r.part.chain(name, rules...)
	}
	r.part.sets["fw_clamps"][r.link(c.Link)] = "jump fw_" + name
}

// fillNets fills the interval sets of a name for both families.
func fillNets(part *part, name string, prefixes []netip.Prefix) {
	for _, p := range outermost(prefixes) {
		part.sets[name+familyOf(p.Addr())][prefixText(p)] = ""
	}
}

// fillProtoNets does so for sets whose elements also name the protocol; see frame.
func fillProtoNets(part *part, name string, prefixes []netip.Prefix) {
	for _, p := range outermost(prefixes) {
		n := familyOf(p.Addr())
		part.sets[name+n][prefixText(p)+" . ipv"+n] = ""
	}
}

// finish fills the sets that need to know all prefixes: intervals must not overlap.
func (r *firewallSets) finish() {
	r.finishSources()
	r.finishOut()
	r.finishHosts()
	hosts, nets := split(r.sites)
	for _, a := range hosts {
		r.part.sets["fw_site_hosts"+familyOf(a)][a.String()] = ""
	}
	fillProtoNets(r.part, "fw_site_nets", nets)
}

func (r *firewallSets) finishSources() {
	sortOwned(r.sources)
	var last owned
	for _, o := range r.sources {
		if o.link == last.link && last.prefix.IsValid() && last.prefix.Contains(o.prefix.Addr()) {
			if o.chain != last.chain {
				r.conflict("%s: its range %s overlaps %s of %s, which has other access", o.owner, o.prefix, last.prefix, last.owner)
			}
			continue
		}
		r.part.sets["fw_nets"+familyOf(o.prefix.Addr())][o.link+" . "+prefixText(o.prefix)] = o.chain
		last = o
	}
}

// conflict records the first conflict; the others show when it is resolved.
func (r *firewallSets) conflict(format string, args ...any) {
	if r.rendered.conflict == nil {
		r.rendered.conflict = fmt.Errorf(format, args...)
	}
}

func (r *firewallSets) finishOut() {
	sortOwned(r.out)
	out := r.out[:0]
	var all []netip.Prefix
	for _, o := range r.out {
		if len(out) > 0 && out[len(out)-1].covers(o.link, o.prefix.Addr()) {
			continue
		}
		out = append(out, o)
		all = append(all, o.prefix)
		r.part.sets["fw_out_nets"+familyOf(o.prefix.Addr())][prefixText(o.prefix)+" . "+o.link] = ""
	}
	fillProtoNets(r.part, "fw_tunnel_nets", all)
	r.rendered.ranges = out
}

// finishHosts sorts the hosts. An address that two tunnels of a link have is the first
// one's, by name.
func (r *firewallSets) finishHosts() {
	slices.SortFunc(r.hosts, func(a, b host) int {
		if c := compareHosts(a, b); c != 0 {
			return c
		}
		return strings.Compare(a.owner, b.owner)
	})
	hosts := r.hosts[:0]
	for _, h := range r.hosts {
		if len(hosts) == 0 || compareHosts(hosts[len(hosts)-1], h) != 0 {
			hosts = append(hosts, h)
			continue
		}
		r.rendered.shared = true
		if last := hosts[len(hosts)-1]; last.chain != h.chain {
			r.conflict("%s: its address %s is also that of %s, which has other access", h.owner, h.addr, last.owner)
		}
	}
	r.rendered.bare(hosts)
	for _, h := range hosts {
		r.part.sum.add(h.digest())
	}
	r.part.hosts = hosts
}

// bare finds out which hosts no range of their link covers; they are sorted.
func (r *rendered) bare(hosts []host) {
	i := 0
	for k := range hosts {
		h := &hosts[k]
		for i < len(r.ranges) && compareHosts(host{link: r.ranges[i].link, addr: r.ranges[i].prefix.Addr()}, *h) <= 0 {
			i++
		}
		h.bare = i == 0 || !r.ranges[i-1].covers(h.link, h.addr)
	}
}

func (o owned) covers(link string, a netip.Addr) bool { return o.link == link && o.prefix.Contains(a) }

// sortOwned sorts by link, then so that a prefix comes before those inside it; equal ones
// by owner.
func sortOwned(list []owned) {
	slices.SortFunc(list, func(a, b owned) int {
		if c := strings.Compare(a.link, b.link); c != 0 {
			return c
		}
		if c := netstate.ComparePrefixes(a.prefix, b.prefix); c != 0 {
			return c
		}
		return strings.Compare(a.owner, b.owner)
	})
}

// split separates single addresses from ranges.
func split(prefixes []netip.Prefix) (hosts []netip.Addr, nets []netip.Prefix) {
	for _, p := range prefixes {
		if p.IsSingleIP() {
			hosts = append(hosts, p.Addr())
		} else {
			nets = append(nets, p)
		}
	}
	return hosts, nets
}

// outermost sorts prefixes and leaves out those that lie inside others.
func outermost(prefixes []netip.Prefix) []netip.Prefix {
	sorted := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		sorted = append(sorted, p.Masked())
	}
	slices.SortFunc(sorted, netstate.ComparePrefixes)
	out := sorted[:0]
	for _, p := range sorted {
		if len(out) == 0 || !out[len(out)-1].Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

// prefixText is a prefix as nft(8) lists it.
func prefixText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
