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

// reconsider has open IPv6 sockets look up again how they reach the destinations in r.stale. A socket
// keeps the route that it found until something changes next to that route; a new rule or
// a route in another table is not next to it, and a long-lived connection would go on by
// the old way (Linux 6.18; IPv4 forgets everything at any change). So a route is added beside
// each destination in the main table and taken away again; it leads nowhere and is for an
// address that nobody has. What could not be done stays stale, for the next SetRoutes.
func (r *Route) reconsider(ctx context.Context) error {
	var errs failures
	for d := range r.stale {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.lookUpAgain(d); err != nil {
			errs.add(fmt.Errorf("have sockets look up %s again: %w", d, err))
			continue
		}
		delete(r.stale, d)
	}
	return errs.join()
}

func (r *Route) lookUpAgain(d netip.Prefix) error {
	k := &netlink.Route{
		Dst: ipNet(beside(d)), Table: unix.RT_TABLE_MAIN, Type: unix.RTN_THROW, Protocol: netstate.RouteProtocol, Priority: ipv6DefaultMetric,
	}
	err := r.h.RouteAdd(k)
	if errors.Is(err, unix.EEXIST) {
		if err := r.h.RouteDel(k); err != nil {
			return passOver(err, unix.ESRCH) // not ours: somebody has that address after all
		}
		err = r.h.RouteAdd(k) // a process was killed before it took it away
	}
	if err != nil {
		return err
	}
	return passOver(r.h.RouteDel(k), unix.ESRCH)
}

func passOver(err error, harmless unix.Errno) error {
	if errors.Is(err, harmless) {
		return nil
	}
	return err
}

// outdate notes that sockets do not know this route; those over other links may.
func (r *Route) outdate(x netstate.Route) {
	if r.options.FollowedLink != "" && x.Link == r.options.FollowedLink && x.Destination.Addr().Is6() {
		r.stale[x.Destination] = true
	}
}

// beside is an address in or next to a prefix that is not in use: the first one of a range
// (the anycast address of its routers, RFC 4291, section 2.6.1), the neighbour of an address.
func beside(d netip.Prefix) netip.Prefix {
	b := d.Masked().Addr().As16()
	if d.IsSingleIP() {
		b[15] ^= 1
		b[8] ^= 0x40 // in the same subnet, and far from addresses that people give
	}
	return netip.PrefixFrom(netip.AddrFrom16(b), 128)
}
