package nft

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
)

// The two parts of the table: chains and sets whose names begin with the part's.
const (
	partFirewall = "fw"
	partServices = "svc"
)

// setDecl declares a set or, with a value type, a map.
type setDecl struct {
	name  string
	types string // of the key, as nft(8) writes it
	value string // of a map; empty: a set
	flags string
}

// frame is every set of the table. Large ones are hashes (no "interval"), or intervals in a
// concatenation: nft(8) lists all elements of other intervals before it changes any set.
var frame = func() []setDecl {
	var out []setDecl
	for _, f := range []struct{ n, addr string }{{"4", "ipv4_addr"}, {"6", "ipv6_addr"}} {
		proto := f.addr + " . nf_proto"
		service := f.addr + " . inet_proto . inet_service"
		out = append(out,
			setDecl{"fw_hosts" + f.n, "ifname . " + f.addr, "verdict", ""},
			setDecl{"fw_nets" + f.n, "ifname . " + f.addr, "verdict", "interval"},
			setDecl{"fw_tunnel_hosts" + f.n, f.addr, "", ""},
			setDecl{"fw_tunnel_nets" + f.n, proto, "", "interval"},
			setDecl{"fw_out_hosts" + f.n, f.addr + " . ifname", "", ""},
			setDecl{"fw_out_nets" + f.n, f.addr + " . ifname", "", "interval"},
			setDecl{"fw_site_hosts" + f.n, f.addr, "", ""},
			setDecl{"fw_site_nets" + f.n, proto, "", "interval"},
			setDecl{"fw_pods" + f.n, f.addr, "", "interval"},
			setDecl{"fw_services" + f.n, f.addr, "", "interval"},
			setDecl{"fw_nodes" + f.n, f.addr, "", "interval"},
			setDecl{"fw_outer" + f.n, f.addr, "", ""},
			setDecl{"fw_inner_hosts" + f.n, f.addr, "", ""},
			setDecl{"fw_inner_nets" + f.n, f.addr, "", "interval"},
			setDecl{"fw_keep" + f.n, f.addr, "", "interval"},
			setDecl{"svc_hosts" + f.n, f.addr, "", ""},
			setDecl{"svc_nets" + f.n, f.addr, "", "interval"},
			setDecl{"svc_pods" + f.n, f.addr, "", "interval"},
			setDecl{"svc_relay" + f.n, service, "", ""},
			setDecl{"svc_picks" + f.n, service, "verdict", ""},
			setDecl{"svc_slots" + f.n, service + " . mark", "mark", ""},
			setDecl{"svc_eps" + f.n, "mark", f.addr + " . inet_service", ""},
		)
	}
	return append(out,
		setDecl{"svc_aff4", "ipv4_addr . ipv4_addr . inet_proto . inet_service", "mark", "dynamic,timeout; size 131072"},
		setDecl{"fw_links", "ifname", "", ""},
		setDecl{"fw_clamps", "ifname", "verdict", ""},
		setDecl{"svc_sources", "ifname", "", ""})
}()

func (d setDecl) kind() string {
	if d.value == "" {
		return "set"
	}
	return "map"
}

// String is the declaration as nft(8) reads it.
func (d setDecl) String() string {
	s := fmt.Sprintf("add %s inet %s %s { type %s", d.kind(), Table, d.name, d.types)
	if d.value != "" {
		s += " : " + d.value
	}
	if d.flags != "" {
		s += "; flags " + d.flags
	}
	return s + "; }"
}

// counters name why packets were dropped or rejected.
var counters = []string{"spoofed", "denied", "leak", "invalid", "rejected"}

// affinity6 declares the affinities of one IPv6 service port. They are in a map per port
// because nft 1.0.6 cannot compile an update of a map whose key is longer than 16 bytes
// (it takes the registers of the key's tail for the value). The kernel makes room for the
// whole size at once, 16 bytes per element.
func affinity6(name string) setDecl {
	return setDecl{name, "ipv6_addr", "mark", "dynamic,timeout; size 16384"}
}

// chain is the text of a chain; hook is empty for one that others jump to.
type chain struct {
	hook  string
	rules []string
	// affinity6 names the map that comes and goes with the chain; usually empty.
	affinity6 string
}

// part is one half of the table as it should be. Elements of maps have a value; those
// of sets have "".
type part struct {
	name   string
	chains map[string]chain
	sets   map[string]map[string]string
	hosts  []host // the sets byHosts, sorted
	sum    digest // of hosts
	rest   digest // of all but hosts; zero: not known yet

	firewall *rendered // what a part of the firewall was made from
}

func newPart(name string) *part {
	p := &part{name: name, chains: map[string]chain{}, sets: map[string]map[string]string{}}
	for _, d := range frame {
		if strings.HasPrefix(d.name, name+"_") && !byPorts(d.name) && !byHosts(d.name) {
			p.sets[d.name] = map[string]string{}
		}
	}
	return p
}

