package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Underlay is how the host's own, encapsulated packets reach some remote address.
type Underlay struct {
	Link    string     // the link that they leave by
	LinkMTU int        // its MTU in bytes
	MTU     int        // the path's in bytes, as far as it is known: of the route, of path MTU discovery, else LinkMTU
	Source  netip.Addr // the source address that they get; zero: unknown
	Gateway netip.Addr // the next hop; zero: on-link
}

// Underlay asks the kernel for the path of packets with netstate.MarkOuter to a remote
// address. With the zero address it is the path of the default route in the main table,
// IPv4 before IPv6. No route is an error.
func (r *Route) Underlay(ctx context.Context, remote netip.Addr) (Underlay, error) {
	if err := ctx.Err(); err != nil {
		return Underlay{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !remote.IsValid() {
		return r.defaultUnderlay()
	}
	list, err := r.h.RouteGetWithOptions(remote.Unmap().AsSlice(), &netlink.RouteGetOptions{Mark: netstate.MarkOuter})
	if err != nil {
		return Underlay{}, fmt.Errorf("find the route to %s: %w", remote, err)
	}
	if len(list) == 0 {
		return Underlay{}, fmt.Errorf("find the route to %s: none", remote)
	}
	return r.underlayOf(list[0])
}

func (r *Route) defaultUnderlay() (Underlay, error) {
	list, err := r.defaultRoutes()
	if err != nil {
		return Underlay{}, err
	}
	if len(list) == 0 {
		return Underlay{}, errors.New("this host has no default route")
	}
	best := list[0]
	for _, k := range list[1:] {
		if k.Family == best.Family && k.Priority < best.Priority {
			best = k
		}
	}
	return r.underlayOf(best)
}

// defaultRoutes lists the usable default routes of the main table, IPv4 first; of
// several next hops, the first.
func (r *Route) defaultRoutes() ([]netlink.Route, error) {
	var out []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump(func() ([]netlink.Route, error) {
			return r.h.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_DST)
		})
		if err != nil {
			return nil, fmt.Errorf("list default routes: %w", err)
		}
		for _, k := range list {
			if len(k.MultiPath) > 0 {
				k.LinkIndex, k.Gw = k.MultiPath[0].LinkIndex, k.MultiPath[0].Gw
			}
			if k.Type == unix.RTN_UNICAST && k.LinkIndex != 0 {
				out = append(out, k)
			}
		}
	}
	return out, nil
}

func (r *Route) underlayOf(k netlink.Route) (Underlay, error) {
	l, err := r.h.LinkByIndex(k.LinkIndex)
	if err != nil {
		return Underlay{}, fmt.Errorf("find link %d: %w", k.LinkIndex, err)
	}
	u := Underlay{Link: l.Attrs().Name, LinkMTU: l.Attrs().MTU, MTU: k.MTU, Source: addr(k.Src), Gateway: addr(k.Gw)}
	if u.MTU == 0 || u.MTU > u.LinkMTU {
		u.MTU = u.LinkMTU
	}
	return u, nil
}
