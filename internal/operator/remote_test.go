package operator

import (
	"context"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

func remote(name string, change ...func(*v1alpha1.RemoteCluster)) *v1alpha1.RemoteCluster {
	o := &v1alpha1.RemoteCluster{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}}
	o.Spec.Targets = []v1alpha1.RemoteTarget{{CIDRs: []v1alpha1.CIDR{"10.0.0.0/8"}, Ports: []v1alpha1.TargetPort{{Port: 443}}}}
	for _, c := range change {
		c(o)
	}
	return o
}

// frontHas is the front's Service with its load balancer's address.
func (w *world) frontHas(address string) {
	w.t.Helper()
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "culvert-system", Name: "culvert-front"}}
	s.Spec.Ports = []corev1.ServicePort{{Port: 443}}
	if err := w.client.Create(context.Background(), s); client.IgnoreAlreadyExists(err) != nil {
		w.t.Fatal(err)
	}
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: address}}
	if err := w.client.Status().Update(context.Background(), s); err != nil {
		w.t.Fatal(err)
	}
}

// hubReports is what a hub says of itself, with or without a spoke.
func (w *world) hubReports(name, pod string, spokes ...string) {
	w.t.Helper()
	list := []any{}
	for _, x := range spokes {
		list = append(list, map[string]any{"name": x})
	}
	u := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{
		"authority": "abc", "hubs": []any{map[string]any{"name": pod, "spokes": list}},
	}}}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(model.KindRemoteCluster))
	u.SetNamespace("default")
	u.SetName(name)
	if err := w.client.Status().Apply(context.Background(), client.ApplyConfigurationFromUnstructured(u), client.FieldOwner("culvert-hub/"+pod), client.ForceOwnership); err != nil {
		w.t.Fatal(err)
	}
	var set appsv1.StatefulSet
	get(w, &set, "default", "culvert-hub-"+name)
	set.Status.ReadyReplicas++
	if err := w.client.Status().Update(context.Background(), &set); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) routes() string {
	w.t.Helper()
	var c corev1.ConfigMap
	get(w, &c, "culvert-system", "culvert-front-routes")
	return c.Data["routes.yaml"]
}

// count is how many objects that belong to hubs exist, by kind.
func (w *world) hubObjects() (sets, services int) {
	w.t.Helper()
	var s appsv1.StatefulSetList
	var v corev1.ServiceList
	w.list(&s)
	w.list(&v, client.HasLabels{"culvert.dev/remote-cluster"})
	return len(s.Items), len(v.Items)
}

// From a RemoteCluster to hubs, a table, and what people are told on the way.
func TestRemoteCluster(t *testing.T) {
	w := newWorld(t, remote("prod"))
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	var c v1alpha1.RemoteCluster
	get(w, &c, "default", "prod")
	if have := says(c.Status.Conditions, "Ready"); !strings.HasPrefix(have, "False NoFrontAddress") {
		t.Error(have)
	}
	if sets, _ := w.hubObjects(); sets != 0 || !o.waiting {
		t.Errorf("%d StatefulSets before anybody knows where to dial; waiting: %v", sets, o.waiting)
	}
	w.frontHas("192.0.2.7")
	w.rounds(o)
	if sets, services := w.hubObjects(); sets != 1 || services != 5 {
		t.Errorf("%d StatefulSets, %d Services, want 1 and 5", sets, services)
	}
	get(w, &c, "default", "prod")
	if c.Status.Address != "192.0.2.7:443" || c.Status.ServerName != "h0-"+string(c.UID)+".hubs.culvert.internal" {
		t.Errorf("%q, %q", c.Status.Address, c.Status.ServerName)
	}
	for _, line := range []string{"serverName: h1-" + string(c.UID) + ".hubs.culvert.internal", "address: culvert-hub-prod-1-spokes.default.svc:8443", "tenant: default/prod"} {
		if !strings.Contains(w.routes(), line) {
			t.Errorf("%s is not in\n%s", line, w.routes())
		}
	}
	if have := says(c.Status.Conditions, "Ready"); !strings.HasPrefix(have, "False HubsStarting 0 of 2") {
		t.Error(have)
	}
	w.hubReports("prod", "culvert-hub-prod-0", "spoke-1")
	// The fake API server has no schema to merge lists by: so without server-side apply.
	get(w, &c, "default", "prod")
	c.Status.Hubs = append(c.Status.Hubs, v1alpha1.HubStatus{Name: "culvert-hub-prod-1"})
	if err := w.client.Status().Update(context.Background(), &c); err != nil {
		t.Fatal(err)
	}
	w.rounds(o)
	get(w, &c, "default", "prod")
	if a, b := says(c.Status.Conditions, "Ready"), says(c.Status.Conditions, "Connected"); a != "True HubsRunning" || !strings.HasPrefix(b, "True SomeHubs spokes are connected to 1 of 2") {
		t.Errorf("%s, %s", a, b)
	}
	// A front whose address changes: the hubs tell their spokes.
	var s corev1.Service
	get(w, &s, "culvert-system", "culvert-front")
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.8"}}
	if err := w.client.Status().Update(context.Background(), &s); err != nil {
		t.Fatal(err)
	}
	w.rounds(o)
	get(w, &c, "default", "prod")
	if c.Status.Address != "192.0.2.8:443" {
		t.Errorf("the address is still %s", c.Status.Address)
	}
	// A front that loses its address takes nothing away.
	get(w, &s, "culvert-system", "culvert-front")
	s.Status.LoadBalancer.Ingress = nil
	if err := w.client.Status().Update(context.Background(), &s); err != nil {
		t.Fatal(err)
	}
	w.rounds(o)
	if sets, services := w.hubObjects(); sets != 1 || services != 5 {
		t.Errorf("without an address: %d StatefulSets, %d Services", sets, services)
	}
	// Fewer hubs.
	get(w, &c, "default", "prod")
	c.Status.Hubs = nil
	if err := w.client.Status().Update(context.Background(), &c); err != nil {
		t.Fatal(err)
	}
	edit(w, &c, "prod", func(c *v1alpha1.RemoteCluster) { c.Spec.Hub.Replicas = new(int32(1)) })
	w.rounds(o)
	if _, services := w.hubObjects(); services != 3 || strings.Contains(w.routes(), "h1-") {
		t.Errorf("%d Services; %s", services, w.routes())
	}
	if err := w.client.Delete(context.Background(), &c); err != nil {
		t.Fatal(err)
	}
	w.rounds(o)
	if sets, services := w.hubObjects(); sets+services != 0 || strings.Contains(w.routes(), "serverName") {
		t.Errorf("after the end: %d StatefulSets, %d Services; %s", sets, services, w.routes())
	}
}

