// Package ipam hands out addresses: the first free one of several ranges, for each
// address family.
//
// It is pure: who holds what is handed in and handed back. It must not know what an
// address is for, nor where allocations are kept.
package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Reasons why an address is not handed out; test with errors.Is.
var (
	ErrExhausted = errors.New("no free address is left")
	ErrTaken     = errors.New("the address is taken")
	ErrReserved  = errors.New("the address is reserved")
	ErrOutside   = errors.New("the address is in none of the ranges")
)

// GatewayAddress is the first usable address of a range, which the gateway takes for
// itself: the one after the network address. A range that is a single address is that
// address. The zero prefix gives the zero address.
func GatewayAddress(r netip.Prefix) netip.Addr {
	if !r.IsValid() {
		return netip.Addr{}
	}
	r = r.Masked()
	if r.IsSingleIP() {
		return r.Addr()
	}
	return r.Addr().Next()
}

// Last is the last address of a range: IPv4's broadcast address.
func Last(r netip.Prefix) netip.Addr {
	a := r.Masked().Addr()
	if !a.IsValid() {
		return a
	}
	b, network := a.As16(), r.Bits()
	if a.Is4() {
		network += 96
	}
	for i := range b {
		switch bits := network - 8*i; {
		case bits <= 0:
			b[i] = 0xff
		case bits < 8:
			b[i] |= 0xff >> bits
		}
	}
	last := netip.AddrFrom16(b)
	if a.Is4() {
		return last.Unmap()
	}
	return last
}

// Reserved says why an address of the range r is never handed out, or "" when it can be:
// the network address (RFC 4291, section 2.6.1 for IPv6), IPv4's broadcast address, and
// the gateway's own.
func Reserved(r netip.Prefix, a netip.Addr) string {
	switch {
	case !r.Contains(a):
		return ""
	case a == GatewayAddress(r):
		return "the gateway's own address"
	case a == r.Masked().Addr():
		return "the network address"
	case a.Is4() && a == Last(r):
		return "the broadcast address"
	}
	return ""
}

// Pool hands out single addresses of several ranges. It is not safe for concurrent use.
type Pool struct {
	ranges []netip.Prefix
	next   []netip.Addr // per range: every address before it is taken; zero: none is left
	taken  map[netip.Addr]struct{}
}

// New makes a pool of the ranges, which are used in the given order and should not overlap.
func New(ranges ...netip.Prefix) *Pool {
	p := &Pool{taken: map[netip.Addr]struct{}{}}
	for _, r := range ranges {
		if !r.IsValid() {
			continue
		}
		p.ranges = append(p.ranges, r.Masked())
		p.next = append(p.next, r.Masked().Addr())
	}
	return p
}

// Families reports for which address families the pool has ranges.
func (p *Pool) Families() (v4, v6 bool) {
	for _, r := range p.ranges {
		if r.Addr().Is4() {
			v4 = true
		} else {
			v6 = true
		}
	}
	return v4, v6
}

// Take takes a given address. The error is ErrOutside, ErrReserved or ErrTaken, with words
// around it.
func (p *Pool) Take(a netip.Addr) error {
	inside := false
	for _, r := range p.ranges {
		if why := Reserved(r, a); why != "" {
			return fmt.Errorf("%s is %s of %s: %w", a, why, r, ErrReserved)
		}
		inside = inside || r.Contains(a)
	}
	if !inside {
		return fmt.Errorf("%s: %w: %s", a, ErrOutside, p)
	}
	if _, ok := p.taken[a]; ok {
		return fmt.Errorf("%s: %w", a, ErrTaken)
	}
	p.taken[a] = struct{}{}
	return nil
}

// First takes the first free address of a family. The error is ErrExhausted, with words
// around it.
func (p *Pool) First(v6 bool) (netip.Addr, error) {
	var seen []netip.Prefix
	for i, r := range p.ranges {
		if r.Addr().Is6() != v6 {
			continue
		}
		seen = append(seen, r)
		for a := p.next[i]; r.Contains(a); a = a.Next() {
			if p.Take(a) == nil {
				p.next[i] = a.Next()
				return a, nil
			}
		}
		p.next[i] = netip.Addr{}
	}
	if len(seen) == 0 {
		return netip.Addr{}, fmt.Errorf("%w: there is no %s range", ErrExhausted, familyName(v6))
	}
	return netip.Addr{}, fmt.Errorf("%w in %s", ErrExhausted, join(seen))
}

