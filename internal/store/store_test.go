package store

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestGatewayKeyIsMadeOnceAndPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	private, pub, err := open(t, dir).GatewayKey()
	if err != nil || pub.IsZero() || private.IsZero() {
		t.Fatalf("GatewayKey: %v, public %v", err, pub)
	}
	again, pub2, err := open(t, dir).GatewayKey()
	if err != nil || pub2 != pub || !again.Equal(private) {
		t.Errorf("second GatewayKey: %v, %v; want %v", err, pub2, pub)
	}
	for name, want := range map[string]os.FileMode{"": 0o700, "wireguard.key": 0o600} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm() != want {
			t.Errorf("mode of %q: %v %v, want %v", name, st.Mode().Perm(), err, want)
		}
	}
	if p, err := open(t, dir).GatewayPublicKey(); err != nil || p != pub {
		t.Errorf("GatewayPublicKey = %v, %v", p, err)
	}
}

func TestPublicKeyOfNoKeyMakesNone(t *testing.T) {
	dir := t.TempDir()
	if p, err := open(t, dir).GatewayPublicKey(); err != nil || !p.IsZero() {
		t.Errorf("GatewayPublicKey = %v, %v; want none", p, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "wireguard.key")); err == nil {
		t.Error("a key was made")
	}
}

func TestDamagedKeyIsNeverReplacedNorPrinted(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "wireguard.key")
	const damaged = "c2VjcmV0LXNlY3JldC1zZWNyZXQ"
	if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := open(t, dir).GatewayKey()
	if err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), damaged) {
		t.Errorf("error %v: want the path and not the content", err)
	}
	if b, _ := os.ReadFile(path); string(b) != damaged {
		t.Errorf("the key file was replaced: %q", b)
	}
}

func TestDeviceKeys(t *testing.T) {
	s := open(t, t.TempDir())
	a, b := model.ID{Namespace: "a", Name: "b.c"}, model.ID{Namespace: "a", Name: "b"}
	_, ka, err := s.DeviceKey(a)
	if err != nil {
		t.Fatal(err)
	}
	if _, k, err := s.FindDeviceKey(b); err != nil || !k.IsZero() {
		t.Errorf("FindDeviceKey of another device = %v, %v", k, err)
	}
	if _, k, err := s.FindDeviceKey(a); err != nil || k != ka {
		t.Errorf("FindDeviceKey = %v, %v; want %v", k, err, ka)
	}
	for range 2 {
		if err := s.RemoveDeviceKey(a); err != nil {
			t.Error(err)
		}
	}
	if _, k, _ := s.FindDeviceKey(a); !k.IsZero() {
		t.Error("the key is still there")
	}
}

func TestObjectsAndEndpointsSurvive(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	want := Objects{
		Addresses: map[string][]netip.Addr{"default/phone": {netip.MustParseAddr("10.99.0.2"), netip.MustParseAddr("fd00::2")}},
		FirstSeen: map[string]time.Time{"Site default/berlin": time.Now().UTC()},
	}
	if err := s.SaveObjects(want); err != nil {
		t.Fatal(err)
	}
	got, err := open(t, dir).Objects()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
	ends := map[netstate.Key]netip.AddrPort{{1}: netip.MustParseAddrPort("192.0.2.1:5"), {2}: netip.MustParseAddrPort("[2001:db8::1]:6")}
	if err := s.SaveEndpoints(ends); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(ends, open(t, dir).Endpoints(), cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Error(diff)
	}
	if err := os.WriteFile(filepath.Join(dir, "endpoints.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if e := s.Endpoints(); len(e) != 0 {
		t.Errorf("Endpoints of a damaged file = %v", e)
	}
	if err := os.WriteFile(filepath.Join(dir, "objects.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Objects(); err == nil {
		t.Error("a damaged objects.json is not reported: addresses would be given out anew")
	}
	left, _ := filepath.Glob(filepath.Join(dir, ".new-*"))
	if len(left) > 0 {
		t.Errorf("temporary files left: %v", left)
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	a, b := open(t, dir), open(t, dir)
	if err := a.Lock(); err != nil {
		t.Fatal(err)
	}
	if err := b.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("second Lock = %v, want ErrLocked", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Lock(); err != nil {
		t.Errorf("Lock after the other's Close = %v", err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
