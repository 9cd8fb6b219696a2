package guard

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Priorities of the chains. Incoming packets are judged before connection tracking (-200)
// and translation; outgoing ones after it (100). The mark of exempt flows is set before a
// rule of others could be.
const (
	priorityIn      = -310
	priorityForward = -150
	priorityMark    = -150
	priorityOut     = 300
)

// kinds are what is dropped, see the package's comment.
var kinds = []string{"in_pods", "in_nodes", "in_hosts", "in_overlay", "in_unknown", "out_pods", "out_nodes", "out_overlay", "out_hosts", "out_unknown"}

// seenFor is how long a pair of addresses stays in the list of what was dropped.
const seenFor = "10m"

// table is the guard as nft(8) reads it.
type table struct {
	sets   map[string][]string // elements, sorted; see setTypes
	chains map[string]chain
	order  []string // of the chains: those that are jumped to come first
	stamp  string
}

type chain struct {
	hook  string
	rules []string
}

// setTypes are the sets that hold what is in a netstate.Guard.
var setTypes = map[string]string{
	"ours": "type ifname", "local": "type ifname",
	"nodes4": "type ipv4_addr", "nodes6": "type ipv6_addr",
	"pods4": "type ipv4_addr; flags interval", "pods6": "type ipv6_addr; flags interval",
	"sites4": "type ipv4_addr; flags interval", "sites6": "type ipv6_addr; flags interval",
	"exempt4": "type ipv4_addr . inet_proto . inet_service", "exempt6": "type ipv6_addr . inet_proto . inet_service",
}

var linkName = regexp.MustCompile(`^[A-Za-z0-9_.:@-]{1,15}\*?$`)

func render(g *netstate.Guard) (*table, error) {
	if g.Port == 0 || !linkName.MatchString(g.Link) {
		return nil, fmt.Errorf("link %q and UDP port %d must be given", g.Link, g.Port)
	}
	t := &table{sets: map[string][]string{}, chains: map[string]chain{}}
	for name := range setTypes {
		t.sets[name] = nil
	}
	patterns, err := t.links(g)
	if err != nil {
		return nil, err
	}
	for _, a := range g.Nodes {
		t.add("nodes"+suffix(a), a.String())
	}
	for _, c := range disjoint(g.Pods) {
		t.add("pods"+suffix(c.Addr()), c.String())
	}
	for _, c := range disjoint(g.Sites) {
		t.add("sites"+suffix(c.Addr()), c.String())
	}
	for _, e := range g.Exempt {
		t.add("exempt"+suffix(e.Address), fmt.Sprintf("%s . %s . %d", e.Address, e.Protocol, e.Port))
	}
	for name, list := range t.sets {
		slices.Sort(list)
		t.sets[name] = slices.Compact(list)
	}
	t.kinds(g.Strict)
	t.incoming(g, patterns)
	t.forwarded(patterns)
	t.outgoing(g, patterns)
	t.stamp = t.digest()
	if g.Strict {
		t.stamp = stampStrict + t.stamp
	}
	return t, nil
}

// links fills the sets of links that do not lead out of the node: ours, and those that pods
// are attached to; names with a "*" cannot be in a set.
func (t *table) links(g *netstate.Guard) (patterns []string, err error) {
	for _, l := range []string{"lo", g.Link, netstate.NodeLinkName} {
		t.add("ours", `"`+l+`"`)
	}
	for _, l := range g.Local {
		switch {
		case !linkName.MatchString(l):
			return nil, fmt.Errorf("local link %q: not the name of a link", l)
		case strings.HasSuffix(l, "*"):
			patterns = append(patterns, l)
		default:
			t.add("local", `"`+l+`"`)
		}
	}
	return patterns, nil
}

func suffix(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

func (t *table) add(set, element string) { t.sets[set] = append(t.sets[set], element) }

// disjoint leaves out ranges that are inside others, which nft(8) refuses.
func disjoint(list []netip.Prefix) []netip.Prefix {
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, netstate.ComparePrefixes)
	var out []netip.Prefix
	for _, c := range sorted {
		if len(out) == 0 || !out[len(out)-1].Overlaps(c) {
			out = append(out, c)
		}
	}
	return out
}

func (t *table) chain(name, hook string, rules ...string) {
	t.chains[name] = chain{hook: hook, rules: rules}
	t.order = append(t.order, name)
}

// each writes rules for both families: {ip}, {n} and {nfproto} are replaced.
func each(rules ...string) []string {
	var out []string
	for _, r := range rules {
		out = append(out, strings.NewReplacer("{ip}", "ip", "{n}", "4", "{nfproto}", "ipv4").Replace(r),
			strings.NewReplacer("{ip}", "ip6", "{n}", "6", "{nfproto}", "ipv6").Replace(r))
	}
	return out
}

