package plan

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// ConnectionName is a site's name in the IKE daemon. A namespace holds no dot, so that
// two sites never share one.
func ConnectionName(id model.ID) string { return id.Namespace + "." + id.Name }

// ipsecSite plans a site's connection and returns the link that carries it.
func (p *planner) ipsecSite(s *model.Site) string {
	st := &p.out.State
	if st.IPsec == nil {
		st.IPsec = &netstate.IPsec{Datapath: p.facts.IPsecDatapath}
		if st.IPsec.Datapath == "" {
			st.IPsec.Datapath = netstate.KernelESP
		}
	}
	link := p.ipsecLink(s.ID)
	x := s.IPsec
	c := netstate.IPsecConnection{
		Name:            ConnectionName(s.ID),
		LocalID:         x.LocalID,
		RemoteID:        x.RemoteID,
		Auth:            x.Auth,
		IKEProposals:    slices.Clone(x.IKEProposals),
		ESPProposals:    slices.Clone(x.ESPProposals),
		LocalSelectors:  p.localSelectors(s),
		RemoteSelectors: slices.Clone(s.CIDRs),
		ChildPerPair:    x.ChildPerPair,
		Initiate:        x.Initiate,
		IKELifetime:     x.IKELifetime,
		ChildLifetime:   x.ChildLifetime,
		DPDDelay:        x.DPDDelay,
		InterfaceID:     link.InterfaceID,
		Link:            link.Name,
	}
	if x.LocalAddress != "" {
		c.LocalAddresses = []string{x.LocalAddress}
	}
	if x.Address != "" {
		c.RemoteAddresses = []string{x.Address}
	}
	st.IPsec.Connections = append(st.IPsec.Connections, c)
	return link.Name
}

// ipsecLink adds the link of a site: one of its own with kernel ESP, the shared one
// otherwise.
func (p *planner) ipsecLink(id model.ID) netstate.Link {
	st := &p.out.State
	link := netstate.Link{Name: netstate.LibIPsecLink, Kind: netstate.LinkLibIPsec, MTU: min(p.mtu(overheadESP), maxLibIPsec)}
	if st.IPsec.Datapath == netstate.KernelESP {
		link.Kind, link.MTU = netstate.LinkXFRM, p.mtu(overheadESP)
		link.InterfaceID = p.freeInterfaceID(id)
		link.Name = fmt.Sprintf("cvtx%08x", link.InterfaceID)
	}
	if !slices.ContainsFunc(st.Links, func(l netstate.Link) bool { return l.Name == link.Name }) {
		st.Links = append(st.Links, link)
	}
	return link
}

// freeInterfaceID derives a site's interface ID from its name, so that it survives
// restarts and other sites' coming and going; of two sites with the same hash the later
// one takes the next number.
func (p *planner) freeInterfaceID(id model.ID) uint32 {
	n := hash32(id.String())
	for n == 0 || slices.ContainsFunc(p.out.State.Links, func(l netstate.Link) bool { return l.InterfaceID == n }) {
		n++
	}
	return n
}

// localSelectors are our side's ranges: pods, which may always open connections to the
// site, and whatever else may talk with it.
func (p *planner) localSelectors(s *model.Site) []netip.Prefix {
	out := slices.Clone(p.gw.Pods)
	if s.Access&netstate.AccessServices != 0 {
		out = append(out, p.gw.ServiceRanges...)
	}
	if s.Access&netstate.AccessNodes != 0 {
		out = append(out, p.gw.Nodes...)
	}
	for _, o := range p.gw.Sites {
		if o.ID != s.ID && (s.Access|o.Access)&netstate.AccessSites != 0 {
			out = append(out, o.CIDRs...)
		}
	}
	if slices.ContainsFunc(p.gw.Devices, func(d *model.Device) bool { return d.Access&netstate.AccessSites != 0 }) {
		out = append(out, p.gw.DeviceRanges...)
	}
	slices.SortFunc(out, netstate.ComparePrefixes)
	return slices.Compact(out)
}
