// Package identity makes TLS configurations for the reversed tunnel: TLS 1.3, both ends
// with a certificate of the same RemoteCluster, each held to its role. What certificates
// mean is decided in package pki.
package identity

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Credentials are what one end has to show and to check with.
type Credentials struct {
	UID         string
	Certificate *tls.Certificate // nil: none yet (before joining)
	Authorities []*x509.Certificate
	Revoked     pki.Revocations
}

// Holder holds the present credentials; they change while connections are made. The zero
// value holds none.
type Holder struct{ p atomic.Pointer[Credentials] }

// Set replaces the credentials; they must not be changed afterwards.
func (h *Holder) Set(c *Credentials) { h.p.Store(c) }

// Get is what was set last; nil before.
func (h *Holder) Get() *Credentials { return h.p.Load() }

func base() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // records are collected before they are sent
	}
}

// Server is the configuration of a hub's listener that takes sessions of the given role
// by the given application protocol; plain says that clients without any (HTTP CONNECT)
// are let in, in the same role. A request to join needs no certificate.
func Server(h *Holder, role pki.Role, protocol string, plain bool) *tls.Config {
	c := base()
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		now := h.Get()
		if now == nil || now.Certificate == nil {
			return nil, fmt.Errorf("no certificate yet")
		}
		c := base()
		c.Certificates = []tls.Certificate{*now.Certificate}
		c.NextProtos = []string{wire.ALPNJoin, protocol}
		joins := len(hello.SupportedProtos) > 0 && hello.SupportedProtos[0] == wire.ALPNJoin
		switch {
		case joins:
			c.NextProtos = []string{wire.ALPNJoin}
			c.ClientAuth = tls.RequestClientCert
		case plain:
			c.NextProtos = []string{protocol, wire.ALPNHTTP}
			c.ClientAuth = tls.RequireAnyClientCert
		default:
			c.NextProtos = []string{protocol}
			c.ClientAuth = tls.RequireAnyClientCert
		}
		c.VerifyConnection = func(s tls.ConnectionState) error {
			if !joins && !plain && s.NegotiatedProtocol != protocol {
				return fmt.Errorf("the client does not offer application protocol %s", protocol)
			}
			if joins && len(s.PeerCertificates) == 0 {
				return nil
			}
			_, err := Peer(h, s, role)
			return err
		}
		return c, nil
	}
	return c
}

// Peer checks the certificate of the other end and says who it is.
func Peer(h *Holder, s tls.ConnectionState, role pki.Role) (pki.Identity, error) {
	now := h.Get()
	return pki.Verify(s.PeerCertificates, pki.Expect{
		UID: now.UID, Role: role, Authorities: now.Authorities, Revoked: now.Revoked, Now: time.Now(),
	})
}

// Dial is the configuration to dial a hub with. It must be made anew for each connection.
// The hub must be the replica that its server name says.
func Dial(h *Holder, serverName, protocol string) *tls.Config {
	now := h.Get()
	c := base()
	c.ServerName = serverName
	c.NextProtos = []string{protocol}
	c.RootCAs = x509.NewCertPool()
	for _, a := range now.Authorities {
		c.RootCAs.AddCert(a)
	}
	if now.Certificate != nil {
		certificate := now.Certificate
		// Always, whatever authorities the hub names.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	}
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if s.NegotiatedProtocol != protocol {
			return fmt.Errorf("the hub does not speak %s", protocol)
		}
		_, err := Peer(h, s, pki.Hub)
		return err
	}
	return c
}