// kinds adds a chain for each kind: count, remember who it was, drop. When there is no room
// to remember a rule does not match, and the next one drops nevertheless.
func (t *table) kinds(strict bool) {
	for _, k := range kinds {
		rules := append([]string{"counter name " + k},
			each("meta nfproto {nfproto} add @seen{n}_"+k+" { {ip} saddr . {ip} daddr . meta l4proto }")...)
		if strict {
			rules = append(rules, "drop")
		} else {
			rules = append(rules, "accept")
		}
		t.chain(k, "", rules...)
	}
}

func mark(value uint32) string {
	return fmt.Sprintf("meta mark set meta mark & %#x | %#x", ^uint32(netstate.MarkMask), value)
}

// ciliumHost is what Cilium's rules put into bits 8 to 11 of all that the host itself sends.
const ciliumHost = 0x00000c00

// marked is also a packet that Cilium has marked as the host's own on its way out.
func marked(value uint32) string {
	return fmt.Sprintf("meta mark & %#x == { %#x, %#x }", uint32(netstate.MarkNodeMask), value, value|ciliumHost)
}

// passing are what is between neighbours, and never more than that.
var passing = []string{
	"icmpv6 type { 133, 134, 135, 136, 137 } ip6 hoplimit 255 accept",
	"icmpv6 type { 130, 131, 132, 143 } accept",
	"udp sport { 67, 68 } udp dport { 67, 68 } accept",
	"udp sport { 546, 547 } udp dport { 546, 547 } accept",
}

// insideRules are for packets by a link that does not lead out of the node.
func insideRules(key string, patterns []string, verdict string) []string {
	return append([]string{key + " @ours " + verdict}, podRules(key, patterns, verdict)...)
}

// podRules are for packets by a link that pods are attached to.
func podRules(key string, patterns []string, verdict string) []string {
	out := []string{key + " @local " + verdict}
	for _, p := range patterns {
		out = append(out, fmt.Sprintf("%s %q %s", key, p, verdict))
	}
	return out
}

func (t *table) incoming(g *netstate.Guard, patterns []string) {
	rules := insideRules("iifname", patterns, "accept")
	rules = append(rules, fmt.Sprintf("udp dport %d fib daddr type local %s accept", g.Port, mark(netstate.MarkOuter)))
	if g.AllTraffic {
		// With a mark also for those who ask which way the answer would take.
		rules = append(rules, each(
			"{ip} saddr . meta l4proto . th sport @exempt{n} fib daddr type local "+mark(netstate.MarkExempt)+" accept",
			"{ip} saddr @nodes{n} {ip} daddr . meta l4proto . th dport @exempt{n} fib daddr type local "+mark(netstate.MarkExempt)+" accept")...)
	}
	rules = append(rules, passing...)
	rules = append(rules, each(
		"{ip} saddr @pods{n} goto in_pods",
		"{ip} saddr @sites{n} goto in_pods",
		"{ip} saddr @nodes{n} {ip} daddr @pods{n} goto in_nodes")...)
	if g.Overlay != 0 {
		rules = append(rules, fmt.Sprintf("udp dport %d fib daddr type local goto in_overlay", g.Overlay))
	}
	if g.AllTraffic {
		rules = append(rules, each("{ip} saddr @nodes{n} {ip} daddr @nodes{n} goto in_hosts")...)
	}
	t.chain("prerouting", hook("filter", "prerouting", priorityIn), rules...)
	// Nothing leads here. It makes the kernel put fragments together before they are judged.
	t.chain("defragment", "", "ct state new accept")
}

// forwarded: a pod's link carries pods' addresses and no others, of whatever family.
func (t *table) forwarded(patterns []string) {
	t.chain("from_pods", "", slices.Concat(
		insideRules("oifname", patterns, "return"),
		each("meta nfproto {nfproto} {ip} saddr != @pods{n} goto out_unknown"))...)
	t.chain("to_pods", "", slices.Concat(
		insideRules("iifname", patterns, "return"),
		each("meta nfproto {nfproto} {ip} daddr != @pods{n} goto in_unknown"))...)
	t.chain("forward", hook("filter", "forward", priorityForward),
		slices.Concat(podRules("iifname", patterns, "jump from_pods"), podRules("oifname", patterns, "jump to_pods"))...)
}

