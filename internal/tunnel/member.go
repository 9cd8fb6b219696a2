package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Invitation is what "culvert join" prints and a spoke or an egress joins with. Its token is
// a secret, for an hour and once.
type Invitation struct {
	RemoteCluster string            `json:"remoteCluster"` // "namespace/name", for people
	UID           string            `json:"uid"`
	Role          pki.Role          `json:"role"`
	Name          string            `json:"name"`
	Hubs          []wire.HubAddress `json:"hubs"`
	Authorities   string            `json:"authorities"` // PEM
	Token         string            `json:"token"`
	Expires       time.Time         `json:"tokenExpirationTime"`
	// Targets are what a spoke allows unless it is given a policy of its own.
	Targets []v1alpha1.RemoteTarget `json:"targets,omitempty"`
}

// ReadInvitation reads the file that "culvert join" printed.
func ReadInvitation(path string) (*Invitation, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("invitation: %w", err)
	}
	var i Invitation
	if err := yaml.UnmarshalStrict(b, &i); err != nil {
		return nil, fmt.Errorf("invitation %s: not what 'culvert join' prints: %w", path, err)
	}
	if i.UID == "" || len(i.Hubs) == 0 {
		return nil, fmt.Errorf("invitation %s: uid or hubs are missing: run 'culvert join' again", path)
	}
	return &i, nil
}

// Membership is what a spoke or an egress keeps of having joined. It holds its key.
type Membership struct {
	RemoteCluster string                  `json:"remoteCluster"`
	UID           string                  `json:"uid"`
	Role          pki.Role                `json:"role"`
	Name          string                  `json:"name"`
	Hubs          []wire.HubAddress       `json:"hubs"`
	Authorities   string                  `json:"authorities"` // PEM
	Pair          string                  `json:"pair"`        // certificate and key, PEM
	Targets       []v1alpha1.RemoteTarget `json:"targets,omitempty"`
	// Invitation is the SHA-256 of the token that it joined with: another one is an invitation
	// to join anew.
	Invitation string `json:"invitation,omitempty"`
}

// Keeper is where a membership is kept: a file, or a Secret.
type Keeper interface {
	// Load returns nil when there is none yet.
	Load(ctx context.Context) (*Membership, error)
	Save(ctx context.Context, m *Membership) error
}

// FileKeeper keeps a membership in DIR/membership.json, mode 0600.
type FileKeeper struct{ Dir string }

// Load implements Keeper.
func (k FileKeeper) Load(context.Context) (*Membership, error) {
	b, err := os.ReadFile(filepath.Join(k.Dir, "membership.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // as the interface says
	}
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	var m Membership
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("state %s: membership.json is damaged: restore it, or remove it and join again", k.Dir)
	}
	return &m, nil
}

