package store

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

var edge = model.ID{Namespace: "vpn", Name: "edge"}

func fakeServer(t *testing.T, objects ...client.Object) client.Client {
	t.Helper()
	scheme, err := kube.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).Build()
}

func keySecret(data map[string][]byte) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "vpn", Name: "culvert-edge-key"}, Data: data}
}

// The first pod makes the key, and every later one, also one of the same name, has it.
func TestKeyIsMadeOnceInTheCluster(t *testing.T) {
	c := fakeServer(t)
	private, public, err := NewKube(c, edge, "culvert-gateway/edge-0").GatewayKey(t.Context(), "uid")
	if err != nil || private.IsZero() || public.IsZero() {
		t.Fatalf("%v, %v", public, err)
	}
	for _, pod := range []string{"edge-0", "edge-1"} {
		again, same, err := NewKube(c, edge, "culvert-gateway/"+pod).GatewayKey(t.Context(), "uid")
		if err != nil || same != public || !again.Equal(private) {
			t.Errorf("%s has key %s, want %s (%v)", pod, same, public, err)
		}
	}
	var s corev1.Secret
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "vpn", Name: "culvert-edge-key"}, &s); err != nil {
		t.Fatal(err)
	}
	if s.Immutable == nil || !*s.Immutable || len(s.OwnerReferences) != 1 || s.OwnerReferences[0].UID != "uid" || s.Type != corev1.SecretTypeOpaque {
		t.Errorf("immutable %v, owners %v, type %s", s.Immutable, s.OwnerReferences, s.Type)
	}
	if key, err := wgtypes.ParseKey(strings.TrimSpace(string(s.Data[PrivateKeyName]))); err != nil || netstate.Key(key.PublicKey()) != public {
		t.Errorf("the Secret holds another key (%v)", err)
	}
}

// A key that was restored from a backup is used; one that is broken is told and left alone.
func TestKeyThatIsThereIsNeverReplaced(t *testing.T) {
	backup, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	c := fakeServer(t, keySecret(map[string][]byte{PrivateKeyName: []byte(backup.String())}))
	if _, public, err := NewKube(c, edge, "m").GatewayKey(t.Context(), "uid"); err != nil || public != netstate.Key(backup.PublicKey()) {
		t.Errorf("key %s, %v", public, err)
	}
	for name, data := range map[string]map[string][]byte{
		"empty": nil, "another key": {"privatekey": []byte(backup.String())}, "garbage": {PrivateKeyName: []byte("sekret-sekret")},
		"zeros": {PrivateKeyName: []byte(wgtypes.Key{}.String())},
	} {
		c := fakeServer(t, keySecret(data))
		_, _, err := NewKube(c, edge, "m").GatewayKey(t.Context(), "uid")
		if err == nil || apierrors.IsNotFound(err) || !strings.Contains(err.Error(), "vpn/culvert-edge-key") || !strings.Contains(err.Error(), "restore") || strings.Contains(err.Error(), "sekret") {
			t.Errorf("%s: %v", name, err)
		}
		var s corev1.Secret
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: "vpn", Name: "culvert-edge-key"}, &s); err != nil || !cmp.Equal(s.Data, data, cmpopts.EquateEmpty()) {
			t.Errorf("%s: the Secret was changed (%v)", name, err)
		}
	}
}

func TestEndpointsInTheCluster(t *testing.T) {
	k := NewKube(fakeServer(t), edge, "m")
	if m, err := k.Endpoints(t.Context()); err != nil || len(m) != 0 {
		t.Fatalf("before anything was saved: %v, %v", m, err)
	}
	want := map[netstate.Key]netip.AddrPort{}
	for i := range 10000 {
		want[netstate.Key{1, byte(i), byte(i >> 8)}] = netip.MustParseAddrPort(fmt.Sprintf("198.51.%d.%d:51820", i>>8, i&255))
	}
	for range 2 { // the second takes the place of the first
		if err := k.SaveEndpoints(t.Context(), "uid", want); err != nil {
			t.Fatal(err)
		}
		got, err := k.Endpoints(t.Context())
		if err != nil || len(got) != len(want) {
			t.Fatalf("%d endpoints, want %d (%v)", len(got), len(want), err)
		}
		for key, at := range want {
			if got[key] != at {
				t.Fatalf("%s is at %s, want %s", key, got[key], at)
			}
		}
		want = map[netstate.Key]netip.AddrPort{{9}: netip.MustParseAddrPort("[2001:db8::1]:1")}
	}
	for _, damaged := range [][]byte{nil, []byte("no gzip"), {0x1f, 0x8b, 8}} {
		if m := unpackEndpoints(damaged); len(m) != 0 {
			t.Errorf("%q: %v", damaged, m)
		}
	}
}
