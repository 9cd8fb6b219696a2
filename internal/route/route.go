// Package route applies links, addresses, routes, routing rules and kernel settings.
//
// It owns what it tags and nothing else: routes with netstate.RouteProtocol in the
// tables of its Options, rules with that protocol and a priority in their range, links
// named "cvt…", of which it makes the xfrm interfaces and the VXLAN links. The second Set of a value
// finds everything in the kernel, also after a restart of the process, and changes
// nothing.
//
// The package knows no objects, no peers and no keys: WireGuard devices and charon's
// ipsec0 are made by others, and it only gives them their MTU, addresses and the up
// flag.
package route

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// linkPrefix starts the name of every link of ours, except netstate.LibIPsecLink.
const linkPrefix = "cvt"

// requestTimeout is how long one netlink request may take.
const requestTimeout = 10 * time.Second

// Options say what belongs to a Route. The zero value is right for gateways and nodes.
type Options struct {
	// Tables are the routing tables whose routes with our protocol number are ours. Nil:
	// netstate.Table, ProxyTable, NodeTable, EncryptionTable, ForwardedTable and those of paths.
	Tables []int
	// MinPriority and MaxPriority enclose the priorities of our rules. Both zero: 19600
	// to 19699.
	MinPriority, MaxPriority int
	// SysctlDir is where the kernel settings are. Empty: "/proc/sys".
	SysctlDir string
	// FollowedLink is the link whose routes open sockets follow at once. Empty: none, an IPv6 socket
	// may go on by the way that it has found, for as long as its connection lives.
	FollowedLink string
}

// Route applies network configuration in one network namespace. Its methods may be
// called from several goroutines.
type Route struct {
	options Options
	h       *netlink.Handle
	events  *nl.NetlinkSocket

	ended atomic.Bool // events is closed

	mu      sync.Mutex // one Set, Observe or Close at a time
	watched bool
	closed  bool
	set     map[string]bool       // names of the links that SetLinks was given
	stale   map[netip.Prefix]bool // destinations that open sockets may reach by an earlier way
}

// New opens the kernel's interface in the network namespace of the calling thread. The
// caller ends it with Close or Detach. Kernel settings (SetSysctls) are not bound to it:
// they are those of the thread that calls SetSysctls.
func New(o Options) (*Route, error) {
	if o.Tables == nil {
		o.Tables = []int{netstate.Table, netstate.ProxyTable, netstate.NodeTable, netstate.EncryptionTable, netstate.ForwardedTable}
		for i := range netstate.MostPaths {
			o.Tables = append(o.Tables, netstate.PathTable+i)
		}
	}
	if o.MinPriority == 0 && o.MaxPriority == 0 {
		o.MinPriority, o.MaxPriority = netstate.RulePriorityOuter, netstate.RulePriorityOuter+99
	}
	if o.SysctlDir == "" {
		o.SysctlDir = "/proc/sys"
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := h.SetSocketTimeout(requestTimeout); err != nil {
		h.Close()
		return nil, fmt.Errorf("netlink time-out: %w", err)
	}
	// Opened here, not in Watch, so that it is in the same namespace; while nobody reads
	// it, the kernel drops what exceeds its small buffer.
	events, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("subscribe to netlink: %w", err)
	}
	return &Route{options: o, h: h, events: events, set: map[string]bool{}, stale: map[netip.Prefix]bool{}}, nil
}

// Detach ends the use of the kernel's interface and leaves everything in place, for the
// next process to find. It ends Watch.
func (r *Route) Detach() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	r.closeEvents()
	r.h.Close()
	return nil
}

func (r *Route) closeEvents() {
	if !r.ended.Swap(true) {
		r.events.Close()
	}
}

// Close removes our rules, routes, xfrm interfaces and VXLAN links, and the addresses of those of our
// links that others made, then does what Detach does. Kernel settings stay as they are:
// others may rely on them by now (ip_forward, say). After Close nothing keeps traffic
// for a tunnel's range from following the host's other routes.
func (r *Route) Close() error {
	err := r.remove()
	return errors.Join(err, r.Detach())
}

func (r *Route) remove() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	var errs failures
	if _, err := r.setRules(nil); err != nil {
		errs.add(err)
	}
	if _, err := r.setRoutes(nil, nil); err != nil {
		errs.add(err)
	}
	links, err := r.links()
	if err != nil {
		errs.add(err)
		return errs.join()
	}
	addresses, err := r.addresses()
	if err != nil {
		errs.add(err)
	}
	for name, l := range links {
		if !ours(name) || name == netstate.LibIPsecLink && !r.set[name] {
			continue
		}
		if made(l) {
			if err := r.h.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				errs.add(fmt.Errorf("delete link %s: %w", name, err))
			}
			continue
		}
		if _, err := r.setAddresses(l, nil, addresses[l.Attrs().Index]); err != nil && !errors.Is(err, unix.ENODEV) {
			errs.add(err)
		}
	}
	return errs.join()
}

// ours tells by its name whether a link belongs to Culvert.
func ours(name string) bool {
	return strings.HasPrefix(name, linkPrefix) || name == netstate.LibIPsecLink
}

// MissingLinkError says that a link of the desired state is not there, although another
// applier or daemon should have made it. The rest was applied.
type MissingLinkError struct {
	Link   string
	Routes int // routes that wait for it; 0 from SetLinks
}

// Error names the link.
func (e *MissingLinkError) Error() string {
	if e.Routes > 0 {
		return fmt.Sprintf("link %s is not there: %d routes wait for it", e.Link, e.Routes)
	}
	return fmt.Sprintf("link %s is not there", e.Link)
}

// Missing splits the error of a Set into the links that were not there and the rest,
// which is nil when nothing else went wrong.
func Missing(err error) (links []string, rest error) {
	if err == nil {
		return nil, nil
	}
	var errs []error
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			l, other := Missing(e)
			links = append(links, l...)
			if other != nil {
				errs = append(errs, other)
			}
		}
		return links, errors.Join(errs...)
	}
	var missing *MissingLinkError
	if errors.As(err, &missing) {
		return []string{missing.Link}, nil
	}
	return nil, err
}

// failures collects errors; of many it keeps the first ones and counts the rest.
type failures struct {
	errs []error
	more int
}

func (f *failures) add(err error) {
	if len(f.errs) == 10 {
		f.more++
		return
	}
	f.errs = append(f.errs, err)
}

func (f *failures) join() error {
	if f.more > 0 {
		return errors.Join(append(f.errs, fmt.Errorf("and %d errors more", f.more))...)
	}
	return errors.Join(f.errs...)
}

// dump repeats a listing that the kernel reports as interrupted by a change.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	var items []T
	var err error
	for range 5 {
		if items, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return items, err
		}
	}
	return items, err
}
