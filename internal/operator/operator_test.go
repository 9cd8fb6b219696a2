package operator

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

func TestGatewayWithSiteAndDevices(t *testing.T) {
	w := newWorld(t, gateway(), site("berlin", "192.168.1.0/24"), device("phone"), device("tablet"))
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	var d v1alpha1.Device
	get(w, &d, "default", "phone")
	if got := says(d.Status.Conditions, v1alpha1.ConditionResolvedRefs); !strings.HasPrefix(got, "False GatewayNotReady spec.gatewayRef: VPNGateway default/edge") {
		t.Errorf("before the gateway runs: %s", got)
	}
	w.gatewayRuns()
	w.rounds(o)
	w.exact()

	var g v1alpha1.VPNGateway
	get(w, &g, "default", "edge")
	if g.Status.Address != "vpn.example.com" || g.Status.Sites != 1 || g.Status.Devices != 2 || g.Status.ObservedGeneration != 1 {
		t.Errorf("gateway status: %+v", g.Status)
	}
	if c := g.Status.Cluster; strings.Join(c.PodCIDRs, " ") != "10.244.1.0/24 10.244.2.0/24" ||
		strings.Join(c.ServiceCIDRs, " ") != "10.96.0.0/16" || strings.Join(c.NodeCIDRs, " ") != "172.30.0.11/32 172.30.0.12/32" {
		t.Errorf("ranges found: %+v", c)
	}
	for kind, want := range map[string]string{v1alpha1.ConditionAccepted: "True Accepted", v1alpha1.ConditionResolvedRefs: "True Resolved"} {
		if got := says(g.Status.Conditions, kind); got != want {
			t.Errorf("gateway %s: %s", kind, got)
		}
	}
	get(w, &d, "default", "phone")
	if got := d.Status.Addresses; len(got) != 1 || got[0] != "10.99.0.2" {
		t.Errorf("the first device has %v", got)
	}
	var set appsv1.StatefulSet
	get(w, &set, "default", "culvert-edge")
	var svc corev1.Service
	get(w, &svc, "default", "culvert-edge")
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer || svc.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		t.Errorf("service: %+v", svc.Spec)
	}
	var roles rbacv1.RoleList
	w.list(&roles)
	granted := map[string]bool{}
	for _, r := range roles.Items {
		for _, rule := range r.Rules {
			if len(rule.ResourceNames) == 0 {
				t.Errorf("Role %s has a rule without names: %+v", r.Name, rule)
			}
			for _, n := range rule.ResourceNames {
				granted[r.Labels["app.kubernetes.io/component"]+" "+n] = true
			}
		}
	}
	for _, n := range []string{"grant berlin-psk", "grant phone-wireguard", "grant tablet-wireguard", "gateway culvert-edge-key"} {
		if !granted[n] {
			t.Errorf("nobody may read %s: %v", n, granted)
		}
	}
}
