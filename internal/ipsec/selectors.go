package ipsec

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// selectorLink holds the addresses that kernel-libipsec looks for.
const selectorLink = "cvtselectors"

// selectorAddresses gives kernel-libipsec what it insists on: for each traffic selector
// of our side some local address within it, or it refuses the child SA ("error installing
// route with policy"), since it makes a route of its own with that source. A gateway has
// no address in most of the ranges that it offers (services, other sites).
//
// So a link that is always down carries the first address of every selector. Their
// entries in the local routing table are removed, so that the host
// neither answers for them, nor sends from them, nor delivers to them; in IPv4 the
// daemon's own table, which nothing looks into, has entries instead, since the kernel
// checks the source of a route against them.
type selectorAddresses struct {
	h     *netlink.Handle
	extra []netip.Prefix // narrowed selectors that a peer has negotiated
}

// set makes the addresses those of the prefixes; none: no link.
func (s *selectorAddresses) set(prefixes []netip.Prefix) error {
	link, err := s.h.LinkByName(selectorLink)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing) && len(prefixes) == 0:
		return nil
	case errors.As(err, &missing):
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: selectorLink}, PeerName: selectorLink + "0"}
		if err := s.h.LinkAdd(veth); err != nil {
			return fmt.Errorf("make link %s: %w", selectorLink, err)
		}
		if link, err = s.h.LinkByName(selectorLink); err != nil {
			return fmt.Errorf("find link %s: %w", selectorLink, err)
		}
	case err != nil:
		return fmt.Errorf("find link %s: %w", selectorLink, err)
	case len(prefixes) == 0:
		return s.remove(link)
	}
	have, err := s.h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", selectorLink, err)
	}
	var want []netip.Addr
	for _, p := range prefixes {
		want = append(want, p.Masked().Addr())
	}
	var errs []error
	for _, a := range have {
		addr, _ := netip.AddrFromSlice(a.IP)
		if addr = addr.Unmap(); slices.Contains(want, addr) {
			want = slices.DeleteFunc(want, func(x netip.Addr) bool { return x == addr })
			continue
		}
		errs = append(errs, ignore(s.h.AddrDel(link, &a), syscall.EADDRNOTAVAIL), s.permit(addr, false))
	}
	slices.SortFunc(want, netip.Addr.Compare)
	for _, addr := range slices.Compact(want) {
		if err := s.addAddress(link, addr); err != nil {
			errs = append(errs, fmt.Errorf("add %s to %s: %w", addr, selectorLink, err))
		}
	}
	return errors.Join(errs...)
}

func (s *selectorAddresses) addAddress(link netlink.Link, addr netip.Addr) error {
	a := &netlink.Addr{IPNet: hostNet(addr), Flags: syscall.IFA_F_NODAD}
	if err := s.h.AddrAdd(link, a); err != nil {
		return err
	}
	local := &netlink.Route{Dst: hostNet(addr), LinkIndex: link.Attrs().Index, Table: syscall.RT_TABLE_LOCAL, Type: syscall.RTN_LOCAL, Scope: netlink.SCOPE_HOST}
	if addr.Is6() {
		local.Scope = netlink.SCOPE_UNIVERSE
	}
	if err := ignore(s.h.RouteDel(local), syscall.ESRCH); err != nil {
		return fmt.Errorf("remove its local route: %w", err)
	}
	return s.permit(addr, true)
}

// permit lets the daemon's table have routes with that source, or takes that back.
func (s *selectorAddresses) permit(addr netip.Addr, yes bool) error {
	if addr.Is6() {
		return nil // there the address alone counts
	}
	lo, err := s.h.LinkByName("lo")
	if err != nil {
		return err
	}
	r := &netlink.Route{Dst: hostNet(addr), LinkIndex: lo.Attrs().Index, Table: daemonTable, Type: syscall.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: netstate.RouteProtocol}
	if yes {
		return ignore(s.h.RouteAdd(r), syscall.EEXIST)
	}
	return ignore(s.h.RouteDel(r), syscall.ESRCH)
}

func (s *selectorAddresses) remove(link netlink.Link) error {
	errs := []error{}
	routes, err := s.h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: daemonTable}, netlink.RT_FILTER_TABLE)
	errs = append(errs, err)
	for _, r := range routes {
		errs = append(errs, ignore(s.h.RouteDel(&r), syscall.ESRCH))
	}
	return errors.Join(append(errs, s.h.LinkDel(link))...)
}

// dropRules removes the daemon's routing rules: nobody is to look into its table.
func (s *selectorAddresses) dropRules() error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = family, daemonRulePriority, daemonTable
		for range 2 {
			errs = append(errs, ignore(ignore(s.h.RuleDel(r), syscall.ENOENT), syscall.EAFNOSUPPORT))
		}
	}
	return errors.Join(errs...)
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}
