package model

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// oneOf checks an enum; an empty value is the default.
func oneOf[T ~string](r *report, field string, v, fallback T, all ...T) T {
	if v == "" {
		return fallback
	}
	if !slices.Contains(all, v) {
		r.refuse(field, ReasonInvalidSpec, "%s is not known: write %s", quote(string(v)), choice(all))
		return fallback
	}
	return v
}

// choice is "A, B or C".
func choice[T ~string](all []T) string {
	s := make([]string, len(all))
	for i, x := range all {
		s[i] = string(x)
	}
	if len(s) < 2 {
		return strings.Join(s, "")
	}
	return strings.Join(s[:len(s)-1], ", ") + " or " + s[len(s)-1]
}

// bounded checks a number; it gives the lower bound when it is out of bounds.
func bounded(r *report, field string, v, low, high int32, unit string) int32 {
	if v >= low && v <= high {
		return v
	}
	if unit != "" {
		unit = " " + unit
	}
	r.refuse(field, ReasonInvalidSpec, "%d is out of bounds: write a number from %d to %d%s", v, low, high, unit)
	return low
}

func port(r *report, field string, v int32) uint16 { return uint16(bounded(r, field, v, 1, 65535, "")) }

// atMost limits the length of a list to what the CRD allows.
func atMost(r *report, field string, n, most int) {
	if n > most {
		r.refuse(field, ReasonInvalidSpec, "has %d entries, and at most %d are possible: leave some out, or spread them over several objects", n, most)
	}
}

func hasControl(s string) bool { return strings.IndexFunc(s, unicode.IsControl) >= 0 }

// forbidden in identities, beside control characters: what has a meaning in
// configuration files of IKE daemons, and wildcards.
const forbidden = "\"{}\\#%*"

// identity checks what an IKE peer calls itself; empty is fine.
func identity(r *report, field, s string) string {
	if s == "" {
		return ""
	}
	refuse := func(format string, args ...any) string {
		r.refuse(field, ReasonInvalidSpec, format, args...)
		return ""
	}
	a, err := netip.ParseAddr(s)
	from, to, isRange := strings.Cut(s, "-")
	_, errFrom := netip.ParseAddr(from)
	_, errTo := netip.ParseAddr(to)
	switch {
	case len(s) > 255:
		return refuse("has %d bytes: an identity has at most 255", len(s))
	case strings.IndexFunc(s, func(c rune) bool { return unicode.IsControl(c) || !unicode.IsPrint(c) }) >= 0:
		return refuse("%s has control characters or invisible ones: write the identity as plain text in one line", quote(s))
	case strings.ContainsAny(s, forbidden):
		return refuse("%s has one of %s in it: write one exact identity, such as vpn.example.com or \"C=DE, O=Example, CN=vpn\"", quote(s), strings.Join(strings.Split(forbidden, ""), " "))
	case strings.TrimSpace(s) != s:
		return refuse("%s begins or ends with a blank: remove it", quote(s))
	case err == nil && a.IsUnspecified():
		return refuse("%s means any identity: write the one that the peer uses", quote(s))
	case strings.Contains(s, "/") && !strings.Contains(s, "="), isRange && errFrom == nil && errTo == nil:
		return refuse("%s names several identities: write the one that the peer uses", quote(s))
	}
	return s
}

// wireGuardKey reads a public key.
func wireGuardKey(r *report, field string, s v1alpha1.Key) netstate.Key {
	if s == "" {
		r.refuse(field, ReasonInvalidSpec, "is missing: run 'wg pubkey' on the far side and write what it prints")
		return netstate.Key{}
	}
	k, err := netstate.ParseKey(string(s))
	if err != nil { // what is there may be half a private key: it is not repeated
		r.refuse(field, ReasonInvalidSpec, "is %s: run 'wg pubkey' on the far side and write what it prints", err)
		return netstate.Key{}
	}
	if k.IsZero() {
		r.refuse(field, ReasonInvalidSpec, "is all zeros, which is no key: run 'wg pubkey' on the far side and write what it prints")
	}
	return k
}

// access reads what may be reached; nil is the default.
func access(r *report, to []v1alpha1.AccessTarget) netstate.Access {
	if to == nil {
		return netstate.AccessPods | netstate.AccessServices
	}
	var out netstate.Access
	for i, t := range to {
		field := fmt.Sprintf("spec.access.to[%d]", i)
		var bit netstate.Access
		switch t {
		case v1alpha1.AccessPods:
			bit = netstate.AccessPods
		case v1alpha1.AccessServices:
			bit = netstate.AccessServices
		case v1alpha1.AccessNodes:
			bit = netstate.AccessNodes
		case v1alpha1.AccessSites:
			bit = netstate.AccessSites
		default:
			r.refuse(field, ReasonInvalidSpec, "%s is not known: write Pods, Services, Nodes or Sites", quote(string(t)))
		}
		if bit != 0 && out&bit != 0 {
			r.refuse(field, ReasonInvalidSpec, "%s is listed twice: leave one out", t)
		}
		out |= bit
	}
	return out
}

func gatewayID(e entry, ref v1alpha1.GatewayReference) ID {
	ns := ref.Namespace
	if ns == "" {
		ns = e.ref.ID.Namespace
	}
	return ID{ns, ref.Name}
}

// attach finds the gateway that an object names; nil when it cannot be used.
func (p *parser) attach(r *report, ref v1alpha1.GatewayReference) *attachments {
	if ref.Name == "" {
		r.refuse("spec.gatewayRef.name", ReasonInvalidSpec, "is missing: name the VPNGateway to join through%s", p.knownGateways())
		return nil
	}
	if !isDNSName(ref.Name) {
		r.refuse("spec.gatewayRef.name", ReasonInvalidSpec, "%s is not the name of a VPNGateway%s", quote(ref.Name), p.knownGateways())
		return nil
	}
	if ref.Namespace != "" && !isDNSLabel(ref.Namespace) {
		r.refuse("spec.gatewayRef.namespace", ReasonInvalidSpec, "%s is not the name of a namespace: leave the field out for the object's own", quote(ref.Namespace))
		return nil
	}
	id := gatewayID(r.e, ref)
	if a := p.attachments[id]; a != nil {
		return a
	}
	if p.refused[id] {
		r.await("spec.gatewayRef", ReasonGatewayNotInForce, "VPNGateway %s is refused itself: see what is said about it", id)
		return nil
	}
	r.await("spec.gatewayRef", ReasonMissingReference, "there is no VPNGateway %s: create it, or correct the name%s", id, p.knownGateways())
	return nil
}

// knownGateways is "; there is …", for messages.
func (p *parser) knownGateways() string {
	if len(p.out.Gateways) == 0 {
		return ""
	}
	const few = 3
	var names []string
	for i, g := range p.out.Gateways {
		if i == few {
			names = append(names, "…")
			break
		}
		names = append(names, g.ID.String())
	}
	return "; there is " + strings.Join(names, ", ")
}
