package operator

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/workload"
)

const gatewayKey = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="

// inNamespace makes a namespace of the test's own.
func inNamespace(t *testing.T, name string) string {
	t.Helper()
	ctx := context.Background()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if err := shared.client.Create(ctx, ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = shared.client.Delete(ctx, ns) })
	return name
}

func create(t *testing.T, objects ...client.Object) {
	t.Helper()
	for _, o := range objects {
		if err := shared.client.Create(context.Background(), o); err != nil {
			t.Fatalf("create %T %s: %v", o, o.GetName(), err)
		}
	}
}

func gateway(ns string, change ...func(*v1alpha1.VPNGatewaySpec)) *v1alpha1.VPNGateway {
	g := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Name: "edge", Namespace: ns}}
	g.Spec.DeviceCIDRs = []v1alpha1.RoutedCIDR{"10.99.0.0/20", "fd00:99::/64"}
	g.Spec.Expose = v1alpha1.Expose{Type: v1alpha1.ExposeNodePort, Address: "vpn.example.com"}
	for _, c := range change {
		c(&g.Spec)
	}
	return g
}

func device(ns, name string) *v1alpha1.Device {
	d := &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}}
	d.Spec.GatewayRef.Name = "edge"
	return d
}

func site(ns, name, cidr string) *v1alpha1.Site {
	s := &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}}
	s.Spec.GatewayRef.Name = "edge"
	s.Spec.CIDRs = []v1alpha1.RoutedCIDR{v1alpha1.RoutedCIDR(cidr)}
	s.Spec.IPsec = &v1alpha1.SiteIPsec{
		RemoteID: v1alpha1.Identity(name + ".example.com"),
		Auth:     v1alpha1.IPsecAuth{PresharedKeySecretRef: &v1alpha1.SecretKeyReference{Name: name + "-psk", Key: "key"}},
	}
	return s
}

