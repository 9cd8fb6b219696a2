package plan

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// A pod that stands by has no tunnels, leads nothing into one, and lets nothing for one leave;
// its services and its link to the nodes are those of a pod that works.
func TestStandby(t *testing.T) {
	gw := edge()
	gw.Sites = []*model.Site{ipsecSite("berlin", "10.1.0.0/16")}
	gw.NodeLink = linkEncapsulated
	full := Gateway(gw, Facts{
		PodIPs: []netip.Addr{netip.MustParseAddr("10.244.1.5")}, NodeName: "n1",
		Nodes: []model.Node{{Name: "n1", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, PodCIDRs: prefixes("10.244.1.0/24")}},
	}).State
	before := full.String()
	s := Standby(full)
	if full.String() != before {
		t.Error("the state itself was changed")
	}
	if len(full.WireGuard) == 0 || len(full.IPsec.Connections) == 0 {
		t.Fatal("there is nothing to leave out")
	}
	if len(s.WireGuard) > 0 || len(s.IPsec.Connections) > 0 {
		t.Error("it has tunnels")
	}
	if len(s.Links) != 1 || s.Links[0].Kind != netstate.LinkVXLAN {
		t.Errorf("links %+v, want the node link alone", s.Links)
	}
	unreachable := 0
	for _, r := range s.Routes {
		if r.Link != "" && r.Link != netstate.NodeLinkName {
			t.Errorf("a route into %s", r.Link)
		}
		if r.Kind == netstate.RouteUnreachable {
			unreachable++
		}
	}
	wanted := len(gw.DeviceRanges) + len(gw.Sites)
	if unreachable < wanted {
		t.Errorf("%d ranges are unreachable, want %d", unreachable, wanted)
	}
	if !slices.Equal(s.Services.Sources, full.Services.Sources) || len(s.Firewall.Tunnels) != len(full.Firewall.Tunnels) {
		t.Error("services or firewall are not those of a pod that works")
	}
}