// byPorts reports whether a set's elements are kept by ports (or, affinities, by the
// kernel) rather than by a part.
func byPorts(set string) bool {
	for _, p := range []string{"svc_picks", "svc_slots", "svc_eps", "svc_aff"} {
		if strings.HasPrefix(set, p) {
			return true
		}
	}
	return false
}

// byHosts reports whether a set's elements are kept as hosts.
func byHosts(set string) bool {
	return strings.HasPrefix(set, "fw_hosts") || strings.HasPrefix(set, "fw_out_hosts") || strings.HasPrefix(set, "fw_tunnel_hosts")
}

// slowToFlush reports whether the kernel takes a second and more to replace thousands of
// elements of a set, about a hundred times as long as to add them: intervals in
// concatenations.
func slowToFlush(d setDecl) bool {
	return strings.HasPrefix(d.name, partFirewall+"_") && d.flags == "interval" && strings.Contains(d.types, " . ")
}

// base adds a base chain.
func (p *part) base(name, kind, hook string, priority int, rules ...string) {
	p.chains[p.name+"_"+name] = chain{hook: baseHook(kind, hook, priority), rules: rules}
}

func baseHook(kind, hook string, priority int) string {
	return fmt.Sprintf("type %s hook %s priority %d; policy accept;", kind, hook, priority)
}

// chain adds a chain that others jump to.
func (p *part) chain(name string, rules ...string) {
	p.chains[p.name+"_"+name] = chain{rules: rules}
}

// closedPart is a part that nobody has set yet: no tunnels, no services.
func closedPart(name string) *part {
	p := newPart(name)
	if name == partFirewall {
		firewallChains(p, false)
	} else {
		servicesChains(p, "")
	}
	return p
}

// stamp identifies the part's value and the frame. The part must not change afterwards.
func (p *part) stamp() string {
	if p.rest == (digest{}) {
		p.rest = p.digest()
	}
	all := p.rest
	all.add(p.sum)
	return all.String()
}

// digest is the hash of all but the hosts.
func (p *part) digest() digest {
	h := sha256.New()
	w := bufio.NewWriter(h)
	for _, d := range frame {
		_, _ = fmt.Fprintln(w, d)
	}
	for _, name := range slices.Sorted(maps.Keys(p.chains)) {
		c := p.chains[name]
		_, _ = fmt.Fprintf(w, "%s %s\n%s\n", name, c.hook, strings.Join(c.rules, "\n"))
	}
	for _, name := range slices.Sorted(maps.Keys(p.sets)) {
		_, _ = fmt.Fprintln(w, name)
		for _, k := range slices.Sorted(maps.Keys(p.sets[name])) {
			_, _ = w.WriteString(k + ":" + p.sets[name][k] + "\n")
		}
	}
	_ = w.Flush() // a hash takes everything
	return digestOf(h.Sum(nil))
}

// contents is what the kernel's table holds, as far as parts describe it.
type contents struct {
	chains map[string]chain // by name; of a part that is not known, without rules
	stamps map[string]string
	parts  map[string]*part // by name; one that is missing is not known
	// ranges are the elements of the sets slowToFlush, as far as they were read; otherwise
	// they are in parts.
	ranges map[string]map[string]string
}

func newContents() *contents {
	return &contents{map[string]chain{}, map[string]string{}, map[string]*part{}, nil}
}

// set records that p is in effect.
func (c *contents) set(p *part) {
	for name := range c.chains {
		if strings.HasPrefix(name, p.name+"_") {
			delete(c.chains, name)
		}
	}
	maps.Copy(c.chains, p.chains)
	if p.name == partFirewall {
		c.ranges = nil
	}
	c.parts[p.name] = p
	c.stamps[p.name] = p.stamp()
}

// script collects one transaction. Its sections are in the order that the kernel needs:
// what is referred to comes first and goes last.
type script struct {
	have    *contents
	changes int

	declare, chains, rules, remove, insert, drop strings.Builder
}

func newScript(have *contents) *script { return &script{have: have} }

// String is the transaction as nft -f reads it; "" when nothing changes.
func (s *script) String() string {
	return s.declare.String() + s.chains.String() + s.rules.String() + s.remove.String() + s.insert.String() + s.drop.String()
}

// frame declares everything anew.
func (s *script) frame() {
	fmt.Fprintf(&s.declare, "add table inet %s\ndelete table inet %s\nadd table inet %s\n", Table, Table, Table)
	for _, d := range frame {
		fmt.Fprintln(&s.declare, d)
	}
	for _, c := range counters {
		fmt.Fprintf(&s.declare, "add counter inet %s %s\n", Table, c)
	}
}