// The gate and the annotation migrate an object that exists, both ways.
func TestReversedTunnelGate(t *testing.T) {
	on := func(value string) func(*v1alpha1.RemoteCluster) {
		return func(c *v1alpha1.RemoteCluster) {
			c.Annotations = map[string]string{model.ReversedTunnelAnnotation: value}
		}
	}
	w := newWorld(t, remote("prod"), remote("always", on("true")))
	w.frontHas("192.0.2.7")
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	w.hubReports("prod", "culvert-hub-prod-0", "spoke-1")
	want := func(name, accepted string, sets int) {
		t.Helper()
		w.rounds(o)
		var c v1alpha1.RemoteCluster
		get(w, &c, "default", name)
		if have := says(c.Status.Conditions, "Accepted"); !strings.HasPrefix(have, accepted) {
			t.Errorf("%s: %s", name, have)
		}
		if have, _ := w.hubObjects(); have != sets {
			t.Errorf("%d StatefulSets, want %d", have, sets)
		}
		if have := says(c.Status.Conditions, "Ready"); strings.HasPrefix(accepted, "False FeatureDisabled") != strings.HasPrefix(have, "False NoHub") {
			t.Errorf("%s: %s", name, have)
		}
	}
	want("prod", "True", 2)
	o.Tunnel.Enabled = false // as a new process would
	want("prod", "False FeatureDisabled the feature gate", 1)
	want("always", "True", 1)
	var c v1alpha1.RemoteCluster
	edit(w, &c, "prod", on("true"))
	want("prod", "True", 2)
	o.Tunnel.Enabled = true
	edit(w, &c, "prod", on("false"))
	want("prod", "False FeatureDisabled the annotation", 1)
	// What is no answer is refused, and what runs goes on.
	edit(w, &c, "always", on("maybe"))
	want("always", "False InvalidSpec metadata.annotations[culvert.dev/reversed-tunnel]", 1)
	if !strings.Contains(w.routes(), "tenant: default/always") {
		t.Error("a refused edit took the way to its hubs away")
	}
}

// An identity is nobody else's.
func TestIdentity(t *testing.T) {
	w := newWorld(t, remote("prod"))
	w.frontHas("192.0.2.7")
	var c v1alpha1.RemoteCluster
	get(w, &c, "default", "prod")
	as := func(uid string) func(*v1alpha1.RemoteCluster) {
		return func(c *v1alpha1.RemoteCluster) { c.Annotations = map[string]string{model.IdentityAnnotation: uid} }
	}
	w.create(remote("thief", as(string(c.UID))))
	w.create(remote("heir", as("0815-4711")))
	w.create(remote("second", as("0815-4711")))
	w.create(remote("odd", as("No.DNS")))
	w.rounds(w.operator(interceptor.Funcs{}))
	for name, want := range map[string]string{"prod": "True", "thief": "False Duplicate", "heir": "True", "second": "False Duplicate", "odd": "False InvalidSpec"} {
		get(w, &c, "default", name)
		if have := says(c.Status.Conditions, "Accepted"); !strings.HasPrefix(have, want) {
			t.Errorf("%s: %s", name, have)
		}
	}
	if !strings.Contains(w.routes(), "serverName: h0-0815-4711.hubs.culvert.internal") || strings.Count(w.routes(), "h0-0815-4711") != 1 {
		t.Error(w.routes())
	}
}