// gatewayRuns reports for a gateway's pod.
func gatewayRuns(t *testing.T, ns string) {
	t.Helper()
	g := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Name: "edge", Namespace: ns}}
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"status":{"publicKey":"`+gatewayKey+`"}}`))
	if err := shared.client.Status().Patch(context.Background(), g, patch, client.FieldOwner("culvert-gateway/edge-0")); err != nil {
		t.Fatal(err)
	}
}

// says is "True Accepted" or "False Overlap spec.cidrs[0]: …".
func says(conditions []metav1.Condition, kind string) string {
	c := meta.FindStatusCondition(conditions, kind)
	if c == nil {
		return "nothing"
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s %s", c.Status, c.Reason, c.Message))
}

func get(o client.Object, ns, name string) error {
	return shared.client.Get(context.Background(), client.ObjectKey{Namespace: ns, Name: name}, o)
}

// exact checks that the devices of a namespace have an address and a key pair each, and
// that nothing is left of others.
func exact(ns string) error {
	ctx := context.Background()
	var devices v1alpha1.DeviceList
	var leases coordinationv1.LeaseList
	var secrets corev1.SecretList
	for _, l := range []client.ObjectList{&devices, &leases, &secrets} {
		if err := shared.client.List(ctx, l, client.InNamespace(ns)); err != nil {
			return err
		}
	}
	claims := map[string][]string{}
	for i := range leases.Items {
		if c, ok := workload.ParseClaim(&leases.Items[i]); ok {
			claims[c.Holder.String()] = append(claims[c.Holder.String()], c.Address.String())
		}
	}
	byName := map[string]*corev1.Secret{}
	for i := range secrets.Items {
		byName[secrets.Items[i].Name] = &secrets.Items[i]
	}
	owners := map[string]string{}
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for i := range devices.Items {
		d := &devices.Items[i]
		uid := workload.Holder{UID: d.UID}
		uid.Namespace, uid.Name = d.Namespace, d.Name
		if got := says(d.Status.Conditions, v1alpha1.ConditionAccepted) + ", " + says(d.Status.Conditions, v1alpha1.ConditionResolvedRefs); got != "True Accepted, True Resolved" {
			fail("%s: %s", d.Name, got)
		}
		if len(d.Status.Addresses) != 2 || len(claims[uid.String()]) != 2 {
			fail("%s has %v and claims %v", d.Name, d.Status.Addresses, claims[uid.String()])
		}
		delete(claims, uid.String())
		for _, x := range append(d.Status.Addresses, d.Status.PublicKey) {
			if owners[x] != "" || x == "" {
				fail("%s and %s both have %q", d.Name, owners[x], x)
			}
			owners[x] = d.Name
		}
		s := byName[d.Status.ConfigurationSecret]
		delete(byName, d.Status.ConfigurationSecret)
		if s == nil || string(s.Data["public-key"]) != d.Status.PublicKey || !strings.Contains(string(s.Data["wg0.conf"]), "PrivateKey = "+string(s.Data["private-key"])) {
			fail("%s: no Secret %s that fits", d.Name, d.Status.ConfigurationSecret)
		}
	}
	for holder, addrs := range claims {
		fail("%v claimed for %s, which is gone", addrs, holder)
	}
	for name := range byName {
		fail("Secret %s belongs to nobody", name)
	}
	if len(errs) > 5 {
		errs = append(errs[:5], fmt.Errorf("and %d more", len(errs)-5))
	}
	return errors.Join(errs...)
}

func TestGatewayComesAndGoes(t *testing.T) {
	ns := inNamespace(t, "comes")
	startOperator(t)
	create(t, gateway(ns), site(ns, "berlin", "192.168.1.0/24"), device(ns, "phone"), site(ns, "late", "192.168.1.128/25"))
	eventually(t, 30*time.Second, func() error {
		var g v1alpha1.VPNGateway
		return errors.Join(get(&g, ns, "edge"), wantPrefix(says(g.Status.Conditions, v1alpha1.ConditionAccepted), "True Accepted"))
	})
	gatewayRuns(t, ns)
	eventually(t, 15*time.Second, func() error { return exact(ns) })
	var set appsv1.StatefulSet
	var svc corev1.Service
	var late v1alpha1.Site
	if err := errors.Join(get(&set, ns, "culvert-edge"), get(&svc, ns, "culvert-edge"), get(&late, ns, "late")); err != nil {
		t.Fatal(err)
	}
	if got := says(late.Status.Conditions, v1alpha1.ConditionAccepted); !strings.HasPrefix(got, "False Overlap spec.cidrs[0]: 192.168.1.128/25") {
		t.Errorf("the newcomer's condition: %s", got)
	}
	eventually(t, 10*time.Second, func() error {
		var events eventsv1.EventList
		if err := shared.client.List(t.Context(), &events, client.InNamespace(ns)); err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.Regarding.Name == "late" && e.Reason == "Overlap" && e.Type == corev1.EventTypeWarning {
				return nil
			}
		}
		return fmt.Errorf("no event about the refused site among %d", len(events.Items))
	})
	var g v1alpha1.VPNGateway
	if err := get(&g, ns, "edge"); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(g.Status.Cluster.ServiceCIDRs, " "); got != "10.96.0.0/16 fd00:96::/112" {
		t.Errorf("ranges of services: %s", got)
	}
	if port := svc.Spec.Ports[0].NodePort; port == 0 || g.Status.WireGuardPort != port {
		t.Errorf("node port %d, in the gateway's status %d", port, g.Status.WireGuardPort)
	}
	// A second look changes nothing.
	before := set.ResourceVersion
	touch(t, &late)
	time.Sleep(2 * time.Second)
	if err := get(&set, ns, "culvert-edge"); err != nil || set.ResourceVersion != before {
		t.Errorf("the StatefulSet was written again: %s, then %s (%v)", before, set.ResourceVersion, err)
	}
	// What somebody changes by hand is put right again.
	if err := shared.client.Delete(t.Context(), &svc); err != nil {
		t.Fatal(err)
	}
	eventually(t, 15*time.Second, func() error { return get(&svc, ns, "culvert-edge") })

	if err := shared.client.Delete(t.Context(), &g); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, func() error { return nothingLeft(ns) })
}

// touch changes an object so that everybody looks again.
func touch(t *testing.T, o client.Object) {
	t.Helper()
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"touched":"yes"}}}`))
	if err := shared.client.Patch(context.Background(), o, patch); err != nil {
		t.Fatal(err)
	}
}

func wantPrefix(got, want string) error {
	if strings.HasPrefix(got, want) {
		return nil
	}
	return fmt.Errorf("%q, not %q…", got, want)
}

// nothingLeft is about what the operator made for gateways of a namespace.
func nothingLeft(ns string) error {
	var errs []error
	for _, l := range []client.ObjectList{
		&appsv1.StatefulSetList{}, &corev1.ServiceList{}, &corev1.ServiceAccountList{}, &rbacv1.RoleList{}, &rbacv1.RoleBindingList{},
		&rbacv1.ClusterRoleBindingList{}, &coordinationv1.LeaseList{},
	} {
		if err := shared.client.List(context.Background(), l, client.MatchingLabels{workload.LabelManagedBy: workload.Operator}); err != nil {
			return err
		}
		items, err := meta.ExtractList(l)
		if err != nil {
			return err
		}
		for _, i := range items {
			o := i.(client.Object)
			if o.GetNamespace() == ns || o.GetLabels()[workload.LabelGatewayNamespace] == ns {
				errs = append(errs, fmt.Errorf("%T %s/%s is left", o, o.GetNamespace(), o.GetName()))
			}
		}
	}
	return errors.Join(errs...)
}
