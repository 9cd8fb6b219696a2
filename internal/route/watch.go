package route

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// watchDelay is how long Watch gathers changes before it tells of them.
const watchDelay = 50 * time.Millisecond

// Watch tells, without more detail, that something of interest has changed: one of our
// links, its addresses, a route in our tables, one of our rules, a default route, or a
// link that a default route leaves by; or that others have put a route with a next hop onto one of
// our links. Changes within 50 ms are told of once, and those
// that nobody has received yet too. Some changes that this Route makes itself count as
// well: a Set that finds nothing to do follows them. It may be called once; the channel
// is closed when ctx ends or the Route is closed.
func (r *Route) Watch(ctx context.Context) (<-chan struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.watched {
		return nil, errors.New("watch the kernel's routes: closed, or watched already")
	}
	w := &watch{r: r, own: map[int]bool{}, underlay: map[int]bool{}}
	links, err := r.links()
	if err != nil {
		return nil, err
	}
	for name, l := range links {
		w.own[l.Attrs().Index] = ours(name)
	}
	if err := w.findUnderlay(); err != nil {
		return nil, err
	}
	r.watched = true

	changes := make(chan struct{}, 1)
	context.AfterFunc(ctx, r.closeEvents) // ends receive
	go w.receive(changes)
	out := make(chan struct{}, 1)
	go tell(ctx, changes, out)
	return out, nil
}

// tell passes a change on after the delay, dropping those that come in between.
func tell(ctx context.Context, changes <-chan struct{}, out chan<- struct{}) {
	defer close(out)
	for range changes {
		select {
		case <-time.After(watchDelay):
		case <-ctx.Done():
			return
		}
		select {
		case <-changes:
		default:
		}
		select {
		case out <- struct{}{}:
		default:
		}
	}
}

// watch tells apart what is of interest. It is used by one goroutine.
type watch struct {
	r        *Route
	own      map[int]bool // by link index: is it ours?
	underlay map[int]bool // by link index: does a default route leave by it?
}

// receive signals changes until the socket is closed.
func (w *watch) receive(changes chan<- struct{}) {
	defer close(changes)
	for {
		messages, from, err := w.r.events.Receive()
		interesting := false
		switch {
		case w.r.ended.Load():
			return
		case errors.Is(err, unix.ENOBUFS):
			interesting = true // some were lost
		case err != nil:
			// Nothing is known to cause this; the pause keeps it from becoming a busy loop.
			time.Sleep(watchDelay)
			interesting = true
		case from.Pid != nl.PidKernel:
			continue
		}
		for _, m := range messages {
			interesting = w.interesting(m) || interesting
		}
		if interesting {
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}
}

func (w *watch) interesting(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return w.link(m)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < unix.SizeofIfAddrmsg {
			return false
		}
		index := int(nl.DeserializeIfAddrmsg(m.Data).Index)
		return w.own[index] || w.underlay[index]
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return w.route(m)
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return w.rule(m)
	}
	return false
}

func (w *watch) link(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofIfInfomsg {
		return false
	}
	index := int(nl.DeserializeIfInfomsg(m.Data).Index)
	attrs, err := nl.ParseRouteAttr(m.Data[unix.SizeofIfInfomsg:])
	if err != nil {
		return false
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.IFLA_IFNAME && ours(nl.BytesToString(a.Value)) {
			w.own[index] = true
		}
	}
	own := w.own[index]
	if m.Header.Type == unix.RTM_DELLINK {
		delete(w.own, index)
	}
	return own || w.underlay[index]
}

func (w *watch) route(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofRtMsg {
		return false
	}
	rt := nl.DeserializeRtMsg(m.Data)
	table, link, hop := int(rt.Table), 0, false
	if attrs, err := nl.ParseRouteAttr(m.Data[unix.SizeofRtMsg:]); err == nil {
		table, link = attribute(attrs, unix.RTA_TABLE, table), attribute(attrs, unix.RTA_OIF, 0)
		hop = slices.ContainsFunc(attrs, func(a syscall.NetlinkRouteAttr) bool { return a.Attr.Type == unix.RTA_GATEWAY })
	}
	if rt.Dst_len == 0 && table == unix.RT_TABLE_MAIN {
		w.r.mu.Lock()
		defer w.r.mu.Unlock()
		if !w.r.closed {
			_ = w.findUnderlay() // an error leaves the links known so far
		}
		return true
	}
	added := m.Header.Type == unix.RTM_NEWROUTE
	if foreign := added && rt.Protocol != netstate.RouteProtocol && hop && w.own[link]; foreign {
		return true
	}
	return slices.Contains(w.r.options.Tables, table) && !(added && rt.Protocol == netstate.RouteProtocol)
}

func (w *watch) rule(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofRtMsg {
		return false
	}
	attrs, err := nl.ParseRouteAttr(m.Data[unix.SizeofRtMsg:])
	if err != nil || !w.r.ownPriority(attribute(attrs, nl.FRA_PRIORITY, 0)) {
		return false
	}
	protocol := 0
	for _, a := range attrs {
		if a.Attr.Type == nl.FRA_PROTOCOL && len(a.Value) > 0 {
			protocol = int(a.Value[0])
		}
	}
	return m.Header.Type == unix.RTM_DELRULE || protocol != netstate.RouteProtocol
}

// attribute is the value of a 32-bit attribute, or otherwise when it is not there.
func attribute(attrs []syscall.NetlinkRouteAttr, kind uint16, otherwise int) int {
	for _, a := range attrs {
		if a.Attr.Type == kind && len(a.Value) >= 4 {
			return int(nl.NativeEndian().Uint32(a.Value))
		}
	}
	return otherwise
}

// findUnderlay is called with r.mu held.
func (w *watch) findUnderlay() error {
	list, err := w.r.defaultRoutes()
	if err != nil {
		return fmt.Errorf("find the underlay: %w", err)
	}
	clear(w.underlay)
	for _, k := range list {
		w.underlay[k.LinkIndex] = true
	}
	return nil
}
