package netstate

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// String is the key in base64, as wg(8) prints it; "(none)" when it is not set.
func (k Key) String() string {
	if k.IsZero() {
		return "(none)"
	}
	return base64.StdEncoding.EncodeToString(k[:])
}

// IsZero reports whether the key is not set.
func (k Key) IsZero() bool { return k == Key{} }

// ParseKey reads a key in base64, as wg(8) prints it.
func ParseKey(s string) (Key, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != 32 || len(s) != base64.StdEncoding.EncodedLen(32) { // the decoder skips newlines
		return Key{}, fmt.Errorf("not a WireGuard key (32 bytes in base64, 44 characters ending in '=')")
	}
	return Key(b), nil
}

// String names the protocol as nft(8) does.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("proto-%d", uint8(p))
}

var accessNames = []struct {
	bit  Access
	name string
}{{AccessPods, "pods"}, {AccessServices, "services"}, {AccessNodes, "nodes"}, {AccessSites, "sites"}}

// String lists the set: "pods,services", or "nothing".
func (a Access) String() string {
	var names []string
	for _, n := range accessNames {
		if a&n.bit != 0 {
			names = append(names, n.name)
		}
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ",")
}

// ComparePrefixes orders IPv4 before IPv6, then by address, then by length.
func ComparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// Sort puts every list whose order has no meaning into its canonical order.
func (s *State) Sort() {
	slices.SortFunc(s.Sysctls, func(a, b Sysctl) int { return cmp.Compare(a.Path, b.Path) })
	slices.SortFunc(s.Links, func(a, b Link) int { return cmp.Compare(a.Name, b.Name) })
	for i := range s.Links {
		slices.SortFunc(s.Links[i].Addresses, ComparePrefixes)
		s.Links[i].VXLAN.sort()
	}
	slices.SortFunc(s.WireGuard, func(a, b WireGuard) int { return cmp.Compare(a.Link, b.Link) })
	for i := range s.WireGuard {
		peers := s.WireGuard[i].Peers
		slices.SortFunc(peers, func(a, b WireGuardPeer) int {
			if c := cmp.Compare(a.Name, b.Name); c != 0 {
				return c
			}
			return slices.Compare(a.PublicKey[:], b.PublicKey[:])
		})
		for j := range peers {
			slices.SortFunc(peers[j].AllowedIPs, ComparePrefixes)
		}
	}
	if s.IPsec != nil {
		slices.SortFunc(s.IPsec.Connections, func(a, b IPsecConnection) int { return cmp.Compare(a.Name, b.Name) })
	}
	slices.SortFunc(s.Rules, func(a, b Rule) int {
		return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Mark, b.Mark), cmp.Compare(a.UDPPort, b.UDPPort))
	})
	slices.SortFunc(s.Routes, func(a, b Route) int {
		return cmp.Or(cmp.Compare(a.Table, b.Table), ComparePrefixes(a.Destination, b.Destination),
			cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Link, b.Link))
	})
	f := &s.Firewall
	slices.SortFunc(f.Tunnels, func(a, b Tunnel) int { return cmp.Compare(a.Name, b.Name) })
	for i := range f.Tunnels {
		slices.SortFunc(f.Tunnels[i].Prefixes, ComparePrefixes)
	}
	slices.SortFunc(f.Pools, func(a, b Pool) int { return cmp.Compare(a.Link, b.Link) })
	for i := range f.Pools {
		slices.SortFunc(f.Pools[i].Prefixes, ComparePrefixes)
	}
	slices.SortFunc(f.Clamps, func(a, b Clamp) int { return cmp.Compare(a.Link, b.Link) })
	slices.SortFunc(f.Pins, func(a, b Pin) int { return cmp.Compare(a.Link, b.Link) })
	f.NodeLink.sort()
	s.Guard.sort()
	for _, l := range [][]netip.Prefix{f.Pods, f.Services, f.Nodes, f.Unmasqueraded, s.Services.Ranges, s.Services.Pods} {
		slices.SortFunc(l, ComparePrefixes)
	}
	slices.Sort(s.Services.Sources)
	slices.SortFunc(s.Services.Ports, CompareServicePorts)
	for i := range s.Services.Ports {
		slices.SortFunc(s.Services.Ports[i].Endpoints, netip.AddrPort.Compare)
	}
}

