package operator

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/workload"
)

func (w *world) siteSays(name, kind string) string {
	var s v1alpha1.Site
	get(w, &s, "default", name)
	return says(s.Status.Conditions, kind)
}

func (w *world) deviceSays(name, kind string) string {
	var d v1alpha1.Device
	get(w, &d, "default", name)
	return says(d.Status.Conditions, kind)
}

// wants fails unless a condition begins with the words.
func (w *world) wants(got, want string) {
	w.t.Helper()
	if !strings.HasPrefix(got, want) {
		w.t.Errorf("it says %q, not %q…", got, want)
	}
}

// The one that came first keeps its range: against a newcomer, against an older site that
// is changed, and against both after a restart of the operator.
func TestFirstComeStays(t *testing.T) {
	w := newWorld(t, gateway(), site("old", "10.1.0.0/16"), site("young", "10.2.0.0/16"))
	w.rounds(w.operator(interceptor.Funcs{}))
	w.create(site("newcomer", "10.2.3.0/24"))
	edit(w, &v1alpha1.Site{}, "old", func(s *v1alpha1.Site) { s.Spec.CIDRs = []v1alpha1.RoutedCIDR{"10.2.0.0/17"} })
	o := w.operator(interceptor.Funcs{}) // has never seen them before
	for range 2 {
		w.rounds(o)
		w.wants(w.siteSays("newcomer", v1alpha1.ConditionAccepted), "False Overlap spec.cidrs[0]: 10.2.3.0/24 lies in")
		w.wants(w.siteSays("old", v1alpha1.ConditionAccepted), "False Overlap spec.cidrs[0]: 10.2.0.0/17")
		w.wants(w.siteSays("young", v1alpha1.ConditionAccepted), "True Accepted")
		o = w.operator(interceptor.Funcs{})
	}
	if err := w.client.Delete(context.Background(), &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Name: "young", Namespace: "default"}}); err != nil {
		t.Fatal(err)
	}
	w.rounds(o)
	w.wants(w.siteSays("old", v1alpha1.ConditionAccepted), "True Accepted")
}

// A bad edit of a gateway takes nothing down, also not for an operator that has just begun.
func TestRefusedGatewayKeepsWhatItHas(t *testing.T) {
	w := newWorld(t, gateway(), site("berlin", "10.1.0.0/16"), device("phone"))
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	w.gatewayRuns()
	w.rounds(o)
	before := w.versions()
	edit(w, &v1alpha1.VPNGateway{}, "edge", func(g *v1alpha1.VPNGateway) { g.Spec.DeviceCIDRs = []v1alpha1.RoutedCIDR{"10.96.1.0/24"} })
	w.rounds(o)
	var g v1alpha1.VPNGateway
	get(w, &g, "default", "edge")
	if got := says(g.Status.Conditions, v1alpha1.ConditionAccepted); !strings.HasPrefix(got, "False Overlap spec.deviceCIDRs[0]") || !strings.Contains(got, "the last good version stays in effect") {
		t.Errorf("gateway: %s", got)
	}
	w.wants(w.deviceSays("phone", v1alpha1.ConditionAccepted), "True Accepted")
	w.rounds(w.operator(interceptor.Funcs{}))
	w.wants(w.deviceSays("phone", v1alpha1.ConditionAccepted), "Unknown Pending")
	w.wants(w.deviceSays("phone", v1alpha1.ConditionResolvedRefs), "False GatewayNotInForce")
	after := w.versions()
	for _, v := range before {
		if strings.Contains(v, "v1alpha1") {
			continue
		}
		if !slices.Contains(after, v) && !strings.Contains(v, "Role") {
			t.Errorf("was touched: %s", v)
		}
	}
	edit(w, &v1alpha1.VPNGateway{}, "edge", func(g *v1alpha1.VPNGateway) { g.Spec.DeviceCIDRs = []v1alpha1.RoutedCIDR{"10.99.0.0/24"} })
	w.rounds(w.operator(interceptor.Funcs{}))
	w.exact()
}

