package agent

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// A node leads nothing to a gateway that the operator has not accepted.
func TestJudged(t *testing.T) {
	conditions := func(status metav1.ConditionStatus) []metav1.Condition {
		return []metav1.Condition{{Type: v1alpha1.ConditionAccepted, Status: status}}
	}
	id := func(name string) model.ID { return model.ID{Namespace: "vpn", Name: name} }
	var objects model.Objects
	gw := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Namespace: "vpn", Name: "edge"}}
	gw.Status.Conditions = conditions(metav1.ConditionTrue)
	objects.Add(model.Decoded{Object: gw})
	m := &model.Model{Gateways: []*model.Gateway{{ID: id("edge")}, {ID: id("other")}}}
	for name, status := range map[string]metav1.ConditionStatus{"accepted": metav1.ConditionTrue, "refused": metav1.ConditionFalse, "new": "", "kept": metav1.ConditionFalse} {
		s := &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Namespace: "vpn", Name: name}}
		if status != "" {
			s.Status.Conditions = conditions(status)
		}
		objects.Add(model.Decoded{Object: s})
		m.Gateways[0].Sites = append(m.Gateways[0].Sites, &model.Site{ID: id(name)})
	}
	got := judged(m, objects, map[model.Ref]bool{{Kind: model.KindSite, ID: id("kept")}: true})
	if len(got.Gateways) != 1 || len(m.Gateways) != 2 || len(m.Gateways[0].Sites) != 4 {
		t.Fatalf("gateways %v, and of the argument %v", got.Gateways, m.Gateways)
	}
	names := map[string]bool{}
	for _, s := range got.Gateways[0].Sites {
		names[s.Name] = true
	}
	if len(names) != 2 || !names["accepted"] || !names["kept"] {
		t.Errorf("sites %v, want accepted and kept", names)
	}
}

// A gateway that is refused for a link that the network plugin cannot carry is led to by the one that it
// had; without one, or for another reason, it is not.
func TestJudgedKeepsTheLink(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		had          v1alpha1.NodeLink
		want         bool
	}{
		{"it had one", model.ReasonNetworkPlugin, v1alpha1.NodeLinkEncapsulated, true},
		{"it had none", model.ReasonNetworkPlugin, "", false},
		{"something else is wrong", model.ReasonOverlap, v1alpha1.NodeLinkEncapsulated, false},
	} {
		gw := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Namespace: "vpn", Name: "edge", Generation: 2}}
		gw.Spec.ClusterTraffic.NodeLink = v1alpha1.NodeLinkCiliumEndpoint
		gw.Status.NodeLink = c.had
		gw.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionFalse, Reason: c.reason, ObservedGeneration: 2}}
		var objects model.Objects
		objects.Add(model.Decoded{Object: gw})
		got := judged(model.Parse(objects, model.ParseOptions{}), objects, nil)
		if (len(got.Gateways) == 1) != c.want || c.want && got.Gateways[0].NodeLink != string(c.had) {
			t.Errorf("%s: %+v", c.name, got.Gateways)
		}
	}
}
