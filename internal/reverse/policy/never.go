package policy

import (
	"encoding/binary"
	"net/netip"
)

// never are the ranges that nobody dials through the tunnel, with what to call them. What
// is in them is local to the spoke, its node or its cloud account.
var never = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"}, // metadata of most clouds
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved"}, // with the broadcast address
	{netip.MustParsePrefix("fd00:ec2::254/128"), "a metadata address (AWS)"},
	{netip.MustParsePrefix("fd00:ec2::23/128"), "a credentials address (AWS EKS)"},
	{netip.MustParsePrefix("fd20:ce::254/128"), "a metadata address (Google Cloud)"},
	{netip.MustParsePrefix("fd00:42::42/128"), "a metadata address (Scaleway)"},
	{netip.MustParsePrefix("100.100.100.200/32"), "a metadata address (Alibaba Cloud)"},
	{netip.MustParsePrefix("168.63.129.16/32"), "a metadata address (Azure)"},
	{netip.MustParsePrefix("192.0.0.192/32"), "a metadata address (Oracle Cloud)"},
}

// Forbidden says why an address is never dialled, whatever the rules say: "loopback",
// "link-local", …; empty: it may be. IPv4 addresses inside IPv6 ones are looked at too:
// mapped and compatible (RFC 4291), NAT64 (RFC 6052, 8215), 6to4 (RFC 3056), Teredo (RFC
// 4380) and ISATAP (RFC 5214).
func Forbidden(a netip.Addr) string {
	if !a.IsValid() {
		return "no address"
	}
	if a.Zone() != "" {
		return "bound to a link"
	}
	a = a.Unmap()
	if what := forbidden(a); what != "" {
		return what
	}
	if !a.Is6() {
		return ""
	}
	for _, inner := range embedded(a) {
		if what := forbidden(inner); what != "" {
			return what + " (" + inner.String() + " inside)"
		}
	}
	return ""
}

func forbidden(a netip.Addr) string {
	for _, n := range never {
		if n.prefix.Contains(a) {
			return n.what
		}
	}
	return ""
}

var (
	compatible = netip.MustParsePrefix("::/96")
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
	nat64Local = netip.MustParsePrefix("64:ff9b:1::/48")
	sixToFour  = netip.MustParsePrefix("2002::/16")
	teredo     = netip.MustParsePrefix("2001::/32")
	translated = netip.MustParsePrefix("::ffff:0:0:0/96") // RFC 2765
)

// embedded lists the IPv4 addresses that an IPv6 address may stand for.
func embedded(a netip.Addr) []netip.Addr {
	b := a.As16()
	v4 := func(i ...int) netip.Addr { return netip.AddrFrom4([4]byte{b[i[0]], b[i[1]], b[i[2]], b[i[3]]}) }
	last := v4(12, 13, 14, 15)
	var list []netip.Addr
	switch {
	case compatible.Contains(a), nat64.Contains(a), translated.Contains(a):
		list = append(list, last)
	case nat64Local.Contains(a):
		// RFC 6052, section 2.2, for prefixes of 48, 56, 64 and 96 bits; byte 8 is zero.
		// Which one is in use is not known: all but those that cannot be meant.
		for _, x := range []netip.Addr{v4(6, 7, 9, 10), v4(7, 9, 10, 11), v4(9, 10, 11, 12), last} {
			if x.As4()[0] != 0 {
				list = append(list, x)
			}
		}
	case sixToFour.Contains(a):
		list = append(list, v4(2, 3, 4, 5))
	case teredo.Contains(a):
		client := binary.BigEndian.Uint32(b[12:]) ^ 0xffffffff
		list = append(list, v4(4, 5, 6, 7), netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, client))))
	}
	// ISATAP: any prefix, then 0000:5efe or 0200:5efe.
	if b[8]&^2 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe {
		list = append(list, last)
	}
	return list
}
