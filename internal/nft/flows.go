package nft

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// endFlows deletes the connection tracking entries of the UDP flows that a plan ends:
// without that, a client that never stops sending would stay with an endpoint that is
// gone. The table is right already, so a failure is logged and not returned.
func (n *NFT) endFlows(p *portPlan) {
	filters := map[netlink.InetFamily]flowFilter{}
	for _, f := range p.ended {
		family := netlink.InetFamily(unix.AF_INET)
		if f.port.addr.Is6() {
			family = unix.AF_INET6
		}
		if !f.endpoint.IsValid() {
			f.endpoint = netip.AddrPortFrom(f.port.addr, f.port.port)
		}
		if filters[family] == nil {
			filters[family] = flowFilter{}
		}
		filters[family][f] = true
	}
	for family, filter := range filters {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, filter); err != nil {
			n.log.Warn("cannot end UDP flows to endpoints that are gone", "cause", err)
		}
	}
}

// flowFilter matches the tracked connections of some flows. A flow whose endpoint is the
// service itself is one that was not translated.
type flowFilter map[flow]bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f flowFilter) MatchConntrackFlow(c *netlink.ConntrackFlow) bool {
	dst, ok := netip.AddrFromSlice(c.Forward.DstIP)
	src, ok2 := netip.AddrFromSlice(c.Reverse.SrcIP)
	return ok && ok2 && f[flow{
		port:     portKey{dst.Unmap(), netstate.Protocol(c.Forward.Protocol), c.Forward.DstPort},
		endpoint: netip.AddrPortFrom(src.Unmap(), c.Reverse.SrcPort),
	}]
}
