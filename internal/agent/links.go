package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/model"
)

// linkLook is what is known of a node's links.
type linkLook struct {
	uplinks []string // with one of the node's addresses or a default route
	toPods  []string // with a route to the node's own pods
	routes  []linkRoute
}

// linkRoute is a route of the main table, other than a default one.
type linkRoute struct {
	to   netip.Prefix
	link string
}

// tunnelKinds are links that lead to other nodes, whatever addresses they have: an overlay's may be
// in the node's own pod range (flannel's are).
var tunnelKinds = []string{"vxlan", "geneve", "ipip", "ip6tnl", "sit", "gre", "gretap", "ip6gre", "ip6gretap", "wireguard", "tuntap"}

func lookAtLinks(n model.Node) (linkLook, error) {
	var out linkLook
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return out, fmt.Errorf("list links: %w", err)
	}
	names := map[int]string{}
	tunnels := map[string]bool{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
		tunnels[l.Attrs().Name] = slices.Contains(tunnelKinds, l.Type())
	}
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return out, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && slices.Contains(n.Addresses, ip.Unmap()) {
			out.uplinks = append(out.uplinks, names[a.LinkIndex])
		}
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_MAIN}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			out.route(r, names[r.LinkIndex])
		}
	}
	for _, r := range out.routes {
		inside := slices.ContainsFunc(n.PodCIDRs, func(c netip.Prefix) bool { return c.Bits() <= r.to.Bits() && c.Overlaps(r.to) })
		if inside && !tunnels[r.link] && !slices.Contains(out.uplinks, r.link) && !slices.Contains(out.toPods, r.link) && !strings.HasPrefix(r.link, "cvt") {
			out.toPods = append(out.toPods, r.link)
		}
	}
	return out, nil
}

func (l *linkLook) route(r netlink.Route, link string) {
	to, ok := destination(r)
	if !ok || to.Bits() == 0 {
		l.uplinks = append(l.uplinks, link)
		return
	}
	if link != "" && !r.Gw.IsGlobalUnicast() && !to.Addr().IsLinkLocalUnicast() && !to.Addr().IsMulticast() {
		l.routes = append(l.routes, linkRoute{to, link})
	}
}

func destination(r netlink.Route) (netip.Prefix, bool) {
	if r.Dst == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(r.Dst.IP)
	bits, _ := r.Dst.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits), ok
}
