package ipsec_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

const (
	day      = 24 * time.Hour
	peerDial = "#child"
	dialNow  = "start_action = start"
)

// failing is one way to keep a connection from coming up.
type failing struct {
	name   string
	peer   []string // edits of peerConf
	ours   func(*netstate.IPsecConnection)
	want   ipsec.Reason
	saying string // part of the message
}

func TestFailureWithPresharedKey(t *testing.T) {
	never := func(c *netstate.IPsecConnection) { c.Initiate = netstate.InitiateNever }
	weak := func(ike string) []string {
		return []string{"aes256gcm16-prfsha384-x25519", ike, peerDial, dialNow}
	}
	for _, f := range []failing{
		{"wrong key, we call", []string{psk, "wrong"}, nil, ipsec.ReasonAuthenticationFailed, "refuses us"},
		{"wrong key, the peer calls", []string{psk, "wrong", peerDial, dialNow}, never, ipsec.ReasonAuthenticationFailed, "another pre-shared key"},
		{"unknown identity, the peer calls", []string{"peer.example", "mallory.example", peerDial, dialNow}, never, ipsec.ReasonPeerIdentityMismatch, "mallory.example"},
		{"wrong local identity, the peer calls", []string{"gw.example", "other.example", peerDial, dialNow}, never, ipsec.ReasonPeerIdentityMismatch, "other.example"},
		{"wrong identity, we call", []string{"peer.example", "mallory.example"}, nil, ipsec.ReasonAuthenticationFailed, "identities"},
		{"3DES", weak("3des-sha256-modp2048"), never, ipsec.ReasonNoProposalChosen, "3DES"},
		{"SHA-1", weak("aes256-sha1-modp2048"), never, ipsec.ReasonNoProposalChosen, "SHA1"},
		{"modp1024", weak("aes256-sha256-modp1024"), never, ipsec.ReasonNoProposalChosen, "MODP_1024"},
		{"weak, we call", weak("3des-sha1-modp1024")[:2], nil, ipsec.ReasonNoProposalChosen, "none of the proposals"},
		{"weak ESP", []string{"aes256gcm16-x25519", "3des-sha1"}, nil, ipsec.ReasonNoProposalChosen, ""},
		{"weak ESP, the peer calls", []string{"aes256gcm16-x25519", "3des-sha1", peerDial, dialNow}, never, ipsec.ReasonNoProposalChosen, "3DES"},
		{"other ranges, the peer calls", []string{"10.2.0.0/16", "10.7.0.0/16", peerDial, dialNow}, never, ipsec.ReasonTrafficSelectorsUnmatched, "10.7.0.0/16"},
		{"other ranges, we call", []string{"10.2.0.0/16", "10.7.0.0/16"}, nil, ipsec.ReasonTrafficSelectorsUnmatched, "ranges"},
		{"nobody there", nil, func(c *netstate.IPsecConnection) { c.RemoteAddresses = []string{"192.0.2.77"} }, ipsec.ReasonPeerUnreachable, "192.0.2.77"},
	} {
		t.Run(f.name, func(t *testing.T) {
			s := newSite(t)
			c := s.connection()
			if f.ours != nil {
				f.ours(&c)
			}
			s.set(c)
			newPeer(t, s.remote, peerConf(f.peer...))
			s.awaitFailure(c.Name, f.want, f.saying)
		})
	}
}

// awaitFailure waits for the reason and sees that nothing is up.
func (s *site) awaitFailure(name string, want ipsec.Reason, saying string) {
	s.t.Helper()
	labtest.Eventually(s.t, 15*time.Second, "failure "+string(want), func() error {
		c := s.observe(name)
		if c.Established {
			s.t.Fatalf("an SA came up: %+v", c)
		}
		if c.LastFailure == nil || c.LastFailure.Reason != want || !strings.Contains(c.LastFailure.Message, saying) {
			return fmt.Errorf("last failure: %+v", c.LastFailure)
		}
		if strings.Contains(c.LastFailure.Message, psk) || strings.ContainsAny(c.LastFailure.Message, "\n\r") {
			s.t.Fatalf("message %q", c.LastFailure.Message)
		}
		s.t.Logf("%s: %s", c.LastFailure.Reason, c.LastFailure.Message)
		return nil
	})
}