// part adds what leads to p. A part that is not known is either equal, by its stamp, or
// written anew.
func (s *script) part(p *part) {
	have := s.have.parts[p.name]
	if s.have.stamps[p.name] == p.stamp() {
		return
	}
	if have == nil {
		have = &part{sets: s.have.ranges}
		s.empty(p)
	}
	s.rewrite(p)
	if have.rest != p.rest {
		for _, name := range slices.Sorted(maps.Keys(p.sets)) {
			s.set(name, have.sets[name], p.sets[name])
		}
	}
	s.hosts(have.hosts, p.hosts)
}

// empty takes all elements out of the part's sets whose elements are not known, if there
// is a table.
func (s *script) empty(p *part) {
	if len(s.have.chains) == 0 {
		return
	}
	for _, d := range frame {
		if _, known := s.have.ranges[d.name]; strings.HasPrefix(d.name, p.name+"_") && !byPorts(d.name) && !known {
			fmt.Fprintf(&s.remove, "flush %s inet %s %s\n", d.kind(), Table, d.name)
		}
	}
}

// rewrite changes the chains of a part, and its stamp.
func (s *script) rewrite(p *part) {
	for _, name := range slices.Sorted(maps.Keys(p.chains)) {
		want := p.chains[name]
		have, there := s.have.chains[name]
		if there && have.hook == want.hook && slices.Equal(have.rules, want.rules) {
			continue
		}
		s.changes++
		s.chain(name, want, have, there)
	}
	for _, name := range slices.Sorted(maps.Keys(s.have.chains)) {
		if _, keep := p.chains[name]; !keep && strings.HasPrefix(name, p.name+"_") && name != stampChain(p.name) {
			s.changes++
			fmt.Fprintf(&s.rules, "flush chain inet %s %s\n", Table, name)
			fmt.Fprintf(&s.drop, "delete chain inet %s %s\n", Table, name)
			if m := s.have.chains[name].affinity6; m != "" {
				fmt.Fprintf(&s.drop, "delete map inet %s %s\n", Table, m)
			}
		}
	}
	name := stampChain(p.name)
	fmt.Fprintf(&s.chains, "add chain inet %s %s\n", Table, name)
	fmt.Fprintf(&s.rules, "flush chain inet %s %s\nadd rule inet %s %s counter comment \"%s\"\n", Table, name, Table, name, p.stamp())
}

func (s *script) chain(name string, c, have chain, there bool) {
	switch {
	case there && have.hook != c.hook: // another version's; base chains are referred to by nothing
		fmt.Fprintf(&s.chains, "flush chain inet %s %s\ndelete chain inet %s %s\nadd chain inet %s %s { %s }\n", Table, name, Table, name, Table, name, c.hook)
	case there:
		fmt.Fprintf(&s.rules, "flush chain inet %s %s\n", Table, name)
	case c.hook == "":
		fmt.Fprintf(&s.chains, "add chain inet %s %s\n", Table, name)
	default:
		fmt.Fprintf(&s.chains, "add chain inet %s %s { %s }\n", Table, name, c.hook)
	}
	if c.affinity6 != "" {
		fmt.Fprintln(&s.declare, affinity6(c.affinity6))
	}
	for _, r := range c.rules {
		fmt.Fprintf(&s.rules, "add rule inet %s %s %s\n", Table, name, r)
	}
}

// stampChain keeps the part's hash, as a comment; nothing leads to it.
func stampChain(part string) string { return part + "_stamp" }

func (s *script) set(name string, have, want map[string]string) {
	var gone, come []string
	for k, v := range have {
		if w, ok := want[k]; !ok || w != v {
			gone = append(gone, k)
		}
	}
	for k, v := range want {
		if h, ok := have[k]; !ok || h != v {
			come = append(come, element(k, v))
		}
	}
	slices.Sort(gone)
	slices.Sort(come)
	s.elements(name, gone, come)
}

func element(key, value string) string {
	if value == "" {
		return key
	}
	return key + " : " + value
}

// elements removes keys from a set and inserts elements.
func (s *script) elements(set string, gone, come []string) {
	if len(gone) > 0 {
		fmt.Fprintf(&s.remove, "delete element inet %s %s { %s }\n", Table, set, strings.Join(gone, ", "))
	}
	if len(come) > 0 {
		fmt.Fprintf(&s.insert, "add element inet %s %s { %s }\n", Table, set, strings.Join(come, ", "))
	}
	s.changes += max(len(gone), len(come))
}

// run gives a transaction to nft(8): all of it happens, or nothing.
func (n *NFT) run(ctx context.Context, script string) error {
	cmd := exec.CommandContext(ctx, n.program, "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("nft -f: %w: %s", err, firstLine(stderr.String()))
	}
	return nil
}

// firstLine keeps an error in one line: nft(8) repeats the offending input after it.
func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line[:min(len(line), 300)]
}