// Save implements Keeper.
func (k FileKeeper) Save(_ context.Context, m *Membership) error {
	b, err := json.Marshal(m)
	if err == nil {
		err = os.MkdirAll(k.Dir, 0o700)
	}
	if err == nil {
		err = writeFile(filepath.Join(k.Dir, "membership.json"), b)
	}
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// member is a spoke's or an egress's part in a RemoteCluster.
type member struct {
	keeper Keeper
	dialer *link.Dialer
	logger *slog.Logger
	meter  *meter.Meter
	holder identity.Holder
	now    *Membership
}

// enter loads the membership, or joins with an invitation.
func (m *member) enter(ctx context.Context, role pki.Role, invitation string) error {
	kept, err := m.keeper.Load(ctx)
	if err != nil {
		return err
	}
	var invited *Invitation
	if invitation != "" {
		if invited, err = ReadInvitation(invitation); err != nil && kept == nil {
			return err
		}
	}
	switch {
	case kept == nil && invited == nil:
		return fmt.Errorf("not joined yet: give --join the file that 'culvert join' printed")
	case invited != nil && invited.Role != role:
		return fmt.Errorf("the invitation is for a %s, not for a %s: see 'culvert join --role'", invited.Role, role)
	case kept == nil, invited != nil && invited.UID != kept.UID:
		return m.join(ctx, invited)
	}
	// The invitation may lie there for ever; it is used for want of a certificate, or when it
	// is a new one.
	if invited != nil && kept.Invitation != "" && kept.Invitation != hashOf(invited.Token) && time.Now().Before(invited.Expires) {
		return m.join(ctx, invited)
	}
	if err := usable(kept); err != nil {
		if invited == nil {
			return err
		}
		return m.join(ctx, invited)
	}
	m.now = kept
	return m.use()
}

// hashOf is a token as it may be kept.
func hashOf(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// usable reports whether a kept certificate still counts, for all that can be seen here.
func usable(kept *Membership) error {
	pair, err := parsePair("state", []byte(kept.Pair))
	if err != nil {
		return err
	}
	if end := pair.Leaf.NotAfter; time.Now().After(end) {
		return fmt.Errorf("the certificate for RemoteCluster %s expired at %s: set the clock, or join again with a new 'culvert join'", kept.RemoteCluster, end.UTC().Format(time.RFC3339))
	}
	return nil
}

// use puts the membership into effect.
func (m *member) use() error {
	authorities, err := parseAuthorities(m.now.Authorities)
	if err != nil {
		return err
	}
	pair, err := parsePair("state", []byte(m.now.Pair))
	if err != nil {
		return err
	}
	m.holder.Set(&identity.Credentials{UID: m.now.UID, Certificate: pair, Authorities: authorities})
	m.meter.Expires(pair.Leaf.NotAfter)
	return nil
}

// join makes a key and has it signed with the invitation's token. It tries until the
// token has expired or is refused.
func (m *member) join(ctx context.Context, i *Invitation) error {
	authorities, err := parseAuthorities(i.Authorities)
	if err != nil {
		return fmt.Errorf("invitation: %w", err)
	}
	m.holder.Set(&identity.Credentials{UID: i.UID, Authorities: authorities})
	m.now = &Membership{RemoteCluster: i.RemoteCluster, UID: i.UID, Role: i.Role, Name: i.Name, Hubs: i.Hubs, Authorities: i.Authorities, Targets: i.Targets, Invitation: hashOf(i.Token)}
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	for {
		err := m.request(ctx, i.Token, key)
		if err == nil {
			m.logger.Info("joined", "remoteCluster", i.RemoteCluster, "role", i.Role, "name", i.Name)
			return nil
		}
		// Several pods share a Secret, and the token works for one of them.
		if kept, e := m.keeper.Load(ctx); e == nil && kept != nil && kept.UID == i.UID && kept.Invitation == m.now.Invitation && usable(kept) == nil {
			m.logger.Info("another one has joined for all", "remoteCluster", i.RemoteCluster)
			m.now = kept
			return m.use()
		}
		var final *refusedError
		if errors.As(err, &final) || time.Now().After(i.Expires) {
			return fmt.Errorf("join %s: %w", i.RemoteCluster, err)
		}
		m.logger.Warn("cannot join yet", "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Second):
		}
	}
}

// refusedError is a hub's answer that will not change.
type refusedError struct{ text string }

func (e *refusedError) Error() string { return e.text }

// requestTimeout is for one request at one hub.
const requestTimeout = 10 * time.Second

// request has a key signed by one of the hubs and keeps what comes; without a token the
// present certificate vouches.
func (m *member) request(ctx context.Context, token string, key *ecdsa.PrivateKey) error {
	csr, err := pki.NewRequest(key)
	if err != nil {
		return err
	}
	var errs []string
	for _, h := range m.now.Hubs {
		reply, err := m.ask(ctx, h, wire.JoinRequest{Token: token, CSR: csr})
		if err == nil && reply.Error != "" {
			return &refusedError{"hub " + h.ServerName + ": " + wire.Line(reply.Error)}
		}
		if err == nil {
			return m.accept(ctx, reply, key)
		}
		errs = append(errs, fmt.Sprintf("hub %s at %s: %v", h.ServerName, h.Address, err))
	}
	return errors.New(strings.Join(errs, "; "))
}

func (m *member) ask(ctx context.Context, h wire.HubAddress, r wire.JoinRequest) (reply wire.JoinReply, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	raw, err := m.dialer.DialContext(ctx, h.Address)
	if err != nil {
		return reply, err
	}
	defer raw.Close()
	conn := tls.Client(raw, identity.Dial(&m.holder, h.ServerName, wire.ALPNJoin))
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.HandshakeContext(ctx); err != nil {
		return reply, err
	}
	if err := wire.WriteJSON(conn, r); err != nil {
		return reply, err
	}
	return reply, wire.ReadJSON(conn, &reply)
}

// accept checks a reply, keeps it and puts it into effect.
func (m *member) accept(ctx context.Context, reply wire.JoinReply, key *ecdsa.PrivateKey) error {
	next := *m.now
	if len(reply.Certificates) == 0 {
		return errors.New("the hub sent no certificate")
	}
	leaf, err := x509.ParseCertificate(reply.Certificates[0])
	if err != nil {
		return fmt.Errorf("the hub's certificate for us: %w", err)
	}
	var trusted []*x509.Certificate
	next.Authorities = ""
	for _, der := range reply.Authorities {
		a, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("the hub's authorities: %w", err)
		}
		trusted = append(trusted, a)
	}
	next.Authorities = EncodeAuthorities(trusted)
	if _, err := pki.Verify([]*x509.Certificate{leaf}, pki.Expect{UID: next.UID, Role: next.Role, Authorities: trusted, Now: time.Now()}); err != nil {
		return fmt.Errorf("the hub's certificate for us: %w", err)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return errors.New("the hub's certificate for us is for another key")
	}
	pair, err := encodePair(reply.Certificates[0], key)
	if err != nil {
		return err
	}
	next.Pair = string(pair)
	if len(reply.Hubs) > 0 {
		next.Hubs = reply.Hubs
	}
	if err := m.keeper.Save(ctx, &next); err != nil {
		return err
	}
	m.now = &next
	return m.use()
}

// renew renews the certificate when it is time to, until ctx ends. renewed is called with
// the end of the old one.
func (m *member) renew(ctx context.Context, hubs func() []wire.HubAddress, renewed func(until time.Time)) {
	for {
		leaf := m.holder.Get().Certificate.Leaf
		life := pki.Lifetime(leaf)
		// Those who share a certificate do not come at once: one renews it, the others adopt it.
		if !await(ctx, pki.RenewAt(leaf).Add(rand.N(life/40+1))) {
			return
		}
		if m.adopt(ctx, leaf) {
			renewed(leaf.NotAfter)
			continue
		}
		key, err := pki.NewKey()
		if err == nil {
			if known := hubs(); len(known) > 0 {
				m.now.Hubs = known
			}
			err = m.request(ctx, "", key)
		}
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			m.logger.Error("certificate not renewed", "expires", leaf.NotAfter, "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(min(max(life/50, time.Second), time.Minute)):
			}
			continue
		}
		m.logger.Info("certificate renewed", "expires", m.holder.Get().Certificate.Leaf.NotAfter)
		renewed(leaf.NotAfter)
	}
}

