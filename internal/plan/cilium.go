package plan

import (
	"net/netip"

	"github.com/culvert-vpn/culvert/internal/model"
)

// CiliumHost is the link of a node by which its own packets go Cilium's way.
const CiliumHost = "cilium_host"

// BehindGateway are the ranges that Cilium is to be told of as lying behind a gateway's
// active pod: those of its sites and devices with nodeLink: CiliumEndpoint, else none.
func BehindGateway(gw *model.Gateway) []netip.Prefix {
	if gw.Masquerade || gw.NodeLink != linkCiliumEndpoint {
		return nil
	}
	var out []netip.Prefix
	for _, s := range gw.Sites {
		out = append(out, s.CIDRs...)
	}
	return append(out, gw.DeviceRanges...)
}
