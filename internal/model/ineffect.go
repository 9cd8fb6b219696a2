package model

import (
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// InEffect names the gateways, sites, devices and remote clusters that their own status calls accepted just
// as they stand in the snapshot: with condition Accepted true at the object's generation.
// As ParseOptions.InEffect it lets "first come stays" outlive the process that decided.
func InEffect(objects Objects) map[Ref]bool {
	out := map[Ref]bool{}
	for _, d := range objects.list {
		var conditions []metav1.Condition
		switch o := d.Object.(type) {
		case *v1alpha1.VPNGateway:
			conditions = o.Status.Conditions
		case *v1alpha1.Site:
			conditions = o.Status.Conditions
		case *v1alpha1.Device:
			conditions = o.Status.Conditions
		case *v1alpha1.RemoteCluster:
			conditions = o.Status.Conditions
		}
		c := meta.FindStatusCondition(conditions, v1alpha1.ConditionAccepted)
		if c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == d.Object.GetGeneration() {
			out[d.Ref()] = true
		}
	}
	return out
}