// CompareServicePorts orders by address, protocol and port.
func CompareServicePorts(a, b ServicePort) int {
	return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
}

// Lines prints the state, one line per element, in the order of s; each line names its
// element completely, so that a set difference of lines is a difference of states. Keys
// are left out or "[redacted]": a change of a private key shows in the public one, a
// change of a pre-shared key does not show.
func (s State) Lines() []string {
	var out []string
	add := func(format string, args ...any) {
		out = append(out, strings.TrimRight(fmt.Sprintf(format, args...), " "))
	}

	for _, x := range s.Sysctls {
		add("sysctl %s=%s", x.Path, x.Value)
	}
	for _, l := range s.Links {
		id := ""
		if l.InterfaceID != 0 {
			id = fmt.Sprintf(" if_id %#x", l.InterfaceID)
		}
		add("link %s type %s%s%s mtu %d%s", l.Name, l.Kind, id, l.VXLAN.text(), l.MTU, list(" address ", l.Addresses))
		out = append(out, l.VXLAN.lines(l.Name)...)
	}
	for _, w := range s.WireGuard {
		add("wireguard %s public-key %s listen-port %d fwmark %#x", w.Link, w.PublicKey, w.ListenPort, w.FirewallMark)
		for _, p := range w.Peers {
			add("%s", p.line(w.Link))
		}
	}
	if s.IPsec != nil {
		add("ipsec datapath %s", s.IPsec.Datapath)
		for _, c := range s.IPsec.Connections {
			add("%s", c.line())
		}
	}
	for _, r := range s.Rules {
		mark := ""
		if r.Mark != 0 {
			mark = fmt.Sprintf(" fwmark %#x/%#x", r.Mark, r.MarkMask)
		}
		if r.Forwarded {
			mark += " forwarded"
		}
		if r.UDPPort != 0 {
			mark += fmt.Sprintf(" udp %d", r.UDPPort)
		}
		add("rule ipv%d priority %d%s lookup %d", r.Family, r.Priority, mark, r.Table)
	}
	for _, r := range s.Routes {
		add("%s", r.line())
	}
	out = append(out, s.Firewall.lines()...)
	out = append(out, s.Services.lines()...)
	return append(out, s.Guard.lines()...)
}

func (p WireGuardPeer) line(link string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "wireguard %s peer %q public-key %s", link, p.Name, p.PublicKey)
	if !p.PresharedKey.IsZero() {
		fmt.Fprintf(&b, " preshared-key %s", p.PresharedKey)
	}
	if p.Endpoint.IsValid() {
		fmt.Fprintf(&b, " endpoint %s", p.Endpoint)
	}
	if p.Initiate {
		b.WriteString(" initiate")
	}
	if p.PersistentKeepaliveSeconds != 0 {
		fmt.Fprintf(&b, " keepalive %ds", p.PersistentKeepaliveSeconds)
	}
	b.WriteString(list(" allowed-ips ", p.AllowedIPs))
	return b.String()
}

func (c IPsecConnection) line() string {
	var b strings.Builder
	fmt.Fprintf(&b, "ipsec connection %s", c.Name)
	opt := func(name string, value any, on bool) {
		if on {
			fmt.Fprintf(&b, " %s %v", name, value)
		}
	}
	opt("local", strings.Join(c.LocalAddresses, ","), len(c.LocalAddresses) > 0)
	opt("remote", strings.Join(c.RemoteAddresses, ","), len(c.RemoteAddresses) > 0)
	opt("local-id", fmt.Sprintf("%q", c.LocalID), c.LocalID != "")
	opt("remote-id", fmt.Sprintf("%q", c.RemoteID), c.RemoteID != "")
	opt("auth", "psk", !c.Auth.PresharedKey.IsZero())
	opt("auth", "certificate", len(c.Auth.Certificate) > 0)
	opt("ike", strings.Join(c.IKEProposals, ","), true)
	opt("esp", strings.Join(c.ESPProposals, ","), true)
	opt("initiate", c.Initiate, true)
	opt("rekey", fmt.Sprintf("%s/%s", c.IKELifetime, c.ChildLifetime), true)
	opt("dpd", c.DPDDelay, c.DPDDelay != 0)
	opt("if_id", fmt.Sprintf("%#x", c.InterfaceID), c.InterfaceID != 0)
	opt("child-per-pair", "yes", c.ChildPerPair)
	b.WriteString(list(" local-ts ", c.LocalSelectors))
	b.WriteString(list(" remote-ts ", c.RemoteSelectors))
	fmt.Fprintf(&b, " link %s", c.Link)
	return b.String()
}

