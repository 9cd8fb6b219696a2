package route_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// A link without any address is no uplink for Cilium, which would delete its neighbours.
func TestVXLANHasNoAddress(t *testing.T) {
	h := host(t)
	r := open(t, h)
	mac := netstate.MAC{2, 0, 0, 0, 0, 1}
	link := netstate.Link{Name: netstate.NodeLinkName, Kind: netstate.LinkVXLAN, MTU: 1400, VXLAN: &netstate.VXLAN{
		ID: netstate.NodeLinkID, Port: netstate.NodeLinkPort, Family: netstate.IPv4, MAC: mac,
		Peers: []netstate.VXLANPeer{{Outer: netip.MustParseAddr("192.0.2.2"), MAC: netstate.MAC{2, 0, 0, 0, 0, 2},
			Via: []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")}}},
	}}
	if _, err := r.SetLinks(t.Context(), []netstate.Link{link}); err != nil {
		t.Fatal(err)
	}
	if out := h.Run("ip", "-br", "address", "show", "dev", link.Name); !strings.HasPrefix(out, link.Name) || len(strings.Fields(out)) != 2 {
		t.Errorf("its addresses are %q, want none", out)
	}
	for _, family := range []string{"-4", "-6"} {
		if out := h.Run("ip", family, "neighbour", "show", "dev", link.Name); !strings.Contains(out, "02:00:00:00:00:02 PERMANENT") {
			t.Errorf("ip %s neighbour: %q", family, out)
		}
	}
	if changed, err := r.SetLinks(t.Context(), []netstate.Link{link}); changed != 0 || err != nil {
		t.Errorf("a second time: %d changes, %v", changed, err)
	}
}
