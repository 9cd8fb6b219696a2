package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Policy is what may be dialled: what any of the rules allows. The zero value allows
// nothing.
type Policy struct{ Rules []Rule }

// Rule allows any of CIDRs and Names, on any of Ports.
type Rule struct {
	CIDRs []netip.Prefix
	Names []string // lower case; "*.example.com": every name below example.com
	Ports []Ports
}

// Ports is a range of ports, both ends included.
type Ports struct{ First, Last uint16 }

// Check decides over a target as it was asked for. Nil: allowed. A name still has to be
// resolved, and what it resolves to has to pass CheckAddr.
func (p *Policy) Check(t Target) *wire.Refusal {
	if t.Addr.IsValid() {
		if refusal := CheckAddr(t.Addr); refusal != nil {
			return refusal
		}
	} else if t.Name == "localhost" || strings.HasSuffix(t.Name, ".localhost") {
		return wire.Refuse(wire.ReasonDenied, "%s is loopback, which is never dialled through the tunnel", t.Name)
	}
	knownHost := false
	for i := range p.Rules {
		if !p.Rules[i].host(t) {
			continue
		}
		knownHost = true
		if slices.ContainsFunc(p.Rules[i].Ports, func(r Ports) bool { return r.First <= t.Port && t.Port <= r.Last }) {
			return nil
		}
	}
	if knownHost {
		return wire.Refuse(wire.ReasonDenied, "port %d of %s is not allowed: add it to the target's ports in RemoteCluster, and to the spoke's policy", t.Port, t.host())
	}
	return wire.Refuse(wire.ReasonDenied, "target %s is not allowed: add it to spec.targets of RemoteCluster, and to the spoke's policy", t.host())
}

// CheckAddr decides over an address just before it is dialled, however it was found.
func CheckAddr(a netip.Addr) *wire.Refusal {
	if what := Forbidden(a); what != "" {
		return wire.Refuse(wire.ReasonDenied, "%s is %s, which is never dialled through the tunnel", a, what)
	}
	return nil
}

func (t Target) host() string {
	if t.Addr.IsValid() {
		return t.Addr.String()
	}
	return t.Name
}

func (r *Rule) host(t Target) bool {
	if t.Addr.IsValid() {
		return slices.ContainsFunc(r.CIDRs, func(p netip.Prefix) bool { return p.Contains(t.Addr) })
	}
	return slices.ContainsFunc(r.Names, func(n string) bool {
		if suffix, ok := strings.CutPrefix(n, "*"); ok {
			return strings.HasSuffix(t.Name, suffix) && len(t.Name) > len(suffix)
		}
		return n == t.Name
	})
}
