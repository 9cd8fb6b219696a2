package model

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A snapshot with Nodes gives them in the order of their names, and a Node whose addresses
// change is another one, also for a Parse that remembers.
func TestNodes(t *testing.T) {
	node := func(name, address string) *corev1.Node {
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: "z1"}},
			Spec:       corev1.NodeSpec{PodCIDRs: []string{"fd00:244:1::/64", "10.244.1.0/24", "nonsense"}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: "fd00:30::11"}, {Type: corev1.NodeInternalIP, Address: address},
				{Type: corev1.NodeExternalIP, Address: "203.0.113.7"}, {Type: corev1.NodeHostName, Address: name},
			}},
		}
	}
	parse := func(memory *Memory, list ...*corev1.Node) []string {
		t.Helper()
		var objects Objects
		for _, n := range list {
			objects.Add(Decoded{Object: n})
		}
		m := Parse(objects, ParseOptions{Memory: memory})
		if len(m.Problems) > 0 {
			t.Fatal(m.Problems)
		}
		var out []string
		for _, n := range m.Nodes {
			line := n.Name + " " + n.Zone
			for _, a := range n.Addresses {
				line += " " + a.String()
			}
			for _, c := range n.PodCIDRs {
				line += " " + c.String()
			}
			out = append(out, line)
		}
		return out
	}
	var memory Memory
	b := node("b", "172.30.0.12")
	want := []string{"a z1 172.30.0.11 fd00:30::11 10.244.1.0/24 fd00:244:1::/64", "b z1 172.30.0.12 fd00:30::11 10.244.1.0/24 fd00:244:1::/64"}
	if d := cmp.Diff(want, parse(&memory, b, node("a", "172.30.0.11"))); d != "" {
		t.Error(d)
	}
	want[0] = "a z1 172.30.0.99 fd00:30::11 10.244.1.0/24 fd00:244:1::/64"
	if d := cmp.Diff(want, parse(&memory, b, node("a", "172.30.0.99"))); d != "" {
		t.Error(d)
	}
	if (Decoded{Object: node("a", "1.1.1.1")}).Equal(Decoded{Object: node("a", "1.1.1.2")}) {
		t.Error("Nodes with different addresses count as equal")
	}
}
