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

// Reconsider has open IPv6 sockets look up again how they reach these destinations. A socket
// keeps the route that it found until something changes next to that route; a new rule or
// a route in another table is not next to it, and a long-lived connection would go on by
// the old way (Linux 6.18; IPv4 forgets everything at any change). So a route is added beside
// each destination in the main table and taken away again; it leads nowhere and is for an
// address that nobody has. IPv4 destinations are passed over.
func (r *Route) Reconsider(ctx context.Context, destinations []netip.Prefix) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	var errs failures
	for _, d := range destinations {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !d.Addr().Is6() {
			continue
		}
		k := &netlink.Route{
			Dst: ipNet(beside(d)), Table: unix.RT_TABLE_MAIN, Type: unix.RTN_THROW, Protocol: netstate.RouteProtocol, Priority: ipv6DefaultMetric,
		}
		if err := r.h.RouteAdd(k); err != nil {
			if !errors.Is(err, unix.EEXIST) {
				errs.add(fmt.Errorf("have sockets look up %s again: %w", d, err))
			}
			continue
		}
		if err := r.h.RouteDel(k); err != nil && !errors.Is(err, unix.ESRCH) {
			errs.add(fmt.Errorf("have sockets look up %s again: %w", d, err))
		}
	}
	return errs.join()
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