// What is no longer asked for goes: a Service, grants, and all of a gateway that is gone,
// but never what somebody else made.
func TestPrune(t *testing.T) {
	foreign := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "culvert-other", Namespace: "default"}}
	w := newWorld(t, gateway(), site("berlin", "10.1.0.0/16"), device("phone"), foreign)
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	edit(w, &v1alpha1.VPNGateway{}, "edge", func(g *v1alpha1.VPNGateway) { g.Spec.Expose.Type = v1alpha1.ExposeHostPort })
	w.rounds(o)
	err := w.client.Get(context.Background(), types.NamespacedName{Namespace: "default", Name: "culvert-edge"}, &corev1.Service{})
	if !apierrors.IsNotFound(err) {
		t.Errorf("the Service is left: %v", err)
	}
	var set appsv1.StatefulSet
	get(w, &set, "default", "culvert-edge")
	if p := set.Spec.Template.Spec.Containers[0].Ports[1]; p.HostPort != 51820 {
		t.Errorf("ports with expose HostPort: %+v", p)
	}
	for _, gone := range []client.Object{
		&v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Name: "berlin", Namespace: "default"}},
		&v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Name: "edge", Namespace: "default"}},
	} {
		if err := w.client.Delete(context.Background(), gone); err != nil {
			t.Fatal(err)
		}
		w.rounds(o)
		var roles rbacv1.RoleList
		w.list(&roles, client.MatchingLabels{workload.LabelComponent: workload.ComponentGrant, workload.LabelGateway: "edge"})
		if len(roles.Items) > 0 {
			t.Errorf("%s is gone, and %d grants are left", gone.GetName(), len(roles.Items))
		}
	}
	for _, l := range []client.ObjectList{&appsv1.StatefulSetList{}, &rbacv1.RoleList{}, &rbacv1.RoleBindingList{}, &rbacv1.ClusterRoleBindingList{}, &corev1.ServiceAccountList{}} {
		w.list(l)
		if list := fmt.Sprintf("%+v", l); strings.Contains(list, "culvert-") {
			t.Errorf("%T: something is left", l)
		}
	}
	get(w, &corev1.Service{}, "default", "culvert-other")
	w.wants(w.deviceSays("phone", v1alpha1.ConditionReady), "False MissingReference")
	w.wants(w.deviceSays("phone", v1alpha1.ConditionResolvedRefs), "False MissingReference spec.gatewayRef: there is no VPNGateway default/edge")
	w.create(gateway())
	w.rounds(o)
	w.wants(w.deviceSays("phone", v1alpha1.ConditionReady), "nothing") // the gateway will say
}

// A device asks for an address, for one that is taken, for a pool that is empty; it moves.
func TestAddresses(t *testing.T) {
	small := func(s *v1alpha1.VPNGatewaySpec) {
		s.DeviceCIDRs = []v1alpha1.RoutedCIDR{"10.99.0.0/29", "10.100.0.0/24"}
	}
	wish := func(a string) func(*v1alpha1.DeviceSpec) {
		return func(d *v1alpha1.DeviceSpec) { d.Addresses = []v1alpha1.IP{v1alpha1.IP(a)} }
	}
	w := newWorld(t, gateway(small), device("first"), device("second", wish("10.99.0.6")), device("third"))
	w.gatewayRuns()
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	w.exact()
	has := func(name, want string) {
		t.Helper()
		var d v1alpha1.Device
		get(w, &d, "default", name)
		if len(d.Status.Addresses) != 1 || d.Status.Addresses[0] != want {
			t.Errorf("%s has %v, not %s", name, d.Status.Addresses, want)
		}
	}
	has("first", "10.99.0.2")
	has("second", "10.99.0.6")
	edit(w, &v1alpha1.Device{}, "first", func(d *v1alpha1.Device) { wish("10.99.0.6")(&d.Spec) })
	edit(w, &v1alpha1.Device{}, "third", func(d *v1alpha1.Device) { wish("10.100.0.77")(&d.Spec) })
	w.rounds(o)
	has("first", "10.99.0.2") // it keeps what it has
	has("third", "10.100.0.77")
	w.wants(w.deviceSays("first", v1alpha1.ConditionAccepted), "False Overlap spec.addresses[0]: 10.99.0.6")
	edit(w, &v1alpha1.Device{}, "first", func(d *v1alpha1.Device) { d.Spec.Addresses = nil })
	edit(w, &v1alpha1.VPNGateway{}, "edge", func(g *v1alpha1.VPNGateway) { g.Spec.DeviceCIDRs = []v1alpha1.RoutedCIDR{"10.97.0.0/30"} })
	edit(w, &v1alpha1.Device{}, "third", func(d *v1alpha1.Device) { d.Spec.Addresses = nil })
	edit(w, &v1alpha1.Device{}, "second", func(d *v1alpha1.Device) { d.Spec.Addresses = nil })
	w.rounds(w.operator(interceptor.Funcs{}))
	has("first", "10.97.0.2")
	w.wants(w.deviceSays("third", v1alpha1.ConditionAccepted), "False NoAddress spec.addresses: no free address is left in 10.97.0.0/30: enlarge")
}