func (t *table) outgoing(g *netstate.Guard, patterns []string) {
	var rules []string
	if g.AllTraffic {
		rules = each(
			"{ip} daddr . meta l4proto . th dport @exempt{n} "+mark(netstate.MarkExempt),
			"{ip} daddr @nodes{n} {ip} saddr . meta l4proto . th sport @exempt{n} "+mark(netstate.MarkExempt))
	}
	if g.Overlay != 0 {
		// The network plugin may know a node before this node does, or by an address that it had once. What
		// pods say to the world by the same port does not come by here.
		rules = append(rules, insideRules("oifname", patterns, "return")...)
		rules = append(rules, each(fmt.Sprintf("{ip} daddr != @nodes{n} udp dport %d goto out_overlay", g.Overlay))...)
	}
	t.chain("output", hook("route", "output", priorityMark), rules...)

	rules = insideRules("oifname", patterns, "accept")
	rules = append(rules, fmt.Sprintf("%s udp sport %d accept", marked(netstate.MarkOuter), g.Port))
	if g.AllTraffic {
		rules = append(rules, marked(netstate.MarkExempt)+" accept")
	}
	rules = append(rules, passing...)
	rules = append(rules, each(
		"{ip} daddr @pods{n} goto out_pods",
		"{ip} daddr @sites{n} goto out_pods",
		"{ip} saddr @pods{n} {ip} daddr @nodes{n} goto out_nodes",
		"ct original {ip} saddr @pods{n} ct direction original {ip} daddr @nodes{n} goto out_nodes",
		"{ip} daddr @nodes{n} udp dport { 4789, 6081, 8472 } goto out_overlay",
		"{ip} daddr @nodes{n} meta l4proto { 4, 41, 47 } goto out_overlay")...)
	if g.Overlay != 0 {
		rules = append(rules, each(fmt.Sprintf("{ip} daddr @nodes{n} udp dport %d goto out_overlay", g.Overlay))...)
	}
	if g.AllTraffic {
		rules = append(rules, each("{ip} daddr @nodes{n} goto out_hosts")...)
	}
	t.chain("postrouting", hook("filter", "postrouting", priorityOut), rules...)
}

func hook(kind, name string, priority int) string {
	return fmt.Sprintf("type %s hook %s priority %d; policy accept;", kind, name, priority)
}

// digest identifies rules and elements.
func (t *table) digest() string {
	h := sha256.New()
	for _, name := range t.order {
		_, _ = fmt.Fprintf(h, "%s %s\n%s\n", name, t.chains[name].hook, strings.Join(t.chains[name].rules, "\n"))
	}
	for _, name := range slices.Sorted(maps.Keys(t.sets)) {
		_, _ = fmt.Fprintf(h, "%s %s %s\n", name, setTypes[name], strings.Join(t.sets[name], ","))
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:16])
}

// stampChain keeps the digest, as a comment; nothing leads to it.
const stampChain = "stamp"

// stampStrict begins the stamp of a guard that drops.
const stampStrict = "strict-"

// script writes everything, in a form that can be repeated: what is there stays, with its
// counts, and gets new contents.
func (t *table) script() string {
	var b strings.Builder
	fmt.Fprintf(&b, "add table inet %s\n", Table)
	for _, k := range kinds {
		fmt.Fprintf(&b, "add counter inet %s %s\n", Table, k)
		for _, f := range []struct{ n, addr string }{{"4", "ipv4_addr"}, {"6", "ipv6_addr"}} {
			fmt.Fprintf(&b, "add set inet %s seen%s_%s { type %s . %s . inet_proto; size 128; flags dynamic,timeout; timeout %s; }\n",
				Table, f.n, k, f.addr, f.addr, seenFor)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.sets)) {
		fmt.Fprintf(&b, "add set inet %s %s { %s; }\nflush set inet %s %s\n", Table, name, setTypes[name], Table, name)
		t.elements(&b, "add", name, t.sets[name])
	}
	t.writeChains(&b)
	return b.String()
}

func (t *table) elements(b *strings.Builder, verb, set string, list []string) {
	if len(list) > 0 {
		fmt.Fprintf(b, "%s element inet %s %s { %s }\n", verb, Table, set, strings.Join(list, ", "))
	}
}

func (t *table) writeChains(b *strings.Builder) {
	for _, name := range t.order {
		if h := t.chains[name].hook; h != "" {
			fmt.Fprintf(b, "add chain inet %s %s { %s }\n", Table, name, h)
		} else {
			fmt.Fprintf(b, "add chain inet %s %s\n", Table, name)
		}
		fmt.Fprintf(b, "flush chain inet %s %s\n", Table, name)
	}
	for _, name := range t.order {
		for _, r := range t.chains[name].rules {
			fmt.Fprintf(b, "add rule inet %s %s %s\n", Table, name, r)
		}
	}
	t.writeStamp(b)
}

func (t *table) writeStamp(b *strings.Builder) {
	fmt.Fprintf(b, "add chain inet %s %s\nflush chain inet %s %s\nadd rule inet %s %s counter comment \"%s\"\n",
		Table, stampChain, Table, stampChain, Table, stampChain, t.stamp)
}

// change writes what differs from a table that is in the kernel.
func (t *table) change(have *table) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(t.sets)) {
		t.elements(&b, "delete", name, without(have.sets[name], t.sets[name]))
		t.elements(&b, "add", name, without(t.sets[name], have.sets[name]))
	}
	same := maps.EqualFunc(t.chains, have.chains, func(a, b chain) bool { return a.hook == b.hook && slices.Equal(a.rules, b.rules) })
	if same {
		t.writeStamp(&b)
	} else {
		t.writeChains(&b)
	}
	return b.String()
}

// without is what of one list is not in another.
func without(list, other []string) []string {
	not := make(map[string]bool, len(other))
	for _, x := range other {
		not[x] = true
	}
	var out []string
	for _, x := range list {
		if !not[x] {
			out = append(out, x)
		}
	}
	return out
}
