package operator

import (
	"context"
	"strings"
	"testing"

	coordinationv1 "k8s.io/api/coordination/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// claimsOf lists the claims of a device: "edge 10.99.0.2, …".
func (w *world) claimsOf(name string) string {
	w.t.Helper()
	var leases coordinationv1.LeaseList
	w.list(&leases)
	var out []string
	for i := range leases.Items {
		if c, ok := workload.ParseClaim(&leases.Items[i]); ok && c.Holder.Name == name {
			out = append(out, c.Gateway.Name+" "+c.Address.String())
		}
	}
	return strings.Join(out, ", ")
}

// A device that moves to another gateway takes an address there, and gives the old one
// back; one with the same range may give it the same address.
func TestDeviceMoves(t *testing.T) {
	for _, cidr := range []string{"10.98.0.0/24", "10.99.0.0/24"} {
		other := gateway(func(s *v1alpha1.VPNGatewaySpec) { s.DeviceCIDRs = []v1alpha1.RoutedCIDR{v1alpha1.RoutedCIDR(cidr)} })
		other.Name = "other"
		w := newWorld(t, gateway(), other, device("phone"))
		w.gatewayRuns()
		o := w.operator(interceptor.Funcs{})
		w.rounds(o)
		edit(w, &v1alpha1.Device{}, "phone", func(d *v1alpha1.Device) { d.Spec.GatewayRef.Name = "other" })
		w.rounds(o)
		want := strings.Replace(cidr, "0/24", "2", 1)
		var d v1alpha1.Device
		get(w, &d, "default", "phone")
		if got := w.claimsOf("phone"); got != "other "+want || len(d.Status.Addresses) != 1 || d.Status.Addresses[0] != want {
			t.Errorf("claims %q, status %v, want %s of other", got, d.Status.Addresses, want)
		}
	}
}

// A gateway that gets an IPv6 range gives every device a second address.
func TestSecondFamily(t *testing.T) {
	w := newWorld(t, gateway(), device("phone"))
	w.gatewayRuns()
	o := w.operator(interceptor.Funcs{})
	w.rounds(o)
	edit(w, &v1alpha1.VPNGateway{}, "edge", func(g *v1alpha1.VPNGateway) {
		g.Spec.DeviceCIDRs = append(g.Spec.DeviceCIDRs, "fd00:99::/64")
	})
	w.rounds(o)
	var d v1alpha1.Device
	get(w, &d, "default", "phone")
	if got := strings.Join(d.Status.Addresses, " "); got != "10.99.0.2 fd00:99::2" {
		t.Errorf("the device has %s", got)
	}
	if got := w.claimsOf("phone"); got != "edge 10.99.0.2, edge fd00:99::2" {
		t.Errorf("claims: %s", got)
	}
}

// A gateway that is deleted and made again, and claims that somebody deletes: devices keep
// their addresses.
func TestAddressesOutliveClaims(t *testing.T) {
	w := newWorld(t, gateway(), device("first"), device("second"))
	w.gatewayRuns()
	w.rounds(w.operator(interceptor.Funcs{}))
	var g v1alpha1.VPNGateway
	get(w, &g, "default", "edge")
	var first v1alpha1.Device
	get(w, &first, "default", "first")
	if err := w.client.Delete(context.Background(), &first); err != nil {
		t.Fatal(err)
	}
	if err := w.client.Delete(context.Background(), &g); err != nil {
		t.Fatal(err)
	}
	var leases coordinationv1.LeaseList // which the garbage collector deletes with the gateway
	w.list(&leases)
	for i := range leases.Items {
		if err := w.client.Delete(context.Background(), &leases.Items[i]); err != nil {
			t.Fatal(err)
		}
	}
	w.rounds(w.operator(interceptor.Funcs{}))
	w.create(device("third"))
	w.create(gateway())
	w.gatewayRuns()
	w.collectGarbage()
	w.rounds(w.operator(interceptor.Funcs{}))
	w.exact()
	if got := w.claimsOf("second"); got != "edge 10.99.0.3" {
		t.Errorf("the second device has %s", got)
	}
	if got := w.claimsOf("third"); got != "edge 10.99.0.2" {
		t.Errorf("the third device has %s", got)
	}
}