// A Secret of a device's name that is not Culvert's is left alone; one from a backup is
// taken back, key and all; a broken one is named.
func TestDeviceSecretOfOthers(t *testing.T) {
	theirs := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "phone-wireguard", Namespace: "default"}, Data: map[string][]byte{"mine": []byte("x")}}
	w := newWorld(t, gateway(), theirs, device("phone"), device("tablet"))
	w.gatewayRuns()
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	w.wants(w.deviceSays("phone", v1alpha1.ConditionResolvedRefs), "False SecretTaken metadata.name: Secret default/phone-wireguard")
	get(w, theirs, "default", "phone-wireguard")
	if len(theirs.Data) != 1 {
		t.Errorf("somebody's Secret was changed: %v", theirs.Data)
	}
	var s corev1.Secret
	get(w, &s, "default", "tablet-wireguard")
	key := string(s.Data[workload.SecretPrivateKey])
	s.OwnerReferences = nil
	delete(s.Data, workload.SecretConfig)
	if err := w.client.Update(context.Background(), &s); err != nil {
		t.Fatal(err)
	}
	w.rounds(w.operator(interceptor.Funcs{}))
	var d v1alpha1.Device
	get(w, &d, "default", "tablet")
	w.secretOf(&d)
	get(w, &s, "default", "tablet-wireguard")
	if string(s.Data[workload.SecretPrivateKey]) != key {
		t.Error("the key was not kept")
	}
	s.Data[workload.SecretPrivateKey] = []byte("nonsense")
	if err := w.client.Update(context.Background(), &s); err != nil {
		t.Fatal(err)
	}
	w.rounds(w.operator(interceptor.Funcs{}))
	got := w.deviceSays("tablet", v1alpha1.ConditionResolvedRefs)
	w.wants(got, "False InvalidSecret key \"private-key\" of Secret default/tablet-wireguard")
	if strings.Contains(got, "nonsense") {
		t.Errorf("the key is in the condition: %s", got)
	}
}

// A device's pre-shared key goes into its configuration, once it is there.
func TestPresharedKey(t *testing.T) {
	w := newWorld(t, gateway(), device("phone", func(d *v1alpha1.DeviceSpec) {
		d.PresharedKeySecretRef = &v1alpha1.SecretKeyReference{Name: "psk", Key: "k"}
	}))
	w.gatewayRuns()
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	w.wants(w.deviceSays("phone", v1alpha1.ConditionResolvedRefs), "False SecretNotFound spec.presharedKeySecretRef: there is no Secret default/psk")
	const psk = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	w.create(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "psk", Namespace: "default"}, Data: map[string][]byte{"k": []byte(psk + "\n")}})
	w.rounds(o)
	var s corev1.Secret
	get(w, &s, "default", "phone-wireguard")
	if !strings.Contains(string(s.Data[workload.SecretConfig]), "PresharedKey = "+psk) {
		t.Error("the configuration lacks the pre-shared key")
	}
	w.wants(w.deviceSays("phone", v1alpha1.ConditionResolvedRefs), "True Resolved")
}

// People are told of a refusal once, and of its end.
func TestEvents(t *testing.T) {
	w := newWorld(t, gateway(), site("a", "10.1.0.0/16"), site("b", "10.1.0.0/24"))
	o := w.operator(interceptor.Funcs{})
	var said []string
	o.Event = func(obj runtime.Object, warning bool, reason, _ string) {
		said = append(said, fmt.Sprintf("%s warning=%v %s", obj.(client.Object).GetName(), warning, reason))
	}
	w.rounds(o)
	w.rounds(o)
	edit(w, &v1alpha1.Site{}, "b", func(s *v1alpha1.Site) { s.Spec.CIDRs = []v1alpha1.RoutedCIDR{"10.2.0.0/24"} })
	w.rounds(o)
	if got := strings.Join(said, ", "); got != "b warning=true Overlap, b warning=false Accepted" {
		t.Errorf("events: %s", got)
	}
}

// joined covers exactly the same addresses, and nothing twice.
func TestJoined(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var list []netip.Prefix
		for range rapid.IntRange(0, 12).Draw(t, "n") {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(0, 255).Draw(t, "a"))})
			list = append(list, netip.PrefixFrom(a, rapid.IntRange(24, 32).Draw(t, "bits")).Masked())
		}
		out := joined(list)
		for i := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			in := func(l []netip.Prefix) (n int) {
				for _, p := range l {
					if p.Contains(a) {
						n++
					}
				}
				return n
			}
			if (in(list) > 0) != (in(out) > 0) || in(out) > 1 {
				t.Fatalf("%v became %v: %s", list, out, a)
			}
		}
	})
}

