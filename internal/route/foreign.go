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

// MoveForeign moves the routes that others have put onto a link of ours to the links by which
// their next hops are reached underneath, that is by packets with netstate.MarkOuter, and
// returns how many. A network plugin puts them there that asks the kernel by which link it
// reaches a node, while that is ours; with ours they would go. All else of such a route stays:
// table, destination, metric, protocol, source, other next hops. Each is replaced in one step, so
// that it is missing at no moment.
//
// A route without a next hop, or with one that is no neighbour underneath, cannot be had there: it
// stays, and goes with the link. A link that is not there has no routes.
func (r *Route) MoveForeign(ctx context.Context, link string) (moved int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return 0, nil
	}
	l, err := r.h.LinkByName(link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("find link %s: %w", link, err)
	}
	var errs failures
	m := mover{r: r, from: l.Attrs().Index, below: map[netip.Addr]int{}}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := m.candidates(family)
		if err != nil {
			errs.add(fmt.Errorf("list routes: %w", err))
			continue
		}
		for _, k := range list {
			done, err := m.move(k)
			if err != nil {
				errs.add(fmt.Errorf("move route %s table %d away from %s: %w", k.Dst, k.Table, link, err))
			}
			if done {
				moved++
			}
		}
	}
	return moved, errs.join()
}

// mover moves routes away from one link.
type mover struct {
	r     *Route
	from  int                // the link's index
	below map[netip.Addr]int // next hop → index of the link that leads to it underneath; 0: none
}

// place is what tells routes of others apart, as far as replacing goes: the first one in a place is
// replaced.
type place struct {
	table, tos, metric int
	destination        string
}

// candidates are the routes of a family that lead over the link, are not ours, and are the first
// ones in their place.
func (m *mover) candidates(family int) ([]netlink.Route, error) {
	list, err := dump(func() ([]netlink.Route, error) {
		return m.r.h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	taken := map[place]bool{}
	var out []netlink.Route
	for _, k := range list {
		p := place{k.Table, k.Tos, k.Priority, k.Dst.String()}
		first := !taken[p]
		taken[p] = true
		own := k.Protocol == netstate.RouteProtocol && slices.Contains(m.r.options.Tables, k.Table)
		over := k.LinkIndex == m.from || slices.ContainsFunc(k.MultiPath, func(h *netlink.NexthopInfo) bool { return h.LinkIndex == m.from })
		if first && over && !own && k.Type == unix.RTN_UNICAST {
			out = append(out, k)
		}
	}
	return out, err
}

// move replaces one route; not done: it cannot be had underneath, or is not there any more.
func (m *mover) move(k netlink.Route) (done bool, err error) {
	for _, flags := range []int{0, int(netlink.FLAG_ONLINK)} {
		instead, ok := m.underneath(k, flags)
		if !ok {
			return false, nil
		}
		err = m.r.h.RouteChange(&instead)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH), errors.Is(err, unix.EEXIST):
			return false, nil // somebody has taken it away, or it is there as well
		}
		// Seen from the route's table the next hop may be nobody's neighbour; that it is one is known.
	}
	return false, err
}

// underneath is k with other links, and with flags for the next hops that get one; not ok: one of
// them cannot be had.
func (m *mover) underneath(k netlink.Route, flags int) (instead netlink.Route, ok bool) {
	// What else the kernel lists there are states, which it does not take.
	k.Flags &= int(netlink.FLAG_ONLINK)
	if len(k.MultiPath) == 0 {
		k.LinkIndex = m.lookUp(k.Gw)
		k.Flags |= flags
		return k, k.LinkIndex != 0
	}
	hops := k.MultiPath
	k.MultiPath = nil
	for _, h := range hops {
		hop := *h
		hop.Flags &= int(netlink.FLAG_ONLINK)
		if hop.LinkIndex == m.from {
			hop.LinkIndex = m.lookUp(hop.Gw)
			hop.Flags |= flags
		}
		if hop.LinkIndex == 0 {
			return k, false
		}
		if !slices.ContainsFunc(k.MultiPath, func(o *netlink.NexthopInfo) bool { return o.LinkIndex == hop.LinkIndex && o.Gw.Equal(hop.Gw) }) {
			k.MultiPath = append(k.MultiPath, &hop)
		}
	}
	return k, true
}

// lookUp is the index of the link by which a next hop is a neighbour underneath; 0: it is none.
func (m *mover) lookUp(hop net.IP) int {
	a := addr(hop)
	if !a.IsGlobalUnicast() {
		return 0
	}
	link, known := m.below[a]
	if known {
		return link
	}
	list, err := m.r.h.RouteGetWithOptions(hop, &netlink.RouteGetOptions{Mark: netstate.MarkOuter})
	if err == nil && len(list) > 0 && list[0].Type == unix.RTN_UNICAST && list[0].Gw == nil && list[0].LinkIndex != m.from {
		link = list[0].LinkIndex
	}
	m.below[a] = link
	return link
}