// Release gives an address back; one that is not taken is ignored.
func (p *Pool) Release(a netip.Addr) {
	if _, ok := p.taken[a]; !ok {
		return
	}
	delete(p.taken, a)
	for i, r := range p.ranges {
		if r.Contains(a) && (!p.next[i].IsValid() || a.Less(p.next[i])) {
			p.next[i] = a
		}
	}
}

// Len is the number of addresses that are taken.
func (p *Pool) Len() int { return len(p.taken) }

// String lists the ranges.
func (p *Pool) String() string { return join(p.ranges) }

// Request asks for one address of each family that the pool has.
type Request struct {
	Wishes []netip.Addr // at most one per family
	Held   []netip.Addr // what the holder has now; kept where there is no wish
}

// Answer is what a Request got. Addresses may be incomplete when Err is set: what could be
// given is given.
type Answer struct {
	Addresses []netip.Addr // IPv4 first
	Err       error        // errors.Is: ErrExhausted, ErrTaken, ErrReserved, ErrOutside
}

// Assign answers requests in order. Whoever holds an address keeps it, whatever a later
// one or a newcomer wishes; after that wishes are served, then first free addresses. Held
// addresses that are no longer in the ranges are forgotten.
func Assign(ranges []netip.Prefix, requests []Request) []Answer {
	a := assigner{pool: New(ranges...), requests: requests, answers: make([]Answer, len(requests))}
	a.pool.taken = make(map[netip.Addr]struct{}, len(requests))
	v4, v6 := a.pool.Families()
	var families []bool
	if v4 {
		families = append(families, false)
	}
	if v6 {
		families = append(families, true)
	}
	got := make([][2]bool, len(requests))
	for i, r := range requests {
		for _, h := range r.Held {
			f := index(h.Is6())
			if got[i][f] || (hasFamily(r.Wishes, h.Is6()) && !slices.Contains(r.Wishes, h)) {
				continue
			}
			if a.pool.Take(h) == nil {
				a.give(i, h)
				got[i][f] = true
			}
		}
	}
	for i, r := range requests {
		for _, w := range r.Wishes {
			f := index(w.Is6())
			if got[i][f] {
				continue
			}
			got[i][f] = true
			if err := a.pool.Take(w); err != nil {
				a.fail(i, err)
				continue
			}
			a.give(i, w)
		}
	}
	for i := range requests {
		for _, v6 := range families {
			if got[i][index(v6)] {
				continue
			}
			if addr, err := a.pool.First(v6); err != nil {
				a.fail(i, err)
			} else {
				a.give(i, addr)
			}
		}
		slices.SortFunc(a.answers[i].Addresses, netip.Addr.Compare)
	}
	return a.answers
}

type assigner struct {
	pool     *Pool
	requests []Request
	answers  []Answer
}

func (a *assigner) give(i int, addr netip.Addr) {
	a.answers[i].Addresses = append(a.answers[i].Addresses, addr)
}

func (a *assigner) fail(i int, err error) { a.answers[i].Err = errors.Join(a.answers[i].Err, err) }

func index(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

func hasFamily(list []netip.Addr, v6 bool) bool {
	return slices.ContainsFunc(list, func(a netip.Addr) bool { return a.Is6() == v6 })
}

func familyName(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

func join(list []netip.Prefix) string {
	if len(list) == 0 {
		return "no ranges"
	}
	s := list[0].String()
	for _, r := range list[1:] {
		s += ", " + r.String()
	}
	return s
}

// FirstOverlap finds a range of a and one of b that share addresses; ok is false when
// there are none. Parent and child clusters of a control plane are checked with it.
func FirstOverlap(a, b []netip.Prefix) (x, y netip.Prefix, ok bool) {
	type entry struct {
		r     netip.Prefix
		fromB bool
	}
	all := make([]entry, 0, len(a)+len(b))
	for _, r := range a {
		all = append(all, entry{r.Masked(), false})
	}
	for _, r := range b {
		all = append(all, entry{r.Masked(), true})
	}
	slices.SortStableFunc(all, func(p, q entry) int {
		if c := p.r.Addr().Compare(q.r.Addr()); c != 0 {
			return c
		}
		return p.r.Bits() - q.r.Bits()
	})
	// Ranges nest or are disjoint: those that contain the current one form a stack.
	var open []entry
	for _, e := range all {
		for len(open) > 0 && !open[len(open)-1].r.Overlaps(e.r) {
			open = open[:len(open)-1]
		}
		for _, o := range open {
			if o.fromB == e.fromB {
				continue
			}
			if e.fromB {
				return o.r, e.r, true
			}
			return e.r, o.r, true
		}
		open = append(open, e)
	}
	return netip.Prefix{}, netip.Prefix{}, false
}