// await returns true at the given time, and false when ctx ends.
func await(ctx context.Context, at time.Time) bool {
	for {
		// Looked at often: clocks jump, and timers do not notice.
		select {
		case <-ctx.Done():
			return false
		case <-time.After(min(max(time.Until(at), time.Second), time.Minute)):
		}
		if !time.Now().Before(at) {
			return true
		}
	}
}

// adopt takes over what another pod has renewed already, when several share a Secret.
func (m *member) adopt(ctx context.Context, mine *x509.Certificate) bool {
	kept, err := m.keeper.Load(ctx)
	if err != nil || kept == nil || kept.UID != m.now.UID || kept.Role != m.now.Role {
		return false
	}
	pair, err := parsePair("state", []byte(kept.Pair))
	if err != nil || !pair.Leaf.NotAfter.After(mine.NotAfter) {
		return false
	}
	before := m.now
	m.now = kept
	if err := m.use(); err != nil {
		m.now = before
		return false
	}
	m.logger.Info("certificate renewed by another one", "expires", pair.Leaf.NotAfter)
	return true
}

// WritePair splits a pair into files that other programs read: DIR/tls.crt, tls.key and
// ca.crt.
func WritePair(dir string, pair []byte, authorities string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	certificate, key := pem.Decode(pair)
	if certificate == nil {
		return errors.New("no certificate")
	}
	if err := writeFile(filepath.Join(dir, "tls.key"), key); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, "ca.crt"), []byte(authorities)); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "tls.crt"), pem.EncodeToMemory(certificate))
}
