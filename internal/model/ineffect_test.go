package model_test

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

func acceptedSite(name, cidr string, created time.Time, generation, accepted int64) *v1alpha1.Site {
	s := &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{
		Name: name, Namespace: "default", Generation: generation, CreationTimestamp: metav1.NewTime(created),
	}}
	s.Spec.GatewayRef.Name = "edge"
	s.Spec.CIDRs = []v1alpha1.RoutedCIDR{v1alpha1.RoutedCIDR(cidr)}
	s.Spec.IPsec = &v1alpha1.SiteIPsec{RemoteID: v1alpha1.Identity(name + ".example.com"), Auth: v1alpha1.IPsecAuth{
		PresharedKeySecretRef: &v1alpha1.SecretKeyReference{Name: "psk", Key: "key"},
	}}
	if accepted != 0 {
		s.Status.Conditions = []metav1.Condition{{
			Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionTrue, ObservedGeneration: accepted,
		}}
	}
	return s
}

// An older site that was changed after a younger one had been accepted is the newcomer,
// also for a process that has just begun.
func TestAcceptedGenerationIsInEffect(t *testing.T) {
	long, now := time.Unix(1000, 0), time.Unix(2000, 0)
	var o model.Objects
	g := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Name: "edge", Namespace: "default"}}
	for _, obj := range []metav1.Object{
		g, acceptedSite("old", "10.1.0.0/16", long, 2, 1), acceptedSite("young", "10.1.2.0/24", now, 1, 1),
	} {
		o.Add(model.Decoded{Object: obj})
	}
	m := model.Parse(o, model.ParseOptions{InEffect: model.InEffect(o), SecretsElsewhere: true})
	if len(m.Problems) != 1 || m.Problems[0].Object.Name != "old" || m.Problems[0].Reason != model.ReasonOverlap {
		t.Errorf("problems: %+v", m.Problems)
	}
	if len(m.Gateways) != 1 || len(m.Gateways[0].Sites) != 1 || m.Gateways[0].Sites[0].Name != "young" {
		t.Errorf("gateways: %+v", m.Gateways)
	}
	m = model.Parse(o, model.ParseOptions{InEffect: model.InEffect(o)})
	if n := len(m.Problems); n < 2 {
		t.Errorf("without SecretsElsewhere a missing Secret must be named: %+v", m.Problems)
	}
}
