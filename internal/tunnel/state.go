package tunnel

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// State is what the hub's side of one RemoteCluster keeps: in a directory of its own below
// --state, which its hubs on one host share, or in a Secret.
//
//	uid                 when the manifest has none
//	authority-N.pem     certificate and private key of an authority
//	hub-N.pem           certificate and private key of replica N; in a directory only
//	tokens.json         what is known of tokens: hashes
//	revoked.json        certificates that were taken back
type State struct {
	backing
	mu sync.Mutex // one at a time
	// pairs are the hubs' own certificates and keys where they are not among the files: they
	// need not outlive the process, and a key is not to leave it.
	pairs *files
	// Lifetimes are those of what is issued from now on.
	Lifetimes pki.Lifetimes
}

func (s *State) change(f func(files) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.backing.change(f)
}

// OpenState opens, or makes, the state of a RemoteCluster in a directory.
func OpenState(dir string, id model.ID) (*State, error) {
	d := filepath.Join(dir, "remoteclusters", id.Namespace+"."+id.Name)
	if err := os.MkdirAll(d, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return &State{backing: directory(d)}, nil
}

// SecretState is the state of a RemoteCluster in a Secret. known is the SHA-256 (hexadecimal)
// of the authority that it must hold; empty: there may be none yet.
func SecretState(s Secret, known func() string) *State {
	return &State{backing: &secretBacking{secret: s, known: known}, pairs: &files{}}
}

// UID is the RemoteCluster's: the manifest's, else one that is made once and kept.
func (s *State) UID(manifest string) (uid string, err error) {
	if manifest != "" {
		return strings.ToLower(manifest), nil
	}
	err = s.change(func(f files) error {
		if b := f["uid"]; b != nil {
			uid = strings.TrimSpace(string(b))
			return nil
		}
		var r [16]byte
		if _, err := rand.Read(r[:]); err != nil {
			return err
		}
		r[6], r[8] = r[6]&0x0f|0x40, r[8]&0x3f|0x80 // RFC 9562, version 4
		uid = fmt.Sprintf("%x-%x-%x-%x-%x", r[:4], r[4:6], r[6:8], r[8:10], r[10:])
		f["uid"] = []byte(uid + "\n")
		return nil
	})
	return uid, err
}

// authorities reads all authorities, makes one when it is time to, and says who signs and
// whom to trust.
func (s *State) authorities(f files, uid string, now time.Time) (signer *pki.Authority, trusted []*x509.Certificate, err error) {
	list, next, err := s.readAuthorities(f)
	if err != nil {
		return nil, nil, err
	}
	certificates := func() []*x509.Certificate {
		var out []*x509.Certificate
		for _, a := range list {
			out = append(out, a.Certificate)
		}
		return out
	}
	p := pki.PlanAuthorities(certificates(), s.Lifetimes, now)
	if p.Make {
		a, err := s.Lifetimes.NewAuthority(uid, now)
		if err != nil {
			return nil, nil, err
		}
		b, err := encodePair(a.Certificate.Raw, a.Key)
		if err != nil {
			return nil, nil, err
		}
		f["authority-"+strconv.Itoa(next)+".pem"] = b
		list = append(list, a)
		p = pki.PlanAuthorities(certificates(), s.Lifetimes, now)
	}
	for _, i := range p.Trust {
		trusted = append(trusted, list[i].Certificate)
	}
	return list[p.Signer], trusted, nil
}

// readAuthorities reads them in the order of their numbers.
func (s *State) readAuthorities(f files) (list []*pki.Authority, next int, err error) {
	for _, name := range slices.Sorted(maps.Keys(f)) {
		number, ok := strings.CutPrefix(name, "authority-")
		if !ok {
			continue
		}
		n, err := strconv.Atoi(strings.TrimSuffix(number, ".pem"))
		if err != nil {
			continue
		}
		next = max(next, n+1)
		c, err := parsePair(s.where(name), f[name])
		if err != nil {
			return nil, 0, err
		}
		key, ok := c.PrivateKey.(crypto.Signer)
		if !ok {
			return nil, 0, fmt.Errorf("%s: its key cannot sign", s.where(name))
		}
		list = append(list, &pki.Authority{Certificate: c.Leaf, Key: key})
	}
	return list, next, nil
}

// AuthorityOf is the SHA-256 of a certificate, as SecretState wants it.
func AuthorityOf(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// holdsAuthority reports whether an authority is among the files.
func holdsAuthority(f files, known string) bool {
	for name, b := range f {
		if !strings.HasPrefix(name, "authority-") {
			continue
		}
		if c, err := parsePair(name, b); err == nil && AuthorityOf(c.Leaf) == known {
			return true
		}
	}
	return false
}

// HubCredentials are those of a replica; its certificate is made or renewed when it is time
// to. names are those that it must hold.
func (s *State) HubCredentials(id pki.Identity, names []string, now time.Time) (c *identity.Credentials, err error) {
	err = s.change(func(f files) error {
		signer, trusted, err := s.authorities(f, id.UID, now)
		if err != nil {
			return err
		}
		pairs, name := f, "hub-"+id.Name+".pem"
		if s.pairs != nil {
			pairs = *s.pairs
		}
		var pair *tls.Certificate
		if b := pairs[name]; b != nil {
			pair, err = parsePair(s.where(name), b)
		}
		if err == nil && (pair == nil || pki.Renew(pair.Leaf, names, signer.Certificate, now) != "") {
			if pairs[name], err = issueTo(signer, pki.Request{Identity: id, Now: now, Lifetime: s.Lifetimes.Leaf}, names); err == nil {
				pair, err = parsePair(s.where(name), pairs[name])
			}
		}
		if err != nil {
			return err
		}
		revoked, err := s.revoked(f)
		c = &identity.Credentials{UID: id.UID, Certificate: pair, Authorities: trusted, Revoked: revoked}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("certificate of the hub: %w", err)
	}
	return c, nil
}

// issueTo makes a key and signs for it.
func issueTo(signer *pki.Authority, r pki.Request, names []string) ([]byte, error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	r.PublicKey = key.Public()
	r.DNSNames, r.Addresses = splitNames(names)
	der, err := signer.Issue(r)
	if err != nil {
		return nil, err
	}
	return encodePair(der, key)
}

// Issue makes a certificate and key for a client that renews nothing itself; they are the
// caller's to keep.
func (s *State) Issue(id pki.Identity, now time.Time) (pair []byte, trusted []*x509.Certificate, err error) {
	err = s.change(func(f files) error {
		signer, all, err := s.authorities(f, id.UID, now)
		if err != nil {
			return err
		}
		trusted = all
		pair, err = issueTo(signer, pki.Request{Identity: id, Now: now, Lifetime: s.Lifetimes.Leaf}, nil)
		return err
	})
	return pair, trusted, err
}

// NewToken makes a token for a spoke or client to join with, and says whom it may trust.
func (s *State) NewToken(id pki.Identity, now time.Time) (text string, trusted []*x509.Certificate, err error) {
	err = s.change(func(f files) error {
		if _, trusted, err = s.authorities(f, id.UID, now); err != nil {
			return err
		}
		list, err := s.tokens(f)
		if err != nil {
			return err
		}
		var t pki.Token
		if text, t, err = pki.NewToken(id, now); err != nil {
			return err
		}
		return write(f, "tokens.json", append(pki.PruneTokens(list, now), t))
	})
	return text, trusted, err
}

func (s *State) tokens(f files) (list []pki.Token, err error) {
	return list, s.read(f, "tokens.json", &list)
}

func (s *State) revoked(f files) (list pki.Revocations, err error) {
	return list, s.read(f, "revoked.json", &list)
}

// Revoke takes the certificates of a spoke or client back.
func (s *State) Revoke(role pki.Role, name string, now time.Time) error {
	return s.change(func(f files) error {
		list, err := s.revoked(f)
		if err != nil {
			return err
		}
		list = slices.DeleteFunc(list.Prune(now), func(r pki.Revocation) bool { return r.Role == role && r.Name == name })
		return write(f, "revoked.json", append(list, pki.Revocation{Role: role, Name: name, Before: now}))
	})
}

func (s *State) read(f files, name string, into any) error {
	b := f[name]
	if b == nil {
		return nil
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("state file %s: %w", s.where(name), err)
	}
	return nil
}

func write(f files, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("state file %s: %w", name, err)
	}
	f[name] = append(b, '\n')
	return nil
}

// joiner answers requests for certificates from a State.
type joiner struct {
	state *State
	uid   string
	hubs  func(pki.Role) []wire.HubAddress
}

// Join implements hub.Joiner.
func (j *joiner) Join(_ context.Context, role pki.Role, token string, csr []byte) (reply wire.JoinReply, err error) {
	now := time.Now()
	key, err := pki.KeyOfRequest(csr)
	if err != nil {
		return reply, err
	}
	err = j.state.change(func(f files) error {
		list, err := j.state.tokens(f)
		if err != nil {
			return err
		}
		id, rest, err := pki.Redeem(list, token, csr, now)
		if err != nil {
			return err
		}
		if id.Role != role || id.UID != j.uid {
			return fmt.Errorf("%w: it is for a %s", pki.ErrToken, id.Role)
		}
		if err := write(f, "tokens.json", rest); err != nil {
			return err
		}
		reply, err = j.issue(f, pki.Request{Identity: id, PublicKey: key, Now: now})
		return err
	})
	return reply, err
}

// Renew implements hub.Joiner.
func (j *joiner) Renew(_ context.Context, id pki.Identity, csr []byte) (reply wire.JoinReply, err error) {
	key, err := pki.KeyOfRequest(csr)
	if err != nil {
		return reply, err
	}
	err = j.state.change(func(f files) error {
		reply, err = j.issue(f, pki.Request{Identity: id, PublicKey: key, Now: time.Now()})
		return err
	})
	return reply, err
}

func (j *joiner) issue(f files, r pki.Request) (wire.JoinReply, error) {
	r.Lifetime = j.state.Lifetimes.Leaf
	signer, trusted, err := j.state.authorities(f, j.uid, r.Now)
	if err != nil {
		return wire.JoinReply{}, err
	}
	der, err := j.outliving(f, signer, r)
	if err != nil {
		return wire.JoinReply{}, err
	}
	reply := wire.JoinReply{Certificates: [][]byte{der}, Hubs: j.hubs(r.Identity.Role)}
	for _, a := range trusted {
		reply.Authorities = append(reply.Authorities, a.Raw)
	}
	return reply, nil
}

// outliving issues a certificate that no revocation takes back: their times are in whole
// seconds, so who joins anew in the second of the revocation has to wait for the next.
func (j *joiner) outliving(f files, signer *pki.Authority, r pki.Request) ([]byte, error) {
	revoked, err := j.state.revoked(f)
	if err != nil {
		return nil, err
	}
	for {
		der, err := signer.Issue(r)
		if err != nil {
			return nil, err
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil || !revoked.Revoked(leaf, r.Identity) {
			return der, err
		}
		time.Sleep(200 * time.Millisecond)
		r.Now = time.Now()
	}
}

// encodePair is a certificate and its key as PEM.
func encodePair(der []byte, key any) ([]byte, error) {
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})...), nil
}

// parsePair reads what encodePair made.
func parsePair(path string, b []byte) (*tls.Certificate, error) {
	c, err := tls.X509KeyPair(b, b)
	if err != nil { // its text never holds the key
		return nil, fmt.Errorf("%s: no certificate with its key: restore it from a backup, or remove it: %w", path, err)
	}
	return &c, nil
}

// EncodeAuthorities is certificates as PEM.
func EncodeAuthorities(list []*x509.Certificate) string {
	var b strings.Builder
	for _, c := range list {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.String()
}

// parseAuthorities reads what EncodeAuthorities made.
func parseAuthorities(text string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := []byte(text); ; {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("authorities: %w", err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("authorities: there is no certificate")
	}
	return out, nil
}
