package model

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// alternatives reads what makes several tunnels of one.
func (p *parser) alternatives(r *report, s *Site, out *WireGuardSite, w *v1alpha1.SiteWireGuard) {
	const list = "spec.wireguard.alternatives"
	atMost(r, list, len(w.Alternatives), netstate.MostPaths-1)
	prefer := oneOf(r, "spec.wireguard.prefer", w.Prefer, v1alpha1.PreferFirst, v1alpha1.PreferFirst, v1alpha1.PreferEvenOdd)
	if w.Probe != nil {
		out.Probe = readProbe(r, "spec.wireguard.probe", *w.Probe, s.CIDRs)
	} else if len(w.Alternatives) > 0 {
		r.refuse("spec.wireguard.probe", ReasonInvalidSpec, "is missing: with alternatives the gateway must find out which tunnel carries packets; name an address that answers ping through this one")
	}
	for i, a := range w.Alternatives {
		field := list + "[" + strconv.Itoa(i) + "]"
		path := WireGuardPath{
			PublicKey:    wireGuardKey(r, field+".publicKey", a.PublicKey),
			PresharedKey: p.wireGuardPresharedKey(r, field+".presharedKeySecretRef", a.PresharedKeySecretRef),
			Probe:        readProbe(r, field+".probe", a.Probe, s.CIDRs),
		}
		if a.Endpoint != "" {
			e, problem := splitHostPort(string(a.Endpoint), false)
			if problem != "" {
				r.refuse(field+".endpoint", ReasonInvalidSpec, "%s", problem)
			}
			notInside(r, field+".endpoint", e.Host, s.CIDRs)
			path.Endpoint = e
		}
		for _, other := range out.Paths() {
			if other.PublicKey == path.PublicKey && !path.PublicKey.IsZero() {
				r.refuse(field+".publicKey", ReasonDuplicate, "%s is the key of another tunnel to this site: every gateway needs a key pair of its own", path.PublicKey)
			}
			if other.Probe.Address == path.Probe.Address && path.Probe.Address.IsValid() {
				r.refuse(field+".probe.address", ReasonDuplicate, "%s is probed through another tunnel already, which would say nothing about this one: name an address of this gateway alone", path.Probe.Address)
			}
		}
		out.Alternatives = append(out.Alternatives, path)
	}
	if local := out.Probe.Local; prefer == v1alpha1.PreferEvenOdd && local.IsValid() {
		b := local.AsSlice()
		out.Preferred = int(b[len(b)-1]) % (1 + len(out.Alternatives))
	}
}

// readProbe reads two addresses.
func readProbe(r *report, field string, v v1alpha1.Probe, cidrs []netip.Prefix) Probe {
	read := func(field string, s v1alpha1.IP) netip.Addr {
		a, problem := parseAddr(string(s))
		if problem == "" {
			if why := RefuseRange(netip.PrefixFrom(a, a.BitLen())); why != "" {
				problem = quote(string(s)) + " " + why + ": write an address of the tunnel"
			}
		}
		if problem != "" {
			r.refuse(field, ReasonInvalidSpec, "%s", problem)
			return netip.Addr{}
		}
		return a
	}
	out := Probe{Address: read(field+".address", v.Address), Local: read(field+".localAddress", v.LocalAddress)}
	if !out.Address.IsValid() || !out.Local.IsValid() {
		return out
	}
	if out.Address.Is4() != out.Local.Is4() {
		r.refuse(field+".localAddress", ReasonInvalidSpec, "%s and address %s are of different families: write two IPv4 or two IPv6 addresses", out.Local, out.Address)
	}
	if out.Address == out.Local {
		r.refuse(field+".localAddress", ReasonInvalidSpec, "%s is the address that is to answer: write this gateway's own", out.Local)
	}
	if i := slices.IndexFunc(cidrs, func(c netip.Prefix) bool { return c.Contains(out.Local) }); i >= 0 {
		r.refuse(field+".localAddress", ReasonInvalidSpec, "%s lies in the site's own range %s: write this gateway's address, which the far gateway expects", out.Local, cidrs[i])
	}
	return out
}

// pathField is the field of a site's i-th tunnel.
func pathField(i int) string {
	if i == 0 {
		return "spec.wireguard"
	}
	return "spec.wireguard.alternatives[" + strconv.Itoa(i-1) + "]"
}

// checkPaths checks a site's tunnels against what came before it.
func (a *attachments) checkPaths(r *report, s *Site) {
	for i, path := range s.WireGuard.Paths() {
		a.checkKey(r, pathField(i)+".publicKey", path.PublicKey)
		if path.Probe.IsZero() || !path.Probe.Address.IsValid() {
			continue
		}
		if other := a.ranges.overlap(netip.PrefixFrom(path.Probe.Address, path.Probe.Address.BitLen())); other != nil {
			r.refuse(pathField(i)+".probe.address", ReasonOverlap, "%s lies in %s of %s: name an address that only this site's gateway has", path.Probe.Address, other.prefix, other.owner)
		}
	}
}

// takePaths notes what the tunnels of an accepted site have.
func (a *attachments) takePaths(s *Site, name string) {
	for _, path := range s.WireGuard.Paths() {
		a.keys[path.PublicKey] = name
		if p := path.Probe.Address; p.IsValid() && !slices.ContainsFunc(s.CIDRs, func(c netip.Prefix) bool { return c.Contains(p) }) {
			a.ranges.add(netip.PrefixFrom(p, p.BitLen()), name)
		}
	}
}
