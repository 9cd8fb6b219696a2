package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// ipv6DefaultMetric is what the kernel makes of metric 0 for IPv6.
const ipv6DefaultMetric = 1024

// multipath is the kind under which a route with several next hops is seen; none of ours
// has them, so it equals no desired route.
const multipath = netstate.RouteKind("multipath")

var routeTypes = map[netstate.RouteKind]int{
	netstate.RouteUnicast:     unix.RTN_UNICAST,
	netstate.RouteUnreachable: unix.RTN_UNREACHABLE,
	netstate.RouteLocal:       unix.RTN_LOCAL,
	netstate.RouteThrow:       unix.RTN_THROW,
}

// routeKey is what tells routes apart in the kernel. A second route with the same key
// would be an alternative that is never looked at.
type routeKey struct {
	table       int
	destination netip.Prefix
	metric      int
}

// SetRoutes makes our routes and rules exactly those that are wanted, and returns how
// many changes it made. A route that stays under the same table, destination and metric
// is replaced in one step; unreachable routes come first and go last, and rules come
// after the routes that they lead to, so that at no time a range that has a route before
// and after follows another one in between. Routes through a link that is not there are
// left out and reported as one *MissingLinkError per link. A foreign route in the place of
// one of ours is an error and stays. Open sockets follow new routes over Options.FollowedLink
// at once, and all of them when a rule changes.
func (r *Route) SetRoutes(ctx context.Context, routes []netstate.Route, rules []netstate.Rule) (changed int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	links, err := r.links()
	if err != nil {
		return 0, err
	}
	n, routesErr := r.setRoutes(routes, links)
	changed += n
	n, rulesErr := r.setRules(rules)
	changed += n
	if n > 0 { // Linux does it by itself since 2024 (6.9, and stable releases from 4.19)
		for _, w := range routes {
			r.outdate(w)
		}
	}
	return changed, errors.Join(routesErr, rulesErr, r.reconsider(ctx))
}

func (r *Route) setRoutes(routes []netstate.Route, links map[string]netlink.Link) (changed int, err error) {
	var errs failures
	want := r.wanted(routes, links, &errs)
	have, err := r.routes(links)
	if err != nil {
		return 0, err
	}
	byKey := make(map[routeKey][]netstate.Route, len(have))
	for _, h := range have {
		byKey[key(h)] = append(byKey[key(h)], h)
	}
	keep := make(map[routeKey]netstate.Route, len(want))
	for _, w := range want {
		old := byKey[key(w)]
		if i := slices.IndexFunc(old, func(h netstate.Route) bool { return same(h, w) }); i >= 0 {
			keep[key(w)] = old[i]
			continue
		}
		if err := r.writeRoute(w, links, len(old) > 0); err != nil {
			errs.add(err)
			// What stands there still leads somewhere that was wanted once; the error brings
			// another attempt.
			if len(old) > 0 {
				keep[key(w)] = old[0]
			}
			continue
		}
		changed++
		r.outdate(w)
		// Replacing takes the place of the first.
		keep[key(w)] = w
		byKey[key(w)] = old[min(1, len(old)):]
	}
	n := r.deleteSurplus(byKey, keep, links, &errs)
	return changed + n, errs.join()
}

// deleteSurplus deletes all routes in have except one equal to keep per key; the
// fail-closed kinds go last.
func (r *Route) deleteSurplus(have map[routeKey][]netstate.Route, keep map[routeKey]netstate.Route, links map[string]netlink.Link, errs *failures) (changed int) {
	var surplus []netstate.Route
	for k, list := range have {
		kept := false
		for _, h := range list {
			if keep[k] == h && !kept {
				kept = true
				continue
			}
			surplus = append(surplus, h)
		}
	}
	slices.SortFunc(surplus, func(a, b netstate.Route) int { return -compareForAdding(a, b) })
	for _, s := range surplus {
		if err := r.deleteRoute(s, links); err != nil {
			errs.add(fmt.Errorf("delete %s: %w", describe(s), err))
			continue
		}
		changed++
	}
	return changed
}

// compareForAdding orders unreachable before throw before the rest.
func compareForAdding(a, b netstate.Route) int {
	rank := func(x netstate.Route) int {
		return slices.Index([]netstate.RouteKind{netstate.RouteUnreachable, netstate.RouteThrow, x.Kind}, x.Kind)
	}
	return rank(a) - rank(b)
}

// wanted brings the desired routes into the kernel's form and into the order in which
// they are added, without those that cannot be: their errors go to errs.
func (r *Route) wanted(routes []netstate.Route, links map[string]netlink.Link, errs *failures) []netstate.Route {
	out := make([]netstate.Route, 0, len(routes))
	seen := make(map[routeKey]bool, len(routes))
	missing := map[string]int{}
	for _, w := range routes {
		n, err := r.normal(w)
		switch {
		case err != nil:
			errs.add(err)
		case seen[key(n)]:
			errs.add(fmt.Errorf("%s: wanted twice with the same metric", describe(w)))
		case n.Link != "" && links[n.Link] == nil:
			missing[n.Link]++
		default:
			seen[key(n)] = true
			out = append(out, n)
		}
	}
	for name, n := range missing {
		errs.add(&MissingLinkError{Link: name, Routes: n})
	}
	slices.SortStableFunc(out, compareForAdding)
	return out
}

