package agent

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// Only the active pod of a gateway that Cilium carries, on this node, and with something behind it.
func TestWhoseSourcesAreLifted(t *testing.T) {
	id := model.ID{Namespace: "vpn", Name: "hq"}
	ranges := []netip.Prefix{netip.MustParsePrefix("10.99.0.0/24")}
	pod := func(name, on string, active bool) plan.GatewayPod {
		return plan.GatewayPod{Name: name, Node: on, Active: active, PodIPs: []netip.Addr{netip.MustParseAddr("10.244.1.5")}}
	}
	for name, c := range map[string]struct {
		link   string
		ranges []netip.Prefix
		pod    plan.GatewayPod
		want   int
		again  int // to be verified again, should an earlier process have had it otherwise
	}{
		"active":            {"CiliumEndpoint", ranges, pod("culvert-hq-0", "n1", true), 1, 0},
		"standby":           {"CiliumEndpoint", ranges, pod("culvert-hq-0", "n1", false), 0, 1},
		"on another node":   {"CiliumEndpoint", ranges, pod("culvert-hq-0", "n2", true), 0, 0},
		"nothing behind it": {"CiliumEndpoint", nil, pod("culvert-hq-0", "n1", true), 0, 1},
		"another link":      {"Encapsulated", ranges, pod("culvert-hq-0", "n1", true), 0, 1},
	} {
		var n node
		n.model = &model.Model{Gateways: []*model.Gateway{{ID: id, NodeLink: c.link, DeviceRanges: c.ranges}}}
		n.facts.Node.Name = "n1"
		n.facts.Pods = map[model.ID][]plan.GatewayPod{id: {c.pod}}
		s := newSources("/nowhere/cilium.sock", slog.New(slog.DiscardHandler))
		if _, err := s.set(n); err != nil || len(s.lift) != c.want {
			t.Errorf("%s: %v, %v; want %d", name, s.lift, err, c.want)
		}
		if len(s.lifted) != c.again {
			t.Errorf("%s: %v are to be verified again, want %d", name, s.lifted, c.again)
		}
		_, err := newSources("", slog.New(slog.DiscardHandler)).set(n)
		if (err != nil) != (c.want > 0) || err != nil && !strings.Contains(err.Error(), "cilium.enabled=true") {
			t.Errorf("%s, without a socket: %v", name, err)
		}
	}
}
