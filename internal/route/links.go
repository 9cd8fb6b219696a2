package route

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// SetLinks makes the xfrm interfaces and VXLAN links that are wanted, these with their far
// ends, and removes those of ours that are not, and gives every wanted link its MTU, exactly its addresses (link-local IPv6
// addresses stay) and the up flag. Links of other kinds are made by others; one that is
// not there is reported as a *MissingLinkError, and the rest is applied. It returns how
// many changes it made.
func (r *Route) SetLinks(ctx context.Context, want []netstate.Link) (changed int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	have, err := r.links()
	if err != nil {
		return 0, err
	}
	var errs failures
	n, err := r.removeMade(have, want)
	changed += n
	if err != nil {
		errs.add(err)
	}
	addresses, err := r.addresses()
	if err != nil {
		return changed, err
	}
	for _, w := range want {
		if err := ctx.Err(); err != nil {
			return changed, err
		}
		r.set[w.Name] = true
		n, err := r.setLink(have[w.Name], w, addresses)
		changed += n
		if err != nil {
			errs.add(err)
		}
	}
	return changed, errs.join()
}

// links lists all links by name.
func (r *Route) links() (map[string]netlink.Link, error) {
	list, err := dump(r.h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	links := make(map[string]netlink.Link, len(list))
	for _, l := range list {
		links[l.Attrs().Name] = l
	}
	return links, nil
}

// made tells whether a link is of a kind that this package makes.
func made(l netlink.Link) bool { return l.Type() == "xfrm" || l.Type() == "vxlan" }

// removeMade deletes our links of the kinds that are made here and that are not wanted, or
// wanted with what cannot be changed (an identifier, say), and forgets them in have.
func (r *Route) removeMade(have map[string]netlink.Link, want []netstate.Link) (changed int, err error) {
	keep := make(map[string]netstate.Link, len(want))
	for _, w := range want {
		keep[w.Name] = w
	}
	var errs failures
	for name, l := range have {
		if !made(l) || !ours(name) || sameMade(l, keep[name]) {
			continue
		}
		if err := r.h.LinkDel(l); err != nil {
			errs.add(fmt.Errorf("delete link %s: %w", name, err))
			continue
		}
		delete(have, name)
		changed++
	}
	return changed, errs.join()
}

func sameMade(l netlink.Link, w netstate.Link) bool {
	switch x := l.(type) {
	case *netlink.Xfrmi:
		return w.Kind == netstate.LinkXFRM && w.InterfaceID == x.Ifid
	case *netlink.Vxlan:
		return w.Kind == netstate.LinkVXLAN && sameVXLAN(x, w)
	}
	return false
}

// setLink makes l, which is nil when it is not there, what w says; addresses are those
// of all links.
func (r *Route) setLink(l netlink.Link, w netstate.Link, addresses map[int][]netip.Prefix) (changed int, err error) {
	if !ours(w.Name) {
		return 0, fmt.Errorf("link %s is not one of ours: names start with %q", w.Name, linkPrefix)
	}
	switch {
	case l == nil && w.Kind == netstate.LinkXFRM:
		if l, err = r.addXFRM(w); err != nil {
			return 0, err
		}
		changed++
	case l == nil && w.Kind == netstate.LinkVXLAN:
		if l, err = r.addVXLAN(w); err != nil {
			return 0, err
		}
		changed++
	case l == nil:
		return 0, &MissingLinkError{Link: w.Name}
	case (w.Kind == netstate.LinkXFRM || w.Kind == netstate.LinkVXLAN) && l.Type() != string(w.Kind):
		return 0, fmt.Errorf("link %s is of type %s, not %s: delete it (ip link delete %s)", w.Name, l.Type(), w.Kind, w.Name)
	}
	if w.MTU != 0 && l.Attrs().MTU != w.MTU {
		if err := r.h.LinkSetMTU(l, w.MTU); err != nil {
			return changed, linkError(w.Name, fmt.Sprintf("set MTU %d", w.MTU), err)
		}
		changed++
	}
	n, err := r.setAddresses(l, w.Addresses, addresses[l.Attrs().Index])
	changed += n
	if err != nil {
		return changed, err
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := r.h.LinkSetUp(l); err != nil {
			return changed, linkError(w.Name, "set up", err)
		}
		changed++
	}
	if w.Kind != netstate.LinkVXLAN {
		return changed, nil
	}
	n, err = r.setPeers(l, *w.VXLAN)
	return changed + n, err
}

func (r *Route) addXFRM(w netstate.Link) (netlink.Link, error) {
	if w.InterfaceID == 0 {
		return nil, fmt.Errorf("link %s: an xfrm interface needs an identifier other than 0", w.Name)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = w.Name
	if err := r.h.LinkAdd(&netlink.Xfrmi{LinkAttrs: attrs, Ifid: w.InterfaceID}); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = fmt.Errorf("%w: this kernel has no xfrm interfaces (CONFIG_XFRM_INTERFACE)", err)
		}
		return nil, linkError(w.Name, "add", err)
	}
	l, err := r.h.LinkByName(w.Name)
	if err != nil {
		return nil, linkError(w.Name, "find", err)
	}
	return l, nil
}

