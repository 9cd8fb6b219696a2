package nft

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// portKey is what a packet to a service carries.
type portKey struct {
	addr  netip.Addr
	proto netstate.Protocol
	port  uint16
}

func keyOf(p netstate.ServicePort) portKey {
	return portKey{p.Address.Unmap(), p.Protocol, p.Port}
}

// text is the key as nft(8) reads it.
func (k portKey) text() string { return fmt.Sprintf("%s . %d . %d", k.addr, k.proto, k.port) }

// endpoint is a backend with its number: unique among all ports, never zero.
type endpoint struct {
	addr   netip.AddrPort
	number uint32
}

// port is one translated service port with at least one endpoint. The index of an
// endpoint is its slot.
type port struct {
	affinity int
	eps      []endpoint
}

// ports are the translated service ports that the table holds.
type ports struct {
	byKey map[portKey]*port
	next  uint32 // the next endpoint's number
}

func newPorts() *ports { return &ports{byKey: map[portKey]*port{}, next: 1} }

// renumbered is an empty set of ports that gives no number again.
func (s *ports) renumbered() *ports {
	return &ports{byKey: map[portKey]*port{}, next: s.next}
}

// desired lists what the ports translate.
func (s *ports) desired() []netstate.ServicePort {
	out := make([]netstate.ServicePort, 0, len(s.byKey))
	for k, p := range s.byKey {
		d := netstate.ServicePort{Address: k.addr, Protocol: k.proto, Port: k.port, AffinitySeconds: p.affinity}
		for _, e := range p.eps {
			d.Endpoints = append(d.Endpoints, e.addr)
		}
		out = append(out, d)
	}
	slices.SortFunc(out, netstate.CompareServicePorts)
	return out
}

// flow is a way from a service port to an endpoint; the zero endpoint stands for a port
// that had none.
type flow struct {
	port     portKey
	endpoint netip.AddrPort
}

// portPlan is what leads from the ports in the table to the desired ones.
type portPlan struct {
	ports map[portKey]*port // changed ones; nil: gone
	next  uint32
	picks map[pick]bool // all chains that are needed afterwards
	ended []flow        // UDP

	gone, come map[string][]string // elements by set
}

// plan compares. A change of one endpoint costs at most six element operations.
func (s *ports) plan(desired []netstate.ServicePort) *portPlan {
	p := &portPlan{ports: map[portKey]*port{}, next: s.next, picks: map[pick]bool{}, gone: map[string][]string{}, come: map[string][]string{}}
	seen := make(map[portKey]bool, len(desired))
	for i := range desired {
		k := keyOf(desired[i])
		if seen[k] {
			continue // the first of equals counts
		}
		have := s.byKey[k]
		want := p.target(k, have, desired[i])
		if want == nil {
			continue
		}
		seen[k] = true
		p.picks[want.pick(k)] = true
		if want != have {
			p.change(k, have, want)
		}
	}
	for k, have := range s.byKey {
		if !seen[k] {
			p.change(k, have, nil)
		}
	}
	return p
}

// target is the port as desired: have itself when nothing changes, nil without
// endpoints. Endpoints keep their slots; the last one moves into a hole.
func (p *portPlan) target(k portKey, have *port, d netstate.ServicePort) *port {
	eps := usable(k, d.Endpoints)
	if len(eps) == 0 {
		return nil
	}
	want := &port{affinity: max(d.AffinitySeconds, 0)}
	if have != nil {
		if have.affinity == want.affinity && sameEndpoints(have.eps, eps) {
			return have
		}
		want.eps = slices.Clone(have.eps)
	}
	for i := 0; i < len(want.eps); {
		if _, keep := slices.BinarySearchFunc(eps, want.eps[i].addr, netip.AddrPort.Compare); keep {
			i++
			continue
		}
		last := len(want.eps) - 1
		want.eps[i] = want.eps[last]
		want.eps = want.eps[:last]
	}
	kept := make(map[netip.AddrPort]bool, len(want.eps))
	for _, e := range want.eps {
		kept[e.addr] = true
	}
	for _, a := range eps {
		if !kept[a] {
			want.eps = append(want.eps, endpoint{a, p.next})
			p.next++
		}
	}
	return want
}