// normal is w as the kernel would list it.
func (r *Route) normal(w netstate.Route) (netstate.Route, error) {
	n := w
	switch {
	case !w.Destination.IsValid():
		return n, fmt.Errorf("%s: no destination", describe(w))
	case routeTypes[w.Kind] == 0:
		return n, fmt.Errorf("%s: unknown kind of route", describe(w))
	case !slices.Contains(r.options.Tables, w.Table):
		return n, fmt.Errorf("%s: table %d is not one of ours", describe(w), w.Table)
	}
	n.Destination = w.Destination.Masked()
	if n.Destination.Addr().Is6() && n.Metric == 0 {
		n.Metric = ipv6DefaultMetric
	}
	switch w.Kind {
	case netstate.RouteUnreachable, netstate.RouteThrow:
		n.Link, n.Via, n.Source, n.OnLink = "", netip.Addr{}, netip.Addr{}, false
	case netstate.RouteLocal:
		if n.Link == "" {
			n.Link = "lo"
		}
	}
	return n, nil
}

// same tells whether the kernel's route h is what w asks for.
func same(h, w netstate.Route) bool {
	if w.Link == "" {
		h.Link = "" // the kernel found the link by the next hop
	}
	return h == w
}

func key(x netstate.Route) routeKey { return routeKey{x.Table, x.Destination, x.Metric} }

// writeRoute adds a route, or takes the place of the one of ours with the same key.
func (r *Route) writeRoute(w netstate.Route, links map[string]netlink.Link, replace bool) error {
	write := r.h.RouteAdd
	if replace {
		write = r.h.RouteReplace
	}
	err := write(kernelRoute(w, links))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%s: a route that is not ours stands in its place: delete it (ip route delete %s metric %d table %d)", describe(w), w.Destination, w.Metric, w.Table)
	case errors.Is(err, unix.ENODEV):
		return &MissingLinkError{Link: w.Link, Routes: 1}
	case errors.Is(err, unix.ENETDOWN):
		return fmt.Errorf("%s: the link is down: %w", describe(w), err)
	}
	return fmt.Errorf("add %s: %w", describe(w), err)
}

func (r *Route) deleteRoute(h netstate.Route, links map[string]netlink.Link) error {
	k := kernelRoute(h, links)
	k.Scope = netlink.SCOPE_NOWHERE // any
	if h.Kind == multipath {
		k.Type = 0
	}
	if err := r.h.RouteDel(k); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// kernelRoute is w as netlink takes it; links may be nil for deletion.
func kernelRoute(w netstate.Route, links map[string]netlink.Link) *netlink.Route {
	k := &netlink.Route{
		Dst:      ipNet(w.Destination),
		Table:    w.Table,
		Priority: w.Metric,
		Protocol: netstate.RouteProtocol,
		Type:     routeTypes[w.Kind],
	}
	if l := links[w.Link]; l != nil {
		k.LinkIndex = l.Attrs().Index
	}
	if w.Via.IsValid() {
		k.Gw = w.Via.AsSlice()
	}
	if w.Source.IsValid() {
		k.Src = w.Source.AsSlice()
	}
	if w.OnLink {
		k.Flags = int(netlink.FLAG_ONLINK)
	}
	switch {
	case w.Kind == netstate.RouteLocal:
		k.Scope = netlink.SCOPE_HOST
	case w.Kind == netstate.RouteUnicast && !w.Via.IsValid():
		k.Scope = netlink.SCOPE_LINK
	}
	return k
}

// routes lists our routes in the kernel. Links may be nil: then names stay empty.
func (r *Route) routes(links map[string]netlink.Link) ([]netstate.Route, error) {
	names := make(map[int]string, len(links))
	for name, l := range links {
		names[l.Attrs().Index] = name
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: netstate.RouteProtocol}
	var out []netstate.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump(func() ([]netlink.Route, error) {
			return r.h.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, k := range list {
			if slices.Contains(r.options.Tables, k.Table) {
				out = append(out, observedRoute(k, names))
			}
		}
	}
	return out, nil
}

func observedRoute(k netlink.Route, names map[int]string) netstate.Route {
	o := netstate.Route{
		Destination: prefix(k.Dst),
		Kind:        netstate.RouteKind(fmt.Sprintf("type-%d", k.Type)),
		Link:        names[k.LinkIndex],
		Via:         addr(k.Gw),
		Source:      addr(k.Src),
		OnLink:      k.Flags&int(netlink.FLAG_ONLINK) != 0,
		Metric:      k.Priority,
		Table:       k.Table,
	}
	for kind, t := range routeTypes {
		if t == k.Type {
			o.Kind = kind
		}
	}
	if len(k.MultiPath) > 0 {
		o.Kind = multipath
	}
	if o.Kind == netstate.RouteUnreachable || o.Kind == netstate.RouteThrow {
		o.Link = "" // IPv6 lists them at the loopback link
	}
	return o
}

// describe names a route in errors.
func describe(x netstate.Route) string {
	s := fmt.Sprintf("route %s %s", x.Kind, x.Destination)
	if x.Link != "" {
		s += " dev " + x.Link
	}
	return fmt.Sprintf("%s metric %d table %d", s, x.Metric, x.Table)
}
