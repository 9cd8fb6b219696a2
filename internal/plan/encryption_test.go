package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// encrypted is a cluster of some nodes, each with a key.
func encrypted(nodes int) *model.Model {
	m := &model.Model{NodeEncryption: &model.NodeEncryption{ID: model.ID{Name: "cluster"}, Strict: true, Port: 51821}}
	for i := range nodes {
		name := fmt.Sprintf("node-%03d", i)
		m.Nodes = append(m.Nodes, model.Node{
			Name:      name,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{172, 30, byte(i >> 8), byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00:30::%x", i+1))},
			PodCIDRs:  []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", 100+i>>8, i&255)), netip.MustParsePrefix(fmt.Sprintf("fd00:244:%x::/64", i))},
		})
		m.NodeEncryption.Nodes = append(m.NodeEncryption.Nodes, model.NodeTunnel{Name: name, PublicKey: netstate.Key{byte(i), byte(i >> 8), 1}, Ready: true})
	}
	return m
}

func lines(r NodeResult, prefix string) []string {
	return slices.DeleteFunc(r.State.Lines(), func(l string) bool { return !strings.HasPrefix(l, prefix) })
}

func TestStrictWaitsForAllButIsNeverTakenBack(t *testing.T) {
	for _, c := range []struct {
		name    string
		change  func(m *model.Model, f *EncryptionFacts)
		strict  bool
		waiting string
	}{
		{"all ready", func(*model.Model, *EncryptionFacts) {}, true, ""},
		{"a node is not ready", func(m *model.Model, _ *EncryptionFacts) { m.NodeEncryption.Nodes[1].Ready = false }, false, "node-001"},
		{"a node has no key", func(m *model.Model, _ *EncryptionFacts) { m.NodeEncryption.Nodes = m.NodeEncryption.Nodes[:2] }, false, "node-002 (no key)"},
		{"no key, but this node was strict", func(m *model.Model, f *EncryptionFacts) {
			m.NodeEncryption.Nodes = m.NodeEncryption.Nodes[:2]
			f.Enforced = true
		}, true, ""},
		{"no key, but the cluster is strict", func(m *model.Model, _ *EncryptionFacts) {
			m.NodeEncryption.Nodes = m.NodeEncryption.Nodes[:2]
			m.NodeEncryption.Enforced = true
		}, true, ""},
		{"permissive again", func(m *model.Model, f *EncryptionFacts) {
			m.NodeEncryption.Strict, m.NodeEncryption.Enforced, f.Enforced = false, true, true
		}, false, ""},
		{"pods are not recognised", func(_ *model.Model, f *EncryptionFacts) { f.Mismatch = "10.9.9.9/32 is in no range" }, false, "10.9.9.9/32"},
		{"the network plugin goes past the guard", func(_ *model.Model, f *EncryptionFacts) { f.Refused = "Cilium's own is on" }, false, "Cilium's own"},
		{"refused, but the cluster is strict", func(m *model.Model, f *EncryptionFacts) {
			f.Refused, m.NodeEncryption.Enforced = "Cilium's own is on", true
		}, true, ""},
	} {
		m := encrypted(3)
		f := NodeFacts{Node: m.Nodes[0]}
		c.change(m, &f.Encryption)
		r := Node(m, f)
		if r.State.Guard.Strict != c.strict || r.Encryption.Strict != c.strict {
			t.Errorf("%s: strict is %v, want %v", c.name, r.State.Guard.Strict, c.strict)
		}
		if w := r.Waiting[EncryptionName]; !strings.Contains(w, c.waiting) || c.waiting == "" && w != "" {
			t.Errorf("%s: waiting %q, want %q", c.name, w, c.waiting)
		}
		if un := lines(r, "route unreachable"); (len(un) > 0) != c.strict {
			t.Errorf("%s: unreachable routes %v, strict %v", c.name, un, c.strict)
		}
	}
}

// What a network plugin wraps goes the way of pods with scope Pods, too, and is taken from there only.
func TestOverlayOfTheNetworkPlugin(t *testing.T) {
	for _, all := range []bool{false, true} {
		m := encrypted(2)
		m.NodeEncryption.AllTraffic = all
		r := Node(m, NodeFacts{Node: m.Nodes[0], Encryption: EncryptionFacts{Overlay: 8472}})
		if got := lines(r, "rule ipv4 priority 19631 udp 8472 lookup 19631"); (len(got) == 1) == all {
			t.Errorf("all traffic %v: %q", all, lines(r, "rule"))
		}
		if got := lines(r, "guard overlay udp 8472"); len(got) != 1 {
			t.Errorf("all traffic %v: %q", all, lines(r, "guard"))
		}
	}
}

// Where pods' links have no addresses the reverse path is checked loosely on the others only.
func TestLooseLinks(t *testing.T) {
	for _, c := range []struct {
		loose, want []string
	}{
		{nil, []string{"sysctl net/ipv4/conf/all/rp_filter=2"}},
		{[]string{"cvtnode0", "eth0"}, []string{"sysctl net/ipv4/conf/cvtnode0/rp_filter=2", "sysctl net/ipv4/conf/eth0/rp_filter=2"}},
	} {
		m := encrypted(2)
		got := lines(Node(m, NodeFacts{Node: m.Nodes[0], Encryption: EncryptionFacts{Loose: c.loose}}), "sysctl net/ipv4/conf/")
		if !slices.Equal(got, c.want) {
			t.Errorf("loose %v: %q, want %q", c.loose, got, c.want)
		}
	}
}

// What two nodes claim is sent to one of them, and never away from this node.
func TestClaims(t *testing.T) {
	m := encrypted(4)
	m.Nodes[2].Addresses = append(m.Nodes[2].Addresses, m.Nodes[0].Addresses[0], m.Nodes[1].Addresses[0], netip.MustParseAddr("10.100.3.7"))
	m.Nodes[1].PodCIDRs = append(m.Nodes[1].PodCIDRs, netip.MustParsePrefix("10.100.0.128/25"))
	r := Node(m, NodeFacts{Node: m.Nodes[0]})
	owner := map[netip.Prefix]string{}
	for _, p := range r.State.WireGuard[0].Peers {
		for _, c := range p.AllowedIPs {
			if o := owner[c]; o != "" {
				t.Errorf("%s is sent to %s and to %s", c, o, p.Name)
			}
			owner[c] = p.Name
		}
	}
	if o := owner[host(m.Nodes[1].Addresses[0])]; o != "node node-001" {
		t.Errorf("the address of node-001 is sent to %q", o)
	}
	for _, c := range []string{"172.30.0.0/32", "10.100.3.7/32", "10.100.0.128/25"} {
		if o := owner[netip.MustParsePrefix(c)]; o != "" {
			t.Errorf("%s is sent to %s", c, o)
		}
	}
	if r.Waiting["node node-002"] == "" || r.Waiting["node node-001"] == "" {
		t.Errorf("nobody hears of it: %v", r.Waiting)
	}
}

// One node that joins 250 is a few milliseconds of planning, and changes only what is its.
func TestManyNodes(t *testing.T) {
	m := encrypted(251)
	m.NodeEncryption.AllTraffic = true
	before := encrypted(250)
	before.NodeEncryption.AllTraffic = true
	facts := NodeFacts{Node: m.Nodes[0], Encryption: EncryptionFacts{Enforced: true}}
	old := Node(before, facts)
	best := time.Hour
	var r NodeResult
	for range 5 {
		start := time.Now()
		r = Node(m, facts)
		best = min(best, time.Since(start))
	}
	t.Logf("250 peers are planned in %s", best)
	if best > 50*time.Millisecond {
		t.Errorf("planning took %s, want 50 ms at most", best)
	}
	if d := netstate.Diff(old.State, r.State); len(d) > 20 {
		t.Errorf("%d lines differ: %v", len(d), d[:20])
	}
	if n := len(r.State.WireGuard[0].Peers); n != 250 {
		t.Errorf("%d peers, want 250", n)
	}
}

// The node link runs inside the encrypted one: its packets must fit, and those of sites leave
// a node in no other way.
func TestNodeLinkInside(t *testing.T) {
	m := encrypted(2)
	id := model.ID{Namespace: "vpn", Name: "edge"}
	m.Gateways = []*model.Gateway{{ID: id, NodeLink: linkEncapsulated, Sites: []*model.Site{{ID: id, CIDRs: []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24")}}}}}
	r := Node(m, NodeFacts{Node: m.Nodes[0], Pods: map[model.ID][]GatewayPod{id: {{
		Name: "edge-0", Node: "node-001", PodIPs: []netip.Addr{netip.MustParseAddr("10.100.1.5")}, HostIPs: m.Nodes[1].Addresses, Active: true,
	}}}})
	got := lines(r, "link cvtnodes")[0]
	if !strings.Contains(got, " mtu 1390") {
		t.Errorf("%s; want mtu 1390: 1500 less WireGuard's 60 and VXLAN's 50", got)
	}
	if got := lines(r, "firewall clamp cvtnodes"); !slices.Equal(got, []string{"firewall clamp cvtnodes mss 1350/1330"}) {
		t.Errorf("%v", got)
	}
	if got := lines(r, "guard sites"); !slices.Equal(got, []string{"guard sites 192.168.50.0/24"}) {
		t.Errorf("%v", got)
	}
}
