package model

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Defaults of the fields, the same as in the CRDs.
const (
	defaultIKELifetime   = 14400
	defaultChildLifetime = 3600
	defaultDPDDelay      = 10
)

// Bounds of SA lifetimes, in seconds.
const (
	minimumLifetime = 10
	maximumLifetime = 604800
)

const mostSiteCIDRs = 64

func (p *parser) site(e entry) {
	o := e.Object.(*v1alpha1.Site)
	r := p.report(e)
	s := &Site{ID: e.ref.ID, Generation: o.Generation, Access: access(r, o.Spec.Access.To)}

	atMost(r, "spec.cidrs", len(o.Spec.CIDRs), mostSiteCIDRs)
	if len(o.Spec.CIDRs) == 0 {
		r.refuse("spec.cidrs", ReasonInvalidSpec, "is empty: name the ranges of the site, such as 192.168.10.0/24")
	}
	s.CIDRs = prefixes(r, "spec.cidrs", o.Spec.CIDRs, true)
	a := p.attach(r, o.Spec.GatewayRef)
	switch ipsec, wg := o.Spec.IPsec, o.Spec.WireGuard; {
	case ipsec != nil && wg != nil:
		r.refuse("spec", ReasonInvalidSpec, "has both ipsec and wireguard: leave one of them out")
	case ipsec != nil:
		s.IPsec = p.ipsecSite(r, s, a, ipsec)
	case wg != nil:
		s.WireGuard = p.wireGuardSite(r, s, wg)
	default:
		r.refuse("spec", ReasonInvalidSpec, "has neither ipsec nor wireguard: say how the site is reached")
	}
	if a == nil {
		return
	}
	p.checkRanges(r, a, o)
	if s.WireGuard != nil {
		a.checkPaths(r, s)
	}
	if s.IPsec != nil {
		a.checkIdentity(r, s.IPsec)
	}
	if !r.ok() {
		return
	}
	name := r.e.ref.String()
	for _, c := range s.CIDRs {
		a.ranges.add(c, name)
	}
	if s.WireGuard != nil {
		a.takePaths(s, name)
	}
	if s.IPsec != nil {
		a.identities[identityKey(s.IPsec)] = name
	}
	a.gateway.Sites = append(a.gateway.Sites, s)
}

// checkRanges checks a site's ranges against its gateway and the sites before it.
func (p *parser) checkRanges(r *report, a *attachments, o *v1alpha1.Site) {
	for i, s := range o.Spec.CIDRs {
		field := "spec.cidrs[" + strconv.Itoa(i) + "]"
		c, problem := parsePrefix(string(s))
		if problem != "" || RefuseRange(c) != "" {
			continue // said already
		}
		if why := a.allowsSite(r.e.ref.ID.Namespace, c); why != "" {
			r.refuse(field, ReasonNotAllowed, "VPNGateway %s does not allow %s: ask its owner for an entry in spec.allowedSites", a.gateway.ID, why)
			continue
		}
		if why := p.refuseRange(a.gateway, c); why != "" {
			r.refuse(field, ReasonOverlap, "%s overlaps %s: the cluster could not tell them apart; leave it out, or renumber one side", c, why)
			continue
		}
		if other := a.ranges.overlap(c); other != nil {
			r.refuse(field, ReasonOverlap, "%s %s %s of %s, which came first and stays in effect: give each range to one site only", c, relation(c, other.prefix), other.prefix, other.owner)
		}
	}
}

// checkKey refuses a public key that another peer of the gateway has.
func (a *attachments) checkKey(r *report, field string, k netstate.Key) {
	if k.IsZero() {
		return
	}
	if owner, ok := a.keys[k]; ok {
		r.refuse(field, ReasonDuplicate, "%s is the public key of %s already, which came first: every peer needs a key pair of its own", k, owner)
	}
}

// checkIdentity refuses an IPsec peer that could not be told from another one.
func (a *attachments) checkIdentity(r *report, s *IPsecSite) {
	if owner, ok := a.identities[identityKey(s)]; ok {
		r.refuse("spec.ipsec.remoteID", ReasonDuplicate, "the peer has the same identity as that of %s, which came first: give each site a remoteID of its own, or put all ranges into one Site", owner)
	}
}

// identityKey is equal for peers that an IKE daemon may take for the same.
func identityKey(s *IPsecSite) string {
	id := s.RemoteID
	if id == "" {
		id = s.Address
	}
	return strings.ToLower(id)
}

func (p *parser) wireGuardSite(r *report, s *Site, w *v1alpha1.SiteWireGuard) *WireGuardSite {
	out := &WireGuardSite{
		PublicKey:                  wireGuardKey(r, "spec.wireguard.publicKey", w.PublicKey),
		PresharedKey:               p.wireGuardPresharedKey(r, "spec.wireguard.presharedKeySecretRef", w.PresharedKeySecretRef),
		PersistentKeepaliveSeconds: uint16(bounded(r, "spec.wireguard.persistentKeepaliveSeconds", w.PersistentKeepaliveSeconds, 0, 65535, "seconds (0: off)")),
	}
	if w.Endpoint != "" {
		e, problem := splitHostPort(string(w.Endpoint), false)
		if problem != "" {
			r.refuse("spec.wireguard.endpoint", ReasonInvalidSpec, "%s", problem)
		}
		notInside(r, "spec.wireguard.endpoint", e.Host, s.CIDRs)
		out.Endpoint = e
	}
	p.alternatives(r, s, out, w)
	return out
}