func (r Route) line() string {
	var b strings.Builder
	fmt.Fprintf(&b, "route %s %s", r.Kind, r.Destination)
	if r.Via.IsValid() {
		fmt.Fprintf(&b, " via %s", r.Via)
	}
	if r.Link != "" {
		fmt.Fprintf(&b, " dev %s", r.Link)
	}
	if r.OnLink {
		b.WriteString(" onlink")
	}
	if r.Source.IsValid() {
		fmt.Fprintf(&b, " src %s", r.Source)
	}
	fmt.Fprintf(&b, " metric %d table %d", r.Metric, r.Table)
	return b.String()
}

func (f Firewall) lines() []string {
	var out []string
	for _, r := range []struct {
		name string
		list []netip.Prefix
	}{{"pods", f.Pods}, {"services", f.Services}, {"nodes", f.Nodes}} {
		if len(r.list) > 0 {
			out = append(out, fmt.Sprintf("firewall %s%s", r.name, list(" ", r.list)))
		}
	}
	if f.Masquerade {
		out = append(out, "firewall masquerade tunnel sources")
	}
	if len(f.Unmasqueraded) > 0 {
		out = append(out, "firewall unmasqueraded"+list(" ", f.Unmasqueraded))
	}
	out = append(out, f.NodeLink.lines()...)
	for _, c := range f.Clamps {
		out = append(out, fmt.Sprintf("firewall clamp %s mss %d/%d", c.Link, c.MSS4, c.MSS6))
	}
	for _, p := range f.Pins {
		out = append(out, fmt.Sprintf("firewall pin %s mark %#x", p.Link, p.Mark))
	}
	for _, p := range f.Pools {
		out = append(out, fmt.Sprintf("firewall pool %s%s", p.Link, list(" ", p.Prefixes)))
	}
	for _, t := range f.Tunnels {
		out = append(out, fmt.Sprintf("firewall tunnel %q link %s from%s to %s", t.Name, t.Link, list(" ", t.Prefixes), t.Access))
	}
	return out
}

func (s Services) lines() []string {
	if s.Mode == "" {
		return nil
	}
	out := []string{fmt.Sprintf("services %s%s%s from %s", s.Mode, list(" ranges ", s.Ranges), list(" pods ", s.Pods), strings.Join(s.Sources, ","))}
	for _, p := range s.Ports {
		affinity := ""
		if p.AffinitySeconds != 0 {
			affinity = fmt.Sprintf(" affinity %ds", p.AffinitySeconds)
		}
		out = append(out, fmt.Sprintf("service %q %s %s%s ->%s", p.Name, p.Protocol, netip.AddrPortFrom(p.Address, p.Port), affinity, list(" ", p.Endpoints)))
	}
	return out
}

// list prints prefix and the elements joined by commas, or nothing for no elements.
func list[T fmt.Stringer](prefix string, items []T) string {
	if len(items) == 0 {
		return ""
	}
	s := make([]string, len(items))
	for i, x := range items {
		s[i] = x.String()
	}
	return prefix + strings.Join(s, ",")
}

// String prints the state as text that ends in a newline, or "" for nothing.
func (s State) String() string {
	lines := s.Lines()
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}

// Diff lists what leads from one state to the other: "- line" for what goes, "+ line"
// for what comes, in the order of the lines. Equal states give nil.
func Diff(from, to State) []string { return DiffLines(from.Lines(), to.Lines()) }

// DiffLines is Diff on printed states.
func DiffLines(from, to []string) []string {
	have, want := map[string]int{}, map[string]int{}
	for _, l := range from {
		have[l]++
	}
	for _, l := range to {
		want[l]++
	}
	var out []string
	for _, l := range from {
		if want[l] > 0 {
			want[l]--
			continue
		}
		out = append(out, "- "+l)
	}
	for _, l := range to {
		if have[l] > 0 {
			have[l]--
			continue
		}
		out = append(out, "+ "+l)
	}
	return out
}
