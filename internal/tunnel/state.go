package tunnel

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// State is what the hub's side of one RemoteCluster keeps in a directory of its own below
// --state. The hubs of a RemoteCluster that run on one host share it.
//
//	uid                 when the manifest has none
//	authority-N.pem     certificate and private key of an authority
//	hub-N.pem           certificate and private key of replica N
//	tokens.json         what is known of tokens: hashes
//	revoked.json        certificates that were taken back
//	lock                held for the time of a change
type State struct{ dir string }

// OpenState opens, or makes, the state of a RemoteCluster.
func OpenState(dir string, id model.ID) (*State, error) {
	s := &State{dir: filepath.Join(dir, "remoteclusters", id.Namespace+"."+id.Name)}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return s, nil
}

func (s *State) path(name string) string { return filepath.Join(s.dir, name) }

// locked runs f while no other process changes the directory.
func (s *State) locked(f func() error) error {
	l, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer l.Close()
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("state directory %s: lock: %w", s.dir, err)
	}
	return f()
}

// UID is the RemoteCluster's: the manifest's, else one that is made once and kept.
func (s *State) UID(manifest string) (uid string, err error) {
	if manifest != "" {
		return strings.ToLower(manifest), nil
	}
	err = s.locked(func() error {
		b, err := os.ReadFile(s.path("uid"))
		if err == nil {
			uid = strings.TrimSpace(string(b))
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		var r [16]byte
		if _, err := rand.Read(r[:]); err != nil {
			return err
		}
		r[6], r[8] = r[6]&0x0f|0x40, r[8]&0x3f|0x80 // RFC 9562, version 4
		uid = fmt.Sprintf("%x-%x-%x-%x-%x", r[:4], r[4:6], r[6:8], r[8:10], r[10:])
		return writeFile(s.path("uid"), []byte(uid+"\n"))
	})
	return uid, err
}

// authorities reads all authorities, makes one when it is time to, and says who signs and
// whom to trust. It is called with the lock held.
func (s *State) authorities(uid string, now time.Time) (signer *pki.Authority, trusted []*x509.Certificate, err error) {
	list, next, err := s.readAuthorities()
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
	p := pki.PlanAuthorities(certificates(), now)
	if p.Make {
		a, err := pki.NewAuthority(uid, now)
		if err != nil {
			return nil, nil, err
		}
		b, err := encodePair(a.Certificate.Raw, a.Key)
		if err == nil {
			err = writeFile(s.path("authority-"+strconv.Itoa(next)+".pem"), b)
		}
		if err != nil {
			return nil, nil, err
		}
		list = append(list, a)
		p = pki.PlanAuthorities(certificates(), now)
	}
	for _, i := range p.Trust {
		trusted = append(trusted, list[i].Certificate)
	}
	return list[p.Signer], trusted, nil
}

func (s *State) readAuthorities() (list []*pki.Authority, next int, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, 0, err
	}
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), "authority-")
		if !ok {
			continue
		}
		n, err := strconv.Atoi(strings.TrimSuffix(number, ".pem"))
		if err != nil {
			continue
		}
		next = max(next, n+1)
		c, err := readPair(s.path(e.Name()))
		if err != nil {
			return nil, 0, err
		}
		key, ok := c.PrivateKey.(crypto.Signer)
		if !ok {
			return nil, 0, fmt.Errorf("%s: its key cannot sign", e.Name())
		}
		list = append(list, &pki.Authority{Certificate: c.Leaf, Key: key})
	}
	return list, next, nil
}

