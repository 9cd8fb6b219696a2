package model

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/culvert-vpn/culvert/internal/ipam"
)

// reserved are the ranges that can never be on the far side of a tunnel. The CEL rule of
// v1alpha1.RoutedCIDR has the same list.
var reserved = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "0.0.0.0/8, \"this network\" (RFC 1122)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "127.0.0.0/8, loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "169.254.0.0/16, link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "224.0.0.0/4, multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "255.255.255.255, broadcast"},
	{netip.MustParsePrefix("::/128"), "::, the unspecified address"},
	{netip.MustParsePrefix("::1/128"), "::1, loopback"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "::ffff:0:0/96, IPv4 addresses written as IPv6"},
	{netip.MustParsePrefix("fe80::/10"), "fe80::/10, link-local"},
	{netip.MustParsePrefix("ff00::/8"), "ff00::/8, multicast"},
}

// RefuseRange says why a range must not be routed into a tunnel whatever the gateway, or
// "" when it may: it is the one list of what is reserved. The text goes on after the range:
// "overlaps 127.0.0.0/8, loopback".
func RefuseRange(p netip.Prefix) string {
	if p.Bits() <= 1 {
		return "is all addresses, or half of them"
	}
	for _, r := range reserved {
		if r.prefix.Overlaps(p) {
			return "overlaps " + r.what
		}
	}
	return ""
}

// RefuseRange says which of the gateway's own ranges a range overlaps, or "" when it
// overlaps none. The text names the range and the field's purpose.
func (g *Gateway) RefuseRange(p netip.Prefix) string {
	for _, l := range []struct {
		list []netip.Prefix
		what string
	}{
		{g.Pods, "pods"}, {g.ServiceRanges, "services"}, {g.Nodes, "nodes"}, {g.DeviceRanges, "devices"},
	} {
		for _, own := range l.list {
			if own.Overlaps(p) {
				return own.String() + ", the range of the " + l.what + " of VPNGateway " + g.ID.String()
			}
		}
	}
	return ""
}

// parsePrefix reads a range strictly; problem completes "field: ".
func parsePrefix(s string) (p netip.Prefix, problem string) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			return netip.Prefix{}, quote(s) + " has no prefix length: write " + netip.PrefixFrom(a, a.BitLen()).String() + " for this one address"
		}
		return netip.Prefix{}, quote(s) + " is not a range in CIDR notation: write one such as 10.1.0.0/16 or fd00:12::/48"
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, quote(s) + " is an IPv4 range written as IPv6: write it as IPv4"
	}
	if p != p.Masked() {
		return netip.Prefix{}, quote(s) + " has bits set after the prefix length: write " + p.Masked().String() + " for the range, or " +
			netip.PrefixFrom(p.Addr(), p.Addr().BitLen()).String() + " for the one address"
	}
	return p, ""
}

// parseAddr reads an address strictly; problem completes "field: ".
func parseAddr(s string) (a netip.Addr, problem string) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return netip.Addr{}, quote(s) + " is not an IP address: write one such as 10.1.2.3 or fd00:12::1"
	case a.Zone() != "":
		return netip.Addr{}, quote(s) + " has a zone: leave out what follows '%'"
	case a.Is4In6():
		return netip.Addr{}, quote(s) + " is an IPv4 address written as IPv6: write " + a.Unmap().String()
	}
	return a, ""
}

// usableHost says why an address cannot be where a peer is, or "".
func unusableHost(a netip.Addr) string {
	switch {
	case a.IsUnspecified():
		return "means any address"
	case a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "is a group of hosts"
	}
	return ""
}

// rangeSet is a set of ranges that do not overlap, each with an owner.
type rangeSet struct {
	entries []rangeEntry
	order   []int32 // of entries, by first address
}

type rangeEntry struct {
	prefix netip.Prefix
	owner  string
}

// search is the place of the first entry whose first address is not before a.
func (s *rangeSet) search(a netip.Addr) int {
	i, _ := slices.BinarySearchFunc(s.order, a, func(e int32, a netip.Addr) int {
		return s.entries[e].prefix.Addr().Compare(a)
	})
	return i
}

// overlap finds an entry that shares addresses with p; nil when there is none.
func (s *rangeSet) overlap(p netip.Prefix) *rangeEntry {
	i := s.search(p.Addr())
	// Entries are disjoint: only the neighbours of p's first address can touch p.
	for _, j := range []int{i - 1, i} {
		if j >= 0 && j < len(s.order) {
			if e := &s.entries[s.order[j]]; e.prefix.Overlaps(p) {
				return e
			}
		}
	}
	return nil
}

// add adds a range that overlaps no other.
func (s *rangeSet) add(p netip.Prefix, owner string) {
	s.entries = append(s.entries, rangeEntry{p, owner})
	s.order = slices.Insert(s.order, s.search(p.Addr()), int32(len(s.entries)-1))
}

// relation says how range a lies to range b: "equals", "lies in", "contains".
func relation(a, b netip.Prefix) string {
	switch {
	case a == b:
		return "equals"
	case a.Bits() > b.Bits():
		return "lies in"
	}
	return "contains"
}

// contained reports whether p lies in one of the ranges.
func contained(p netip.Prefix, in []netip.Prefix) bool {
	return slices.ContainsFunc(in, func(r netip.Prefix) bool { return r.Bits() <= p.Bits() && r.Contains(p.Addr()) })
}

func joinPrefixes(list []netip.Prefix) string {
	s := make([]string, len(list))
	for i, p := range list {
		s[i] = p.String()
	}
	return strings.Join(s, ", ")
}

// reservedIn says why an address is not handed out to devices, or "".
func reservedIn(ranges []netip.Prefix, a netip.Addr) string {
	for _, r := range ranges {
		if why := ipam.Reserved(r, a); why != "" {
			return why + " of " + r.String()
		}
	}
	return ""
}
