package operator

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// world is a cluster without anything that acts, but operators.
type world struct {
	t      *testing.T
	client client.WithWatch
	now    time.Time
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	scheme, err := NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, now: time.Unix(1_700_000_000, 0)}
	w.client = fake.NewClientBuilder().WithScheme(scheme).
		WithStatusSubresource(&v1alpha1.VPNGateway{}, &v1alpha1.Site{}, &v1alpha1.Device{}, &v1alpha1.RemoteCluster{}, &corev1.Service{}, &appsv1.StatefulSet{}).
		WithObjects(node("n1", "10.244.1.0/24", "172.30.0.11"), node("n2", "10.244.2.0/24", "172.30.0.12"),
			namespace("default"), namespace("culvert-system"),
			&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}}).
		Build()
	for _, o := range objects {
		w.create(o)
	}
	return w
}

func namespace(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func node(name, pods, address string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{pods}},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}},
	}
}

var created int

// create gives an object what an API server would.
func (w *world) create(o client.Object) {
	w.t.Helper()
	created++
	o.SetUID(types.UID(fmt.Sprintf("uid-%d", created)))
	o.SetGeneration(1)
	o.SetCreationTimestamp(metav1.NewTime(w.now.Add(time.Duration(created) * time.Second)))
	if err := w.client.Create(context.Background(), o); err != nil {
		w.t.Fatal(err)
	}
}

// edit changes an object's spec as a person does.
func edit[T client.Object](w *world, o T, name string, change func(T)) {
	w.t.Helper()
	get(w, o, "default", name)
	change(o)
	o.SetGeneration(o.GetGeneration() + 1)
	if err := w.client.Update(context.Background(), o); err != nil {
		w.t.Fatal(err)
	}
}

func get(w *world, o client.Object, namespace, name string) {
	w.t.Helper()
	if err := w.client.Get(context.Background(), types.NamespacedName{Namespace: namespace, Name: name}, o); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) list(l client.ObjectList, opts ...client.ListOption) {
	w.t.Helper()
	if err := w.client.List(context.Background(), l, opts...); err != nil {
		w.t.Fatal(err)
	}
}

// operator is a new process.
func (w *world) operator(funcs interceptor.Funcs) *Operator {
	c := interceptor.NewClient(w.client, funcs)
	return New(Config{
		Cached: w.client, Live: w.client, Writer: c, ServiceCIDRs: true,
		Workload:       workload.Options{Image: "culvert:test", ClusterRole: "culvert-gateway"},
		ServiceAccount: model.ID{Namespace: "culvert-system", Name: "culvert-operator"},
		Tunnel: Tunnel{
			Enabled: true, Domain: "hubs.culvert.internal",
			Service: model.ID{Namespace: "culvert-system", Name: "culvert-front"}, Routes: model.ID{Namespace: "culvert-system", Name: "culvert-front-routes"},
		},
		Logger: slog.New(slog.DiscardHandler),
		Now:    func() time.Time { return w.now },
	})
}

// rounds runs rounds until nothing is left to do, and fails after too many.
func (w *world) rounds(o *Operator) {
	w.t.Helper()
	for range 10 {
		before := w.versions()
		if err := o.Round(context.Background()); err != nil {
			w.t.Fatalf("round: %v", err)
		}
		if slices.Equal(before, w.versions()) {
			return
		}
	}
	w.t.Fatal("rounds go on changing things")
}

// versions names every object with its version, sorted.
func (w *world) versions() []string {
	var out []string
	for _, l := range []client.ObjectList{
		&v1alpha1.VPNGatewayList{}, &v1alpha1.SiteList{}, &v1alpha1.DeviceList{}, &v1alpha1.RemoteClusterList{}, &appsv1.StatefulSetList{}, &corev1.ServiceList{},
		&corev1.ServiceAccountList{}, &corev1.SecretList{}, &coordinationv1.LeaseList{}, &rbacv1.RoleList{}, &rbacv1.RoleBindingList{}, &rbacv1.ClusterRoleBindingList{},
	} {
		w.list(l)
		items, err := meta.ExtractList(l)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, i := range items {
			o := i.(client.Object)
			out = append(out, fmt.Sprintf("%T %s/%s %s", o, o.GetNamespace(), o.GetName(), o.GetResourceVersion()))
		}
	}
	slices.Sort(out)
	return out
}

func gateway(change ...func(*v1alpha1.VPNGatewaySpec)) *v1alpha1.VPNGateway {
	g := &v1alpha1.VPNGateway{ObjectMeta: metav1.ObjectMeta{Name: "edge", Namespace: "default"}}
	g.Spec.DeviceCIDRs = []v1alpha1.RoutedCIDR{"10.99.0.0/24"}
	g.Spec.Expose = v1alpha1.Expose{Type: v1alpha1.ExposeLoadBalancer, Address: "vpn.example.com"}
	for _, c := range change {
		c(&g.Spec)
	}
	return g
}

func device(name string, change ...func(*v1alpha1.DeviceSpec)) *v1alpha1.Device {
	d := &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}}
	d.Spec.GatewayRef.Name = "edge"
	for _, c := range change {
		c(&d.Spec)
	}
	return d
}