// A gateway that reports on a device at the same time does not stop the operator; another
// operator that gave it other addresses does.
func TestOthersWriteToTheStatus(t *testing.T) {
	for name, other := range map[string]func(*v1alpha1.DeviceStatus){
		"gateway":  func(s *v1alpha1.DeviceStatus) { s.Endpoint = "192.0.2.1:1" },
		"operator": func(s *v1alpha1.DeviceStatus) { s.Addresses = []string{"10.99.0.50"} },
	} {
		w := newWorld(t, gateway(), device("phone"))
		w.gatewayRuns()
		first := true
		o := w.operator(interceptor.Funcs{SubResourceApply: func(ctx context.Context, c client.Client, sub string, a runtime.ApplyConfiguration, opts ...client.SubResourceApplyOption) error {
			// The statuses of several objects are written at the same time; this is the device's.
			if o, ok := a.(interface{ GetKind() string }); ok && o.GetKind() == "Device" && first {
				first = false
				var d v1alpha1.Device
				get(w, &d, "default", "phone")
				other(&d.Status)
				if err := w.client.Status().Update(ctx, &d); err != nil {
					t.Fatal(err)
				}
			}
			return c.SubResource(sub).Apply(ctx, a, opts...)
		}})
		err := o.Round(context.Background())
		if (err != nil) != (name == "operator") {
			t.Errorf("%s: %v", name, err)
		}
		var d v1alpha1.Device
		get(w, &d, "default", "phone")
		want := map[string]string{"gateway": "10.99.0.2", "operator": "10.99.0.50"}[name]
		if len(d.Status.Addresses) != 1 || d.Status.Addresses[0] != want {
			t.Errorf("%s: the device has %v, not %s", name, d.Status.Addresses, want)
		}
	}
}

// Without ServiceCIDR objects the range of services is the one around the kubernetes
// Service's address.
func TestServiceRangeWithoutServiceCIDRs(t *testing.T) {
	kubernetes := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes", Namespace: "default"}}
	kubernetes.Spec.ClusterIPs = []string{"10.43.0.1", "fd00:43::1"}
	w := newWorld(t, gateway(), kubernetes)
	o := w.operator(interceptor.Funcs{})
	o.ServiceCIDRs = false
	w.rounds(o)
	var g v1alpha1.VPNGateway
	get(w, &g, "default", "edge")
	if got := strings.Join(g.Status.Cluster.ServiceCIDRs, " "); got != "10.43.0.0/16 fd00:43::/112" {
		t.Errorf("found %s", got)
	}
}

// Where a gateway is dialled follows from how it is exposed.
func TestDialAddress(t *testing.T) {
	for name, x := range map[string]struct {
		spec    v1alpha1.Expose
		address string
		port    int32
	}{
		"load balancer":       {v1alpha1.Expose{Type: v1alpha1.ExposeLoadBalancer}, "192.0.2.7", 0},
		"named":               {v1alpha1.Expose{Type: v1alpha1.ExposeLoadBalancer, Address: "vpn.example.com"}, "vpn.example.com", 0},
		"node port":           {v1alpha1.Expose{Type: v1alpha1.ExposeNodePort}, "172.30.0.11", 31234},
		"port of the node":    {v1alpha1.Expose{Type: v1alpha1.ExposeHostPort}, "172.30.0.12", 0},
		"somebody else's job": {v1alpha1.Expose{Type: v1alpha1.ExposeNone}, "", 0},
	} {
		w := newWorld(t, gateway(func(s *v1alpha1.VPNGatewaySpec) { s.Expose = x.spec }))
		o := w.operator(interceptor.Funcs{})
		w.rounds(o)
		var s corev1.Service
		if err := w.client.Get(context.Background(), types.NamespacedName{Namespace: "default", Name: "culvert-edge"}, &s); err == nil {
			s.Spec.Ports[0].NodePort = 31234
			if err := w.client.Update(context.Background(), &s); err != nil {
				t.Fatal(err)
			}
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.7"}}
			if err := w.client.Status().Update(context.Background(), &s); err != nil {
				t.Fatal(err)
			}
		}
		var g v1alpha1.VPNGateway
		get(w, &g, "default", "edge")
		g.Status.Endpoints = []v1alpha1.GatewayEndpoint{{Pod: "culvert-edge-0", Node: "n2", Active: true}}
		if err := w.client.Status().Update(context.Background(), &g); err != nil {
			t.Fatal(err)
		}
		if err := o.Round(context.Background()); err != nil {
			t.Fatal(err)
		}
		get(w, &g, "default", "edge")
		if g.Status.Address != x.address || g.Status.WireGuardPort != x.port {
			t.Errorf("%s: %q port %d", name, g.Status.Address, g.Status.WireGuardPort)
		}
	}
}