// notInside refuses a peer's own address among the ranges behind it: packets to it would
// be sent into the tunnel that they are to carry.
func notInside(r *report, field, host string, cidrs []netip.Prefix) {
	a, err := netip.ParseAddr(host)
	if err != nil {
		return
	}
	if i := slices.IndexFunc(cidrs, func(c netip.Prefix) bool { return c.Contains(a) }); i >= 0 {
		r.refuse(field, ReasonInvalidSpec, "%s lies in the site's own range %s, so that the tunnel would run through itself: write the site's outer address, or take it out of cidrs", a, cidrs[i])
	}
}

func (p *parser) ipsecSite(r *report, s *Site, a *attachments, x *v1alpha1.SiteIPsec) *IPsecSite {
	out := &IPsecSite{
		LocalID:      identity(r, "spec.ipsec.localID", string(x.LocalID)),
		RemoteID:     identity(r, "spec.ipsec.remoteID", string(x.RemoteID)),
		ChildPerPair: oneOf(r, "spec.ipsec.childSAs", x.ChildSAs, v1alpha1.ChildSAsPerFamily, v1alpha1.ChildSAsPerFamily, v1alpha1.ChildSAsPerPair) == v1alpha1.ChildSAsPerPair,
	}
	if out.LocalID == "" && a != nil {
		out.LocalID = string(a.spec.IPsec.LocalID)
	}
	if x.Address != "" {
		host, problem := parseHost(string(x.Address))
		if problem != "" {
			r.refuse("spec.ipsec.address", ReasonInvalidSpec, "%s", problem)
		}
		notInside(r, "spec.ipsec.address", host, s.CIDRs)
		out.Address = host
	} else if x.RemoteID == "" {
		r.refuse("spec.ipsec.remoteID", ReasonInvalidSpec, "is missing: a site without address dials in and is recognised by it; write what the site calls itself")
	}
	if x.LocalAddress != "" {
		local, problem := parseAddr(string(x.LocalAddress))
		if problem == "" && (unusableHost(local) != "") {
			problem = quote(string(x.LocalAddress)) + " " + unusableHost(local) + ": write an address of the gateway's host, or leave the field out"
		}
		if problem != "" {
			r.refuse("spec.ipsec.localAddress", ReasonInvalidSpec, "%s", problem)
		} else {
			out.LocalAddress = local.String()
			checkFamilies(r, out)
		}
	}
	out.Initiate = initiate(r, x)
	out.IKEProposals, out.ESPProposals = proposals(r, &x.Proposals)
	ipsecTimes(r, x, out)
	out.Auth = p.ipsecAuth(r, out, &x.Auth)
	return out
}

// checkFamilies refuses outer addresses of two families.
func checkFamilies(r *report, s *IPsecSite) {
	local, err1 := netip.ParseAddr(s.LocalAddress)
	remote, err2 := netip.ParseAddr(s.Address)
	if err1 == nil && err2 == nil && local.Is4() != remote.Is4() {
		r.refuse("spec.ipsec.localAddress", ReasonInvalidSpec, "%s and address %s are of different families: write two IPv4 or two IPv6 addresses", local, remote)
	}
}

func initiate(r *report, x *v1alpha1.SiteIPsec) netstate.IPsecInitiate {
	fallback := v1alpha1.InitiateAlways
	if x.Address == "" {
		fallback = v1alpha1.InitiateNever
	}
	v := oneOf(r, "spec.ipsec.initiate", x.Initiate, fallback, v1alpha1.InitiateAlways, v1alpha1.InitiateOnTraffic, v1alpha1.InitiateNever)
	if x.Address == "" && v != v1alpha1.InitiateNever {
		r.refuse("spec.ipsec.initiate", ReasonInvalidSpec, "%s needs address, because the gateway must know where to connect to: write the site's address, or initiate: Never", v)
	}
	return netstate.IPsecInitiate(v)
}

func ipsecTimes(r *report, x *v1alpha1.SiteIPsec, out *IPsecSite) {
	seconds := func(field string, v, fallback int32) int32 {
		if v == 0 {
			return fallback
		}
		return bounded(r, field, v, minimumLifetime, maximumLifetime, "seconds")
	}
	ike := seconds("spec.ipsec.ikeLifetimeSeconds", x.IKELifetimeSeconds, defaultIKELifetime)
	child := seconds("spec.ipsec.childLifetimeSeconds", x.ChildLifetimeSeconds, defaultChildLifetime)
	if child > ike && ike > minimumLifetime {
		r.refuse("spec.ipsec.childLifetimeSeconds", ReasonInvalidSpec, "%d is longer than ikeLifetimeSeconds (%d), which ends it: make it shorter, or the other longer", child, ike)
	}
	dpd := int32(defaultDPDDelay)
	if x.DPDDelaySeconds != nil {
		dpd = bounded(r, "spec.ipsec.dpdDelaySeconds", *x.DPDDelaySeconds, 0, 3600, "seconds (0: off)")
	}
	out.IKELifetime = time.Duration(ike) * time.Second
	out.ChildLifetime = time.Duration(child) * time.Second
	out.DPDDelay = time.Duration(dpd) * time.Second
}
