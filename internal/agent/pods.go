package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/route"
)

// pods knows the network namespaces of the gateway pods on this node: the ones of their
// processes that have the pod's address. It needs the host's process identifiers.
type pods struct {
	route *route.Route
	proc  string
	found map[netip.Addr]podNamespace // by a pod's address
}

// podNamespace is the network namespace of a pod, held by one of its processes.
type podNamespace struct {
	file  string // /proc/PID/ns/net
	stat  os.FileInfo
	index int        // of the node's end of the pod's link; 0: it has none
	local netip.Addr // the pod's link-local address at its end; zero: it has none
}

func newPods(r *route.Route) *pods {
	return &pods{route: r, proc: "/proc", found: map[netip.Addr]podNamespace{}}
}

// find looks for the namespaces of pods that are not known yet, and forgets the others.
func (p *pods) find(local []plan.GatewayPod) {
	missing := map[netip.Addr]bool{}
	keep := map[netip.Addr]podNamespace{}
	for _, pod := range local {
		for _, ip := range pod.PodIPs {
			if ns, ok := p.found[ip]; ok && ns.valid() {
				keep[ip] = ns
			} else {
				missing[ip] = true
			}
		}
	}
	p.found = keep
	if len(missing) > 0 {
		p.search(missing)
	}
}

// valid reports whether the process still is in the namespace that was found.
func (n podNamespace) valid() bool {
	st, err := os.Stat(n.file)
	return err == nil && os.SameFile(st, n.stat)
}

// search looks at every network namespace but the node's own.
func (p *pods) search(missing map[netip.Addr]bool) {
	files, _ := filepath.Glob(filepath.Join(p.proc, "[0-9]*", "ns", "net"))
	var seen []os.FileInfo
	if own, err := os.Stat(filepath.Join(p.proc, "self", "ns", "net")); err == nil {
		seen = append(seen, own)
	}
	for _, file := range files {
		st, err := os.Stat(file)
		if err != nil || slices.ContainsFunc(seen, func(o os.FileInfo) bool { return os.SameFile(o, st) }) {
			continue
		}
		seen = append(seen, st)
		for ip, end := range addressesIn(file) {
			if missing[ip] {
				p.found[ip] = podNamespace{file: file, stat: st, index: end.index, local: end.local}
			}
		}
	}
}

// linkEnd is a link in a namespace: the index of its other end, and its link-local address.
type linkEnd struct {
	index int
	local netip.Addr
}

// addressesIn lists the addresses in a namespace, each with its link; none when it is gone by now.
func addressesIn(file string) map[netip.Addr]linkEnd {
	ns, err := netns.GetFromPath(file)
	if err != nil {
		return nil
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil
	}
	out := map[netip.Addr]linkEnd{}
	for _, l := range links {
		list, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil || l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		end := linkEnd{index: l.Attrs().ParentIndex}
		for _, a := range list {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Is6() && ip.IsLinkLocalUnicast() {
				end.local = ip
			}
		}
		for _, a := range list {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				out[ip.Unmap()] = end
			}
		}
	}
	return out
}

// link is the name of the node's link that leads to a pod's address; empty when the pod
// was not found or shares a link with others.
func (p *pods) link(ip netip.Addr) string {
	ns, ok := p.found[ip]
	if !ok || ns.index == 0 {
		return ""
	}
	l, err := netlink.LinkByIndex(ns.index)
	if err != nil || l.Attrs().MasterIndex != 0 { // a bridge's port: the bridge leads there
		return ""
	}
	return l.Attrs().Name
}

// set writes kernel settings in the namespaces of pods.
func (p *pods) set(ctx context.Context, local []plan.GatewayPod, want []netstate.Sysctl) (changed int, err error) {
	var errs []error
	for _, pod := range local {
		i := slices.IndexFunc(pod.PodIPs, func(ip netip.Addr) bool { _, ok := p.found[ip]; return ok })
		if i < 0 {
			errs = append(errs, fmt.Errorf("pod %s: no process with the address %v is on this node: the agent needs hostPID", pod.Name, pod.PodIPs))
			continue
		}
		n, err := p.setIn(ctx, p.found[pod.PodIPs[i]], want)
		changed += n
		if err != nil {
			errs = append(errs, fmt.Errorf("pod %s: %w", pod.Name, err))
		}
	}
	return changed, errors.Join(errs...)
}

// setIn does so on a thread of its own inside the namespace.
func (p *pods) setIn(ctx context.Context, n podNamespace, want []netstate.Sysctl) (changed int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		var ns netns.NsHandle
		if ns, err = netns.GetFromPath(n.file); err != nil {
			return
		}
		defer ns.Close()
		if err = netns.Set(ns); err == nil {
			changed, err = p.route.SetSysctls(ctx, want)
		}
	}()
	<-done
	return changed, err
}