// linkError names the operation and the link; a link that went away meanwhile is a
// missing one.
func linkError(name, operation string, err error) error {
	if errors.Is(err, unix.ENODEV) {
		return &MissingLinkError{Link: name}
	}
	return fmt.Errorf("link %s: %s: %w", name, operation, err)
}

// setAddresses makes the addresses of a link, which has those in have, exactly want. New
// ones come before old ones go, so that the link always has one.
func (r *Route) setAddresses(l netlink.Link, want, have []netip.Prefix) (changed int, err error) {
	// The kernel deletes an IPv4 address's secondaries along with it: look again.
	for range 3 {
		missing := without(want, have)
		surplus := slices.DeleteFunc(without(have, want), func(a netip.Prefix) bool { return a.Addr().IsLinkLocalUnicast() })
		if len(missing)+len(surplus) == 0 {
			break
		}
		n, err := r.changeAddresses(l, missing, surplus)
		changed += n
		if err != nil {
			return changed, linkError(l.Attrs().Name, "addresses", err)
		}
		all, err := r.addresses()
		if err != nil {
			return changed, err
		}
		have = all[l.Attrs().Index]
	}
	return changed, nil
}

func without(list, out []netip.Prefix) []netip.Prefix {
	var rest []netip.Prefix
	for _, p := range list {
		if !slices.Contains(out, p) {
			rest = append(rest, p)
		}
	}
	return rest
}

func (r *Route) changeAddresses(l netlink.Link, missing, surplus []netip.Prefix) (changed int, err error) {
	// An IPv6 address has one prefix length: the old one has to go first.
	var later []netip.Prefix
	for _, a := range surplus {
		same := func(m netip.Prefix) bool { return m.Addr() == a.Addr() }
		if !a.Addr().Is6() || !slices.ContainsFunc(missing, same) {
			later = append(later, a)
			continue
		}
		if err := r.h.AddrDel(l, address(a)); err != nil {
			return changed, fmt.Errorf("delete %s: %w", a, err)
		}
		changed++
	}
	for _, a := range missing {
		if err := r.h.AddrAdd(l, address(a)); err != nil {
			if a.Addr().Is6() && errors.Is(err, unix.EACCES) {
				err = fmt.Errorf("%w: IPv6 is off on this link (net.ipv6.conf.%s.disable_ipv6, or an MTU below 1280)", err, l.Attrs().Name)
			}
			return changed, fmt.Errorf("add %s: %w", a, err)
		}
		changed++
	}
	for _, a := range later {
		if err := r.h.AddrDel(l, address(a)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return changed, fmt.Errorf("delete %s: %w", a, err)
		}
		changed++
	}
	return changed, nil
}

// address is p for netlink: no broadcast address, and no duplicate detection, which a
// tunnel has no use for.
func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is4() {
		a.Broadcast = net.IPv4zero
	} else {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// addresses lists the addresses of all links by the link's index, link-local ones
// included, sorted.
func (r *Route) addresses() (map[int][]netip.Prefix, error) {
	list, err := dump(func() ([]netlink.Addr, error) { return r.h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := map[int][]netip.Prefix{}
	for _, a := range list {
		out[a.LinkIndex] = append(out[a.LinkIndex], prefix(a.IPNet))
	}
	for _, l := range out {
		slices.SortFunc(l, netstate.ComparePrefixes)
	}
	return out, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefix(n *net.IPNet) netip.Prefix {
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr(n.IP), bits)
}

// addr converts an address of 4 or 16 bytes; nil gives the zero value.
func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
