package relay

import (
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// serviceKey names a service port.
type serviceKey struct {
	protocol netstate.Protocol
	address  netip.AddrPort
}

// service is a service port as the relay uses it; it never changes.
type service struct {
	key       serviceKey
	affinity  time.Duration // 0: none
	endpoints []netip.AddrPort
}

func (s *service) has(endpoint netip.AddrPort) bool { return slices.Contains(s.endpoints, endpoint) }

// updated is the service as the port says, s itself when nothing changed; s may be nil.
func (s *service) updated(key serviceKey, p netstate.ServicePort) *service {
	affinity := time.Duration(p.AffinitySeconds) * time.Second
	endpoints := p.Endpoints
	if !slices.IsSortedFunc(endpoints, netip.AddrPort.Compare) {
		endpoints = slices.SortedFunc(slices.Values(endpoints), netip.AddrPort.Compare)
	}
	if s != nil && s.affinity == affinity && slices.Equal(s.endpoints, endpoints) {
		return s
	}
	return &service{key, affinity, slices.Clone(endpoints)}
}

// table is a snapshot of all service ports; it never changes.
type table struct {
	services map[serviceKey]*service
}

func (t *table) lookup(protocol netstate.Protocol, address netip.AddrPort) *service {
	return t.services[serviceKey{protocol, address}]
}

// kinds are the sockets that the table needs.
func (t *table) kinds() map[socketKind]bool {
	need := map[socketKind]bool{}
	for k := range t.services {
		need[socketKind{k.protocol, netstate.FamilyOf(k.address.Addr())}] = true
	}
	return need
}

// update makes the next table and counts the service ports that came, went or changed.
func (t *table) update(ports []netstate.ServicePort) (next *table, changed int) {
	next = &table{services: make(map[serviceKey]*service, len(ports))}
	for _, p := range ports {
		if p.Protocol != netstate.TCP && p.Protocol != netstate.UDP {
			continue
		}
		key := serviceKey{p.Protocol, netip.AddrPortFrom(p.Address.Unmap(), p.Port)}
		next.services[key] = t.services[key].updated(key, p)
	}
	for k, s := range next.services {
		if t.services[k] != s {
			changed++
		}
	}
	for k := range t.services {
		if next.services[k] == nil {
			changed++
		}
	}
	return next, changed
}