// HubCredentials are those of a replica; its certificate is made or renewed when it is time
// to. names are those that it must hold.
func (s *State) HubCredentials(id pki.Identity, names []string, now time.Time) (c *identity.Credentials, err error) {
	err = s.locked(func() error {
		signer, trusted, err := s.authorities(id.UID, now)
		if err != nil {
			return err
		}
		file := s.path("hub-" + id.Name + ".pem")
		pair, err := readPair(file)
		if errors.Is(err, fs.ErrNotExist) || err == nil && pki.Renew(pair.Leaf, names, signer.Certificate, now) != "" {
			pair, err = issueTo(file, signer, pki.Request{Identity: id, Now: now}, names)
		}
		if err != nil {
			return err
		}
		revoked, err := s.revoked()
		c = &identity.Credentials{UID: id.UID, Certificate: pair, Authorities: trusted, Revoked: revoked}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("certificate of the hub: %w", err)
	}
	return c, nil
}

// issueTo makes a key, signs for it, and writes both to a file.
func issueTo(file string, signer *pki.Authority, r pki.Request, names []string) (*tls.Certificate, error) {
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
	b, err := encodePair(der, key)
	if err == nil {
		err = writeFile(file, b)
	}
	if err != nil {
		return nil, err
	}
	return readPair(file)
}

// Issue makes a certificate and key for a client that renews nothing itself; they are the
// caller's to keep.
func (s *State) Issue(id pki.Identity, now time.Time) (pair []byte, trusted []*x509.Certificate, err error) {
	err = s.locked(func() error {
		signer, all, err := s.authorities(id.UID, now)
		if err != nil {
			return err
		}
		trusted = all
		key, err := pki.NewKey()
		if err != nil {
			return err
		}
		der, err := signer.Issue(pki.Request{Identity: id, PublicKey: key.Public(), Now: now})
		if err != nil {
			return err
		}
		pair, err = encodePair(der, key)
		return err
	})
	return pair, trusted, err
}

// NewToken makes a token for a spoke or client to join with, and says whom it may trust.
func (s *State) NewToken(id pki.Identity, now time.Time) (text string, trusted []*x509.Certificate, err error) {
	err = s.locked(func() error {
		if _, trusted, err = s.authorities(id.UID, now); err != nil {
			return err
		}
		list, err := s.tokens()
		if err != nil {
			return err
		}
		var t pki.Token
		if text, t, err = pki.NewToken(id, now); err != nil {
			return err
		}
		return s.write("tokens.json", append(pki.PruneTokens(list, now), t))
	})
	return text, trusted, err
}

func (s *State) tokens() ([]pki.Token, error) {
	var list []pki.Token
	err := s.read("tokens.json", &list)
	return list, err
}

func (s *State) revoked() (pki.Revocations, error) {
	var list pki.Revocations
	err := s.read("revoked.json", &list)
	return list, err
}

// Revoke takes the certificates of a spoke or client back.
func (s *State) Revoke(role pki.Role, name string, now time.Time) error {
	return s.locked(func() error {
		list, err := s.revoked()
		if err != nil {
			return err
		}
		list = slices.DeleteFunc(list.Prune(now), func(r pki.Revocation) bool { return r.Role == role && r.Name == name })
		return s.write("revoked.json", append(list, pki.Revocation{Role: role, Name: name, Before: now}))
	})
}

func (s *State) read(name string, into any) error {
	b, err := os.ReadFile(s.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("state file %s: %w", s.path(name), err)
	}
	return nil
}

func (s *State) write(name string, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		err = writeFile(s.path(name), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("state file %s: %w", s.path(name), err)
	}
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
	err = j.state.locked(func() error {
		list, err := j.state.tokens()
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
		if err := j.state.write("tokens.json", rest); err != nil {
			return err
		}
		reply, err = j.issue(pki.Request{Identity: id, PublicKey: key, Now: now})
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
	err = j.state.locked(func() error {
		reply, err = j.issue(pki.Request{Identity: id, PublicKey: key, Now: time.Now()})
		return err
	})
	return reply, err
}

// issue is called with the lock held.
func (j *joiner) issue(r pki.Request) (wire.JoinReply, error) {
	signer, trusted, err := j.state.authorities(j.uid, r.Now)
	if err != nil {
		return wire.JoinReply{}, err
	}
	der, err := j.outliving(signer, r)
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
func (j *joiner) outliving(signer *pki.Authority, r pki.Request) ([]byte, error) {
	revoked, err := j.state.revoked()
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

// readPair reads what encodePair made.
func readPair(path string) (*tls.Certificate, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parsePair(path, b)
}

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
