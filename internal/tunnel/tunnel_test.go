package tunnel

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const object = `
apiVersion: culvert.dev/v1alpha1
kind: RemoteCluster
metadata: {name: prod, namespace: default}
spec:
  hub: {replicas: 1}
  targets:
  - {cidrs: [10.0.0.0/8], ports: [{port: 443}]}
`

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// hubOptions are those of a hub with everything below a directory of the test's.
func hubOptions(t *testing.T) HubOptions {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "manifests"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "manifests", "prod.yaml"), []byte(object), 0o600); err != nil {
		t.Fatal(err)
	}
	o := HubOptions{
		Common:    Common{HTTP: freePort(t), Logger: slog.New(slog.DiscardHandler)},
		Manifests: filepath.Join(dir, "manifests"), State: filepath.Join(dir, "hub"), Spokes: freePort(t), Clients: freePort(t),
	}
	o.Addresses, o.ClientAddresses = []string{o.Spokes}, []string{o.Clients}
	return o
}

// background runs f until the test's end.
func background(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func peers(o HubOptions) (s HubStatus, err error) {
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + o.HTTP + "/v1/status")
	if err != nil {
		return s, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// joinedLongAgo is the membership of a spoke whose certificate is due to be renewed.
func joinedLongAgo(t *testing.T, o HubOptions, ago time.Duration) *Membership {
	t.Helper()
	i, err := Invite(o, pki.Spoke, "old")
	if err != nil {
		t.Fatal(err)
	}
	s, err := OpenState(o.State, model.ID{Namespace: "default", Name: "prod"})
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	m := &Membership{RemoteCluster: i.RemoteCluster, UID: i.UID, Role: i.Role, Name: i.Name, Hubs: i.Hubs, Authorities: i.Authorities, Targets: i.Targets}
	err = s.change(func(f files) error {
		signer, _, err := s.authorities(f, i.UID, time.Now())
		if err != nil {
			return err
		}
		der, err := signer.Issue(pki.Request{Identity: pki.Identity{UID: i.UID, Role: pki.Spoke, Name: "old"}, PublicKey: key.Public(), Now: time.Now().Add(-ago)})
		if err != nil {
			return err
		}
		b, err := encodePair(der, key)
		m.Pair = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// A certificate that is due is renewed, with a new key, and the connections are made anew
// with it.
func TestMembersRenew(t *testing.T) {
	o := hubOptions(t)
	old := joinedLongAgo(t, o, 5*24*time.Hour)
	keeper := FileKeeper{Dir: t.TempDir()}
	if err := keeper.Save(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error { return RunHub(ctx, o) })
	background(t, func(ctx context.Context) error {
		return RunSpoke(ctx, SpokeOptions{MemberOptions: MemberOptions{Common: Common{Logger: o.Logger}, Keeper: keeper, Least: 2, Most: 4}})
	})
	eventually(t, "the spoke is connected with a new certificate only", func() error {
		s, err := peers(o)
		if err != nil {
			return err
		}
		if len(s.Peers) != 1 || s.Peers[0].Connections != 2 || time.Until(s.Peers[0].Expires) < 6*24*time.Hour {
			return fmt.Errorf("%+v", s.Peers)
		}
		return nil
	})
	now, err := keeper.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	was, _ := parsePair("", []byte(old.Pair))
	is, err := parsePair("", []byte(now.Pair))
	if err != nil || is.Leaf.Equal(was.Leaf) {
		t.Errorf("the certificate is still the old one: %v", err)
	}
	if string(is.Leaf.RawSubjectPublicKeyInfo) == string(was.Leaf.RawSubjectPublicKeyInfo) {
		t.Error("the key is still the old one")
	}
}

// Who was away for too long is told to join again.
func TestExpiredMember(t *testing.T) {
	o := hubOptions(t)
	keeper := FileKeeper{Dir: t.TempDir()}
	if err := keeper.Save(t.Context(), joinedLongAgo(t, o, 8*24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error { return RunHub(ctx, o) })
	m := &member{keeper: keeper, logger: o.Logger}
	err := m.enter(t.Context(), pki.Spoke, "")
	if err == nil || !strings.Contains(err.Error(), "join again") {
		t.Errorf("%v", err)
	}
}

// The hub's certificate is made anew when its names change, and only then.
func TestHubCertificate(t *testing.T) {
	o := hubOptions(t)
	s, err := OpenState(o.State, model.ID{Namespace: "default", Name: "prod"})
	if err != nil {
		t.Fatal(err)
	}
	uid, err := s.UID("")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.UID(""); err != nil || again != uid || len(uid) != 36 {
		t.Errorf("%s, %s, %v", uid, again, err)
	}
	if given, _ := s.UID("ABC-1"); given != "abc-1" {
		t.Error(given)
	}
	id := pki.Identity{UID: uid, Role: pki.Hub, Name: "0"}
	get := func(at time.Time, names ...string) *x509.Certificate {
		t.Helper()
		c, err := s.HubCredentials(id, names, at)
		if err != nil {
			t.Fatal(err)
		}
		return c.Certificate.Leaf
	}
	now := time.Now()
	first := get(now, "h0", "127.0.0.1")
	if !get(now.Add(time.Hour), "127.0.0.1", "h0").Equal(first) {
		t.Error("made anew without need")
	}
	second := get(now, "h0", "127.0.0.1", "other")
	if second.Equal(first) || second.VerifyHostname("other") != nil || second.VerifyHostname("127.0.0.1") != nil {
		t.Error("the new name is missing")
	}
	if get(now.Add(6*24*time.Hour), "h0").Equal(second) {
		t.Error("not renewed in time")
	}
}

// A token is for its role, and for its RemoteCluster.
func TestTokenIsForItsRole(t *testing.T) {
	o := hubOptions(t)
	i, err := Invite(o, pki.Client, "c")
	if err != nil {
		t.Fatal(err)
	}
	s, _ := OpenState(o.State, model.ID{Namespace: "default", Name: "prod"})
	key, _ := pki.NewKey()
	csr, err := pki.NewRequest(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, j := range []*joiner{{state: s, uid: i.UID}, {state: s, uid: "another"}} {
		role := pki.Spoke
		if j.uid == "another" {
			role = pki.Client
		}
		if _, err := j.Join(t.Context(), role, i.Token, csr); err == nil {
			t.Errorf("role %s, UID %s: let in", role, j.uid)
		}
	}
}

func TestLoopbackOnly(t *testing.T) {
	for address, ok := range map[string]bool{"127.0.0.1:1": true, "[::1]:1": true, "localhost:1": true, ":1": false, "0.0.0.0:1": false, "10.0.0.1:1": false, "[::]:1": false, "x:1": false, "127.0.0.1": false} {
		if err := loopbackOnly(address); (err == nil) != ok {
			t.Errorf("%s: %v", address, err)
		}
	}
}
