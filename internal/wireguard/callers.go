package wireguard

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A peer that has a session sends data, which a gateway that was restarted cannot read and
// WireGuard passes over in silence; a stock peer begins anew after 15 s. The gateway's own
// handshakes reach it sooner, but only by the way that its packets come: where a NAT or a load
// balancer lies between, that is a flow of the peer's making, whose port is not the one
// that the peer was last seen at. Connection tracking, where it is in use, knows these
// flows.

// callersMax is how many flows are tried for a peer: among more, its own is found too seldom.
const callersMax = 8

// callers are the flows that came to a UDP port, by address.
type callers struct {
	ns    *namespace
	flows map[netip.Addr][]netip.AddrPort
	next  time.Time // not to be asked before
}

// from returns the flows that may be a peer's which was at home, and are nobody's else: those of
// home's address, then those of private ones. A cluster hides its callers behind another
// address of its own when the gateway is on another node; other addresses are left alone, since
// anybody may send under any, and would have all handshakes sent there.
func (c *callers) from(home netip.AddrPort, taken map[netip.AddrPort]bool) []netip.AddrPort {
	var out []netip.AddrPort
	add := func(list []netip.AddrPort) {
		for _, f := range list {
			if f != home && !taken[f] && len(out) < callersMax {
				out = append(out, f)
			}
		}
	}
	add(c.flows[home.Addr()])
	for _, a := range slices.SortedFunc(maps.Keys(c.flows), netip.Addr.Compare) {
		if a.IsPrivate() && a != home.Addr() && a.Is4() == home.Addr().Is4() {
			add(c.flows[a])
		}
	}
	return out
}

// look reads connection tracking again, once a second at most. Without connection tracking
// there are no flows.
func (c *callers) look(port uint16) {
	began := time.Now()
	if began.Before(c.next) {
		return
	}
	c.flows = map[netip.Addr][]netip.AddrPort{}
	_ = c.ns.do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer h.Close()
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			list, err := h.ConntrackTableList(netlink.ConntrackTable, family)
			if err != nil {
				return err
			}
			c.add(list, port)
		}
		return nil
	})
	// Many flows take a while to read: spend a tenth of the time on it at most.
	c.next = began.Add(max(time.Second, 10*time.Since(began)))
}

func (c *callers) add(list []*netlink.ConntrackFlow, port uint16) {
	for _, f := range list {
		if f.Forward.Protocol != unix.IPPROTO_UDP || f.Forward.DstPort != port {
			continue
		}
		a, ok := netip.AddrFromSlice(f.Forward.SrcIP)
		if !ok {
			continue
		}
		a = a.Unmap()
		c.flows[a] = append(c.flows[a], netip.AddrPortFrom(a, f.Forward.SrcPort))
	}
	for a := range c.flows {
		slices.SortFunc(c.flows[a], netip.AddrPort.Compare)
	}
}
