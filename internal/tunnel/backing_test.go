package tunnel

import (
	"bytes"
	"context"
	"crypto/x509"
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

// An authority is followed by the next one: it is trusted everywhere before it signs, and
// who was away meanwhile but for less than a certificate's life is let in.
func TestAuthorityIsFollowed(t *testing.T) {
	secret := &fakeSecret{}
	id := pki.Identity{UID: uid, Role: pki.Hub, Name: "0"}
	first, second := SecretState(secret, never), SecretState(secret, never)
	begin := time.Now()
	credentials := func(s *State, at time.Duration) (signer *x509.Certificate, trusted int) {
		t.Helper()
		c, err := s.HubCredentials(id, []string{"localhost"}, begin.Add(at))
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range c.Authorities {
			if c.Certificate.Leaf.CheckSignatureFrom(a) == nil {
				signer = a
			}
		}
		return signer, len(c.Authorities)
	}
	old, _ := credentials(first, 0)
	day := 24 * time.Hour
	issued := func(at time.Duration) *x509.Certificate { // to a spoke, by the other hub
		t.Helper()
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		var reply wire.JoinReply
		err = second.change(func(f files) error {
			j := &joiner{state: second, uid: uid, hubs: noHubs}
			reply, err = j.issue(f, pki.Request{Identity: pki.Identity{UID: uid, Role: pki.Spoke, Name: "s"}, PublicKey: key.Public(), Now: begin.Add(at)})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(reply.Certificates[0])
		if err != nil {
			t.Fatal(err)
		}
		return leaf
	}
	last := 4*365*day - 10*day // of the old one alone, and some days more
	for _, x := range []struct {
		at      time.Duration
		trusted int
		old     bool
	}{{last, 1, true}, {last + 11*day, 2, true}, {last + 23*day, 2, true}, {last + 26*day, 2, false}, {5*365*day + day, 1, false}} {
		signer, trusted := credentials(first, x.at)
		if trusted != x.trusted || signer.Equal(old) != x.old {
			t.Errorf("after %s: %d are trusted, signed by the old one: %v", x.at, trusted, signer.Equal(old))
		}
		leaf := issued(x.at)
		if (leaf.CheckSignatureFrom(old) == nil) != x.old {
			t.Errorf("after %s: a spoke's certificate is by another one than the hub's", x.at)
		}
		// It counts at the first hub, until it has to be renewed.
		for _, later := range []time.Duration{0, 5 * day} {
			c, err := first.HubCredentials(id, []string{"localhost"}, begin.Add(x.at+later))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := pki.Verify([]*x509.Certificate{leaf}, pki.Expect{UID: uid, Role: pki.Spoke, Authorities: c.Authorities, Now: begin.Add(x.at + later)}); err != nil {
				t.Errorf("issued after %s, used %s later: %v", x.at, later, err)
			}
		}
	}
}
