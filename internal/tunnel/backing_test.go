package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// fakeSecret is a Secret of an API server: who writes onto another version is told so.
type fakeSecret struct {
	mu      sync.Mutex
	data    map[string][]byte
	version int
}

func (s *fakeSecret) String() string { return "Secret team/authority" }

func (s *fakeSecret) Read(context.Context) (map[string][]byte, string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.data == nil {
		return nil, "", nil
	}
	return maps.Clone(s.data), strconv.Itoa(s.version), nil
}

func (s *fakeSecret) Write(_ context.Context, data map[string][]byte, version string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.data == nil != (version == "") || s.data != nil && version != strconv.Itoa(s.version) {
		return ErrConflict
	}
	s.data, s.version = maps.Clone(data), s.version+1
	return nil
}

func (s *fakeSecret) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data = nil
}

func never() string { return "" }

func noHubs(pki.Role) []wire.HubAddress { return nil }

const uid = "5c2f9d6e-1b0a-4c9e-9a39-2f7f0c6f8d11"

// Hubs that begin at once have one authority, and a token works at one of them.
func TestSecretStateIsShared(t *testing.T) {
	secret := &fakeSecret{}
	var hubs []*State
	for range 8 {
		hubs = append(hubs, SecretState(secret, never))
	}
	var wg sync.WaitGroup
	authorities := make([]string, len(hubs))
	for i, s := range hubs {
		wg.Go(func() {
			c, err := s.HubCredentials(pki.Identity{UID: uid, Role: pki.Hub, Name: strconv.Itoa(i)}, []string{"localhost"}, time.Now())
			if err != nil {
				t.Error(err)
				return
			}
			authorities[i] = AuthorityOf(c.Authorities[0])
		})
	}
	wg.Wait()
	for _, a := range authorities {
		if a != authorities[0] {
			t.Fatalf("several authorities: %q", authorities)
		}
	}
	for name, b := range secret.data {
		if strings.HasPrefix(name, "hub-") || bytes.Contains(b, []byte("PRIVATE")) && !strings.HasPrefix(name, "authority-") {
			t.Errorf("%s: the key of a hub left it", name)
		}
	}
	token, _, err := hubs[0].NewToken(pki.Identity{UID: uid, Role: pki.Spoke, Name: "s"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var joined int
	var mu sync.Mutex
	for _, s := range hubs {
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := pki.NewRequest(key)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			j := &joiner{state: s, uid: uid, hubs: noHubs}
			if _, err := j.Join(context.Background(), pki.Spoke, token, csr); err == nil {
				mu.Lock()
				joined++
				mu.Unlock()
			} else if !errors.Is(err, pki.ErrToken) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if joined != 1 {
		t.Errorf("a token let %d in", joined)
	}
}

// A Secret that is lost is put back by who knows it, and nobody makes another authority.
func TestSecretIsLost(t *testing.T) {
	secret := &fakeSecret{}
	id := pki.Identity{UID: uid, Role: pki.Hub, Name: "0"}
	known := ""
	running := SecretState(secret, func() string { return known })
	c, err := running.HubCredentials(id, []string{"localhost"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	known = AuthorityOf(c.Authorities[0])
	secret.lose()
	fresh := SecretState(secret, func() string { return known })
	if _, err := fresh.HubCredentials(id, []string{"localhost"}, time.Now()); err == nil || !strings.Contains(err.Error(), "restore the Secret from a backup") {
		t.Errorf("a hub without the authority goes on: %v", err)
	}
	if secret.data != nil {
		t.Error("it wrote a Secret")
	}
	if _, err := running.HubCredentials(id, []string{"localhost"}, time.Now()); err != nil {
		t.Fatal(err)
	}
	c, err = fresh.HubCredentials(id, []string{"localhost"}, time.Now())
	if err != nil || AuthorityOf(c.Authorities[0]) != known {
		t.Errorf("after it was put back: %v", err)
	}
	secret.data["authority-0.pem"] = []byte("nonsense")
	if _, err := running.HubCredentials(id, []string{"localhost"}, time.Now()); err == nil {
		t.Error("a damaged authority is taken")
	}
	if fmt.Sprint(secret.version) != "2" {
		t.Errorf("written %d times", secret.version)
	}
}
