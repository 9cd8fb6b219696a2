package store_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
	"github.com/culvert-vpn/culvert/internal/store"
)

// What a gateway needs without an API server comes back as it was, and nobody else can read it.
func TestSnapshot(t *testing.T) {
	dir := t.TempDir()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if v, err := s.Snapshot(); v != nil || err != nil {
		t.Fatalf("before the first one: %v, %v", v, err)
	}
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: "vpn", Name: name, UID: "u", Generation: 3}
	}
	in := store.Snapshot{
		PrivateKey: secret.New([]byte("a private key of 32 bytes length")), PublicKey: netstate.Key{1, 2},
		Endpoints: map[netstate.Key]netip.AddrPort{{3}: netip.MustParseAddrPort("[2001:db8::1]:51820")},
	}
	device := &v1alpha1.Device{ObjectMeta: meta("phone"), Status: v1alpha1.DeviceStatus{Addresses: []string{"10.99.0.2"}, PublicKey: "k"}}
	for _, o := range []metav1.Object{
		&v1alpha1.VPNGateway{ObjectMeta: meta("edge")}, &v1alpha1.Site{ObjectMeta: meta("berlin"), Spec: v1alpha1.SiteSpec{CIDRs: []v1alpha1.RoutedCIDR{"10.10.0.0/24"}}}, device,
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, &corev1.Secret{ObjectMeta: meta("berlin"), Data: map[string][]byte{"psk": []byte("x")}},
		&corev1.Service{ObjectMeta: meta("web")},
	} {
		in.Objects.Add(model.Decoded{Object: o})
	}
	if err := s.SaveSnapshot(in); err != nil {
		t.Fatal(err)
	}
	out, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if !out.PrivateKey.Equal(in.PrivateKey) || out.PublicKey != in.PublicKey || out.Endpoints[netstate.Key{3}] != in.Endpoints[netstate.Key{3}] {
		t.Errorf("identity %+v", out)
	}
	all := out.Objects.All()
	if len(all) != 5 { // the Service is left out
		t.Fatalf("%d objects, want 5", len(all))
	}
	for _, d := range all {
		if got, ok := d.Object.(*v1alpha1.Device); ok && (got.UID != "u" || got.Generation != 3 || len(got.Status.Addresses) != 1 || got.Status.PublicKey != "k") {
			t.Errorf("the device is %+v", got)
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "snapshot*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	if st, err := os.Stat(files[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}
