package nft

import (
	"cmp"
	"crypto/sha256"
	"net/netip"
	"slices"
	"strconv"
)

// host is a single address of a tunnel. There may be ten thousands of them, so they are
// compared as values and turned into text only where they differ.
type host struct {
	link  string // quoted
	addr  netip.Addr
	chain string // verdict of packets from it
	bare  bool   // no range of the link covers it: also in fw_out_hosts and fw_tunnel_hosts
	owner string
}

func compareHosts(a, b host) int {
	return cmp.Or(cmp.Compare(a.link, b.link), a.addr.Compare(b.addr))
}

// digest is the hash of what the table holds for the host.
func (h host) digest() digest {
	b := make([]byte, 0, 128)
	b = append(append(append(append(b, h.link...), 0), h.chain...), 0)
	b, _ = h.addr.AppendBinary(b) // never fails
	sum := sha256.Sum256(strconv.AppendBool(b, h.bare))
	return digestOf(sum[:])
}

// hostOps collects element operations.
type hostOps struct{ gone, come map[string][]string }

func (o hostOps) source(m map[string][]string, h host, withValue bool) {
	e := h.link + " . " + h.addr.String()
	if withValue {
		e = element(e, h.chain)
	}
	set := "fw_hosts" + familyOf(h.addr)
	m[set] = append(m[set], e)
}

func (o hostOps) leaving(m map[string][]string, h host) {
	n := familyOf(h.addr)
	m["fw_out_hosts"+n] = append(m["fw_out_hosts"+n], h.addr.String()+" . "+h.link)
	m["fw_tunnel_hosts"+n] = append(m["fw_tunnel_hosts"+n], h.addr.String())
}

// change records what leads from one host to another; either may be nil.
func (o hostOps) change(have, want *host) {
	sourceChanges := have == nil || want == nil || have.chain != want.chain
	if sourceChanges && have != nil {
		o.source(o.gone, *have, false)
	}
	if sourceChanges && want != nil {
		o.source(o.come, *want, true)
	}
	was, is := have != nil && have.bare, want != nil && want.bare
	if was && !is {
		o.leaving(o.gone, *have)
	}
	if is && !was {
		o.leaving(o.come, *want)
	}
}

// hosts adds what leads from some hosts to others; both are sorted.
func (s *script) hosts(have, want []host) {
	o := hostOps{map[string][]string{}, map[string][]string{}}
	for i, j := 0, 0; i < len(have) || j < len(want); {
		var c int
		switch {
		case i == len(have):
			c = 1
		case j == len(want):
			c = -1
		default:
			c = compareHosts(have[i], want[j])
		}
		switch {
		case c < 0:
			o.change(&have[i], nil)
			i++
		case c > 0:
			o.change(nil, &want[j])
			j++
		default:
			o.change(&have[i], &want[j])
			i, j = i+1, j+1
		}
	}
	for _, f := range families {
		o.keepShared("fw_tunnel_hosts"+f.n, want)
		for _, set := range []string{"fw_hosts", "fw_out_hosts", "fw_tunnel_hosts"} {
			s.elements(set+f.n, o.gone[set+f.n], o.come[set+f.n])
		}
	}
}

// keepShared keeps addresses that go from one link but are still on another.
func (o hostOps) keepShared(set string, want []host) {
	if len(o.gone[set]) == 0 {
		return
	}
	gone := make(map[netip.Addr]bool, len(o.gone[set]))
	for _, a := range o.gone[set] {
		gone[netip.MustParseAddr(a)] = true
	}
	for _, h := range want {
		if h.bare && gone[h.addr] {
			delete(gone, h.addr)
		}
	}
	o.gone[set] = slices.DeleteFunc(slices.Compact(o.gone[set]), func(a string) bool { return !gone[netip.MustParseAddr(a)] })
}