func TestFailureWithCertificates(t *testing.T) {
	for _, x := range []struct {
		name     string
		serial   int64
		id       string
		from, to time.Duration
		crl      func(*authority) []byte
		foreign  bool
		want     ipsec.Reason
		saying   string
	}{
		{name: "expired", id: "peer.example", from: -2 * day, to: -time.Hour, want: ipsec.ReasonCertificateExpired, saying: "renew"},
		{name: "not yet valid", id: "peer.example", from: time.Hour, to: 2 * day, want: ipsec.ReasonCertificateNotYetValid, saying: "clocks"},
		{
			name: "revoked", serial: 66, id: "peer.example", from: -time.Hour, to: day,
			crl: func(a *authority) []byte { return a.revoke(1, day, 66) }, want: ipsec.ReasonCertificateRevoked, saying: "revoked on",
		},
		{
			name: "stale CRL", serial: 67, id: "peer.example", from: -time.Hour, to: day,
			crl: func(a *authority) []byte { return a.revoke(1, -time.Minute, 66) }, want: ipsec.ReasonRevocationUnknown, saying: "CRL",
		},
		{name: "another CA", id: "peer.example", from: -time.Hour, to: day, foreign: true, want: ipsec.ReasonAuthenticationFailed, saying: "CA"},
		{name: "another name", id: "mallory.example", from: -time.Hour, to: day, want: ipsec.ReasonPeerIdentityMismatch, saying: "mallory.example"},
	} {
		for _, peerCalls := range []bool{true, false} {
			if x.name == "another name" && !peerCalls {
				continue // the peer refuses first: see wrong identity, we call
			}
			t.Run(fmt.Sprintf("%s, peer calls %t", x.name, peerCalls), func(t *testing.T) {
				s := newSite(t)
				ca := newAuthority(t, "CA of the site")
				issuer := ca
				if x.foreign {
					issuer = newAuthority(t, "another CA")
				}
				c := s.connection()
				s.certify(&c, ca)
				if x.crl != nil {
					c.Auth.RevokedBy = x.crl(ca)
				}
				var edits []string
				if peerCalls {
					c.Initiate = netstate.InitiateNever
					edits = []string{peerDial, dialNow}
				}
				s.set(c)
				cert, key := issuer.issue(x.serial+100, x.id, x.from, x.to)
				if x.serial != 0 {
					cert, key = issuer.issue(x.serial, x.id, x.from, x.to)
				}
				newCertPeer(t, s.remote, ca, x.id, cert, key, edits...)
				s.awaitFailure(c.Name, x.want, x.saying)
			})
		}
	}
}

// certify gives a connection a certificate of ca, which must also have issued the peer's.
func (s *site) certify(c *netstate.IPsecConnection, ca *authority) {
	cert, key := ca.issue(2, "gw.example", -time.Hour, day)
	c.Auth = netstate.IPsecAuth{Certificate: cert, PrivateKey: secret.New(key), RemoteCAs: ca.pem}
}

// newCertPeer starts a peer with a certificate.
func newCertPeer(t *testing.T, host *labtest.Host, ca *authority, id string, cert, key []byte, edits ...string) *peer {
	t.Helper()
	p := newPeer(t, host, "")
	p.write("x509ca/ca.pem", string(ca.pem))
	p.write("x509/peer.pem", string(cert))
	p.write("pkcs8/peer.pem", string(key))
	edits = append(edits, "auth = psk\n      id = peer.example", "auth = pubkey\n      certs = peer.pem\n      id = "+id, "auth = psk", "auth = pubkey")
	conf, _, _ := strings.Cut(peerConf(), "secrets {")
	p.conf = strings.NewReplacer(edits...).Replace(conf)
	p.loadAll()
	return p
}
