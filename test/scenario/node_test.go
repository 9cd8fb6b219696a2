package scenario

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// Three nodes in two families; the third has published no key yet, the second is about to
// change its one and has used the new one already.
func nodes(all, strict bool) (*model.Model, plan.NodeFacts) {
	node := func(name, a4, a6, p4, p6 string) model.Node {
		return model.Node{Name: name, Addresses: []netip.Addr{netip.MustParseAddr(a4), netip.MustParseAddr(a6)},
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix(p4), netip.MustParsePrefix(p6)}}
	}
	m := &model.Model{
		NodeEncryption: &model.NodeEncryption{ID: model.ID{Name: "cluster"}, AllTraffic: all, Strict: strict, Port: 51821, Nodes: []model.NodeTunnel{
			{Name: "a", PublicKey: netstate.Key{1}, Ready: true},
			{Name: "b", PublicKey: netstate.Key{2}, NextPublicKey: netstate.Key{3}, Ready: true},
		}},
		Nodes: []model.Node{
			node("a", "172.30.0.11", "fd00:30::11", "10.244.1.0/24", "fd00:244:1::/64"),
			node("b", "172.30.0.12", "fd00:30::12", "10.244.2.0/24", "fd00:244:2::/64"),
			node("c", "172.30.0.13", "fd00:30::13", "10.244.3.0/24", "fd00:244:3::/64"),
		},
	}
	met := map[netstate.Key]bool{{2}: true, {3}: true}
	return m, plan.NodeFacts{Node: m.Nodes[0], Encryption: plan.EncryptionFacts{
		PublicKey: netstate.Key{1}, Local: []string{"cni0", "veth*"}, Pods: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")},
		Exempt:      []netstate.Exemption{{Name: "API server", Protocol: netstate.TCP, Address: netip.MustParseAddr("172.30.0.11"), Port: 6443}},
		UnderlayMTU: 1500, Enforced: strict, Met: met, Alive: met,
	}}
}

func TestNodePlans(t *testing.T) {
	for name, c := range map[string]struct{ all, strict bool }{
		"node-pods-strict": {false, true}, "node-all-strict": {true, true}, "node-pods-permissive": {false, false},
	} {
		t.Run(name, func(t *testing.T) {
			got := plan.Node(nodes(c.all, c.strict)).State.String()
			golden := filepath.Join(name, "plan.golden")
			if *update {
				if err := os.MkdirAll(name, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("plan differs from %s (-want +got), see -update:\n%s", golden, diff)
			}
		})
	}
}
