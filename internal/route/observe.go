package route

import (
	"context"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Observe lists our links, rules and routes as the kernel has them, sorted, in the form
// of a desired state; the other parts of the State are empty. Link-local IPv6 addresses
// are left out: the kernel makes them by itself. A link of ours that is neither an xfrm
// interface nor VXLAN counts as netstate.LinkWireGuard, in the kernel or on a TUN.
func (r *Route) Observe(ctx context.Context) (netstate.State, error) {
	if err := ctx.Err(); err != nil {
		return netstate.State{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var s netstate.State
	links, err := r.links()
	if err != nil {
		return s, err
	}
	addresses, err := r.addresses()
	if err != nil {
		return s, err
	}
	for name, l := range links {
		if !ours(name) {
			continue
		}
		o := observedLink(l, addresses[l.Attrs().Index])
		if x, ok := l.(*netlink.Vxlan); ok {
			o.Kind = netstate.LinkVXLAN
			if o.VXLAN, err = r.observedVXLAN(x); err != nil {
				return s, err
			}
		}
		s.Links = append(s.Links, o)
	}
	rules, err := r.rules()
	if err != nil {
		return s, err
	}
	for _, k := range rules {
		s.Rules = append(s.Rules, observedRule(k))
	}
	if s.Routes, err = r.routes(links); err != nil {
		return s, err
	}
	s.Sort()
	return s, nil
}

func observedLink(l netlink.Link, addresses []netip.Prefix) netstate.Link {
	o := netstate.Link{Name: l.Attrs().Name, Kind: netstate.LinkWireGuard, MTU: l.Attrs().MTU}
	for _, a := range addresses {
		if !a.Addr().IsLinkLocalUnicast() {
			o.Addresses = append(o.Addresses, a)
		}
	}
	o.Addresses = slices.Clip(o.Addresses)
	if x, ok := l.(*netlink.Xfrmi); ok {
		o.Kind, o.InterfaceID = netstate.LinkXFRM, x.Ifid
	}
	if o.Name == netstate.LibIPsecLink {
		o.Kind = netstate.LinkLibIPsec
	}
	return o
}