func site(name, cidr string) *v1alpha1.Site {
	s := &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}}
	s.Spec.GatewayRef.Name = "edge"
	s.Spec.CIDRs = []v1alpha1.RoutedCIDR{v1alpha1.RoutedCIDR(cidr)}
	s.Spec.IPsec = &v1alpha1.SiteIPsec{
		RemoteID: v1alpha1.Identity(name + ".example.com"),
		Auth:     v1alpha1.IPsecAuth{PresharedKeySecretRef: &v1alpha1.SecretKeyReference{Name: name + "-psk", Key: "key"}},
	}
	return s
}

// gatewayRuns is what the gateway's pod reports.
func (w *world) gatewayRuns() {
	w.t.Helper()
	var g v1alpha1.VPNGateway
	get(w, &g, "default", "edge")
	g.Status.PublicKey = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
	if err := w.client.Status().Update(context.Background(), &g); err != nil {
		w.t.Fatal(err)
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

// exact checks that the end state follows from the objects, whatever happened on the way:
// every device has one address and one key pair of its own, and nothing is left of others.
func (w *world) exact() {
	w.t.Helper()
	var devices v1alpha1.DeviceList
	var leases coordinationv1.LeaseList
	var secrets corev1.SecretList
	w.list(&devices)
	w.list(&leases)
	w.list(&secrets)
	claims := map[string]string{} // by device
	for i := range leases.Items {
		c, ok := workload.ParseClaim(&leases.Items[i])
		if !ok {
			w.t.Errorf("Lease %s is no claim", leases.Items[i].Name)
			continue
		}
		if other, dup := claims[c.Holder.String()]; dup {
			w.t.Errorf("%s holds %s and %s", c.Holder, other, c.Address)
		}
		claims[c.Holder.String()] = c.Address.String()
	}
	addresses, keys := map[string]string{}, map[string]string{}
	for i := range devices.Items {
		d := &devices.Items[i]
		name := holderOf(d).String()
		if len(d.Status.Addresses) != 1 || d.Status.Addresses[0] != claims[name] {
			w.t.Errorf("%s: status has %v, the claim %q", name, d.Status.Addresses, claims[name])
			continue
		}
		delete(claims, name)
		for _, x := range []struct {
			seen  map[string]string
			value string
		}{{addresses, d.Status.Addresses[0]}, {keys, d.Status.PublicKey}} {
			if other, dup := x.seen[x.value]; dup || x.value == "" {
				w.t.Errorf("%s and %s both have %q", name, other, x.value)
			}
			x.seen[x.value] = name
		}
		w.secretOf(d)
	}
	for name, a := range claims {
		w.t.Errorf("%s is claimed for %s, which is gone", a, name)
	}
	w.noOrphanedSecrets(devices.Items, secrets.Items)
}

func (w *world) noOrphanedSecrets(devices []v1alpha1.Device, secrets []corev1.Secret) {
	w.t.Helper()
	uids := map[types.UID]bool{}
	for i := range devices {
		uids[devices[i].UID] = true
	}
	for i := range secrets {
		if !uids[ownerUID(&secrets[i])] {
			w.t.Errorf("Secret %s belongs to nobody", secrets[i].Name)
		}
	}
}

// secretOf checks the configuration of a device against its status.
func (w *world) secretOf(d *v1alpha1.Device) {
	w.t.Helper()
	if d.Spec.PublicKey != "" {
		return
	}
	var s corev1.Secret
	get(w, &s, d.Namespace, d.Status.ConfigurationSecret)
	config := string(s.Data[workload.SecretConfig])
	for _, part := range []string{
		"PrivateKey = " + string(s.Data[workload.SecretPrivateKey]), "Address = " + d.Status.Addresses[0] + "/32", "Endpoint = vpn.example.com:51820",
	} {
		if !strings.Contains(config, part) {
			w.t.Errorf("configuration of %s lacks %q", d.Name, part)
		}
	}
	if string(s.Data[workload.SecretPublicKey]) != d.Status.PublicKey || ownerUID(&s) != d.UID {
		w.t.Errorf("Secret of %s: public key %s, owner %s; the device has %s, %s", d.Name, s.Data[workload.SecretPublicKey], ownerUID(&s), d.Status.PublicKey, d.UID)
	}
}

// collectGarbage deletes what belongs to devices and gateways that are gone, as a cluster
// does.
func (w *world) collectGarbage() {
	w.t.Helper()
	var devices v1alpha1.DeviceList
	var secrets corev1.SecretList
	w.list(&devices)
	w.list(&secrets)
	uids := map[types.UID]bool{}
	for i := range devices.Items {
		uids[devices.Items[i].UID] = true
	}
	for i := range secrets.Items {
		if s := &secrets.Items[i]; ownerUID(s) != "" && !uids[ownerUID(s)] {
			if err := w.client.Delete(context.Background(), s); err != nil {
				w.t.Fatal(err)
			}
		}
	}
}
