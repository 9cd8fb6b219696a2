package model

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// A gateway's node link is the one that it asks for as soon as the operator has accepted that, and
// where no operator has spoken.
func TestNodeLinkInUse(t *testing.T) {
	for _, c := range []struct {
		name     string
		had      v1alpha1.NodeLink
		accepted metav1.ConditionStatus // of generation 2; empty: not said
		said     int64                  // generation
		want     string
	}{
		{"standalone", "", "", 0, "Direct"},
		{"not judged yet", "Encapsulated", metav1.ConditionTrue, 1, "Encapsulated"},
		{"accepted", "Encapsulated", metav1.ConditionTrue, 2, "Direct"},
		{"refused", "Encapsulated", metav1.ConditionFalse, 2, "Encapsulated"},
		{"refused, and had none", "", metav1.ConditionFalse, 2, "Direct"},
	} {
		gw := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Namespace: "vpn", Name: "edge", Generation: 2}}
		gw.Spec.ClusterTraffic.NodeLink = v1alpha1.NodeLinkDirect
		gw.Status.NodeLink = c.had
		if c.accepted != "" {
			gw.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionAccepted, Status: c.accepted, ObservedGeneration: c.said}}
		}
		var objects Objects
		objects.Add(Decoded{Object: gw})
		m := Parse(objects, ParseOptions{})
		if len(m.Gateways) != 1 || m.Gateways[0].NodeLink != c.want || m.Gateways[0].AskedLink != "Direct" {
			t.Errorf("%s: %+v, want %s", c.name, m.Gateways, c.want)
		}
	}
}