// usable sorts endpoints and leaves out doubles and those of another family.
func usable(k portKey, endpoints []netip.AddrPort) []netip.AddrPort {
	if inOrder(k, endpoints) {
		return endpoints
	}
	var out []netip.AddrPort
	for _, e := range endpoints {
		e = netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
		if sameFamily(e, k) {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// inOrder reports whether endpoints are usable as they are.
func inOrder(k portKey, endpoints []netip.AddrPort) bool {
	for i, e := range endpoints {
		if !sameFamily(e, k) || i > 0 && endpoints[i-1].Compare(e) >= 0 {
			return false
		}
	}
	return true
}

func sameFamily(e netip.AddrPort, k portKey) bool {
	return e.IsValid() && !e.Addr().Is4In6() && e.Addr().Zone() == "" && e.Addr().Is4() == k.addr.Is4()
}

func sameEndpoints(have []endpoint, want []netip.AddrPort) bool {
	if len(have) != len(want) {
		return false
	}
	for _, e := range have {
		if _, ok := slices.BinarySearchFunc(want, e.addr, netip.AddrPort.Compare); !ok {
			return false
		}
	}
	return true
}

// change records the element operations of one port; have or want may be nil.
func (p *portPlan) change(k portKey, have, want *port) {
	p.ports[k] = want
	n, key := familyOf(k.addr), k.text()
	old, now := slotsOf(have), slotsOf(want)
	for i := range max(len(old), len(now)) {
		slot := fmt.Sprintf("%s . %d", key, i)
		if i < len(old) && i < len(now) && old[i].number == now[i].number {
			continue
		}
		if i < len(old) {
			p.remove("svc_slots"+n, slot)
		}
		if i < len(now) {
			p.insert("svc_slots"+n, element(slot, fmt.Sprint(now[i].number)))
		}
	}
	p.endpoints(k, old, now)
	switch {
	case have == nil:
		p.insert("svc_picks"+n, element(key, "goto svc_"+want.pick(k).name()))
	case want == nil:
		p.remove("svc_picks"+n, key)
	case have.pick(k).name() != want.pick(k).name():
		p.remove("svc_picks"+n, key)
		p.insert("svc_picks"+n, element(key, "goto svc_"+want.pick(k).name()))
	}
}

func slotsOf(p *port) []endpoint {
	if p == nil {
		return nil
	}
	return p.eps
}

// endpoints records which numbers come and go, and whose flows end.
func (p *portPlan) endpoints(k portKey, old, now []endpoint) {
	set := "svc_eps" + familyOf(k.addr)
	keep := make(map[uint32]bool, len(now))
	for _, e := range now {
		keep[e.number] = true
	}
	had := make(map[uint32]bool, len(old))
	for _, e := range old {
		had[e.number] = true
		if keep[e.number] {
			continue
		}
		p.remove(set, fmt.Sprint(e.number))
		if k.proto == netstate.UDP {
			p.ended = append(p.ended, flow{k, e.addr})
		}
	}
	for _, e := range now {
		if !had[e.number] {
			p.insert(set, element(fmt.Sprint(e.number), fmt.Sprintf("%s . %d", e.addr.Addr(), e.addr.Port())))
		}
	}
	if len(old) == 0 && k.proto == netstate.UDP {
		p.ended = append(p.ended, flow{k, netip.AddrPort{}})
	}
}

func (p *portPlan) remove(set, key string)     { p.gone[set] = append(p.gone[set], key) }
func (p *portPlan) insert(set, element string) { p.come[set] = append(p.come[set], element) }

// commit records that the plan is in effect.
func (s *ports) commit(p *portPlan) {
	for k, port := range p.ports {
		if port == nil {
			delete(s.byKey, k)
		} else {
			s.byKey[k] = port
		}
	}
	s.next = p.next
}

// ports adds the element operations of a plan; nil: none.
func (s *script) ports(p *portPlan) {
	if p == nil {
		return
	}
	for _, d := range frame {
		s.elements(d.name, p.gone[d.name], p.come[d.name])
	}
}
