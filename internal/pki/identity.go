// Package pki decides over certificates of the reversed tunnel: who is who, what is
// issued to whom, when it is renewed, and what no longer counts.
//
// Every RemoteCluster has authorities of its own, so that a certificate of one tenant is
// nothing to another one. A certificate says in one URI whose it is and in which role, and
// its extended key usage says the same again: a spoke cannot be a hub, and a client of the
// hub cannot be a spoke. The package is pure: time, keys and randomness are arguments.
package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// Role is what the owner of a certificate does.
type Role string

// The roles.
const (
	Hub    Role = "hub"    // accepts spokes and clients
	Spoke  Role = "spoke"  // dials hubs and gives access to the remote cluster
	Client Role = "client" // asks hubs for targets: egress, Prometheus, people
)

// Identity is who a certificate is for.
type Identity struct {
	UID  string // of the RemoteCluster
	Role Role
	Name string // of the hub (its number), spoke or client
}

const scheme = "culvert"

// String is the URI in the certificate: "culvert://UID/ROLE/NAME".
func (i Identity) String() string {
	return (&url.URL{Scheme: scheme, Host: i.UID, Path: "/" + string(i.Role) + "/" + i.Name}).String()
}

// Check reports whether the identity can be written into a certificate and read back.
func (i Identity) Check() error {
	if !plain(i.UID, 63) {
		return fmt.Errorf("UID %q: use lower-case letters, digits and '-', at most 63", i.UID)
	}
	if !plain(i.Name, 253) {
		return fmt.Errorf("name %q: use lower-case letters, digits, '-' and '.', at most 253", i.Name)
	}
	switch i.Role {
	case Hub, Spoke, Client:
		return nil
	}
	return fmt.Errorf("role %q: use hub, spoke or client", i.Role)
}

func plain(s string, most int) bool {
	if s == "" || len(s) > most || strings.Trim(s, ".-") != s {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
	}) < 0
}

// ErrIdentity is a certificate that is not one of ours, or not of whom it should be.
var ErrIdentity = errors.New("wrong certificate")

// IdentityOf reads whose a certificate is. It verifies nothing: see Verify.
func IdentityOf(c *x509.Certificate) (Identity, error) {
	if len(c.URIs) != 1 || c.URIs[0].Scheme != scheme {
		return Identity{}, fmt.Errorf("%w: it does not say whose it is (one URI %s://…)", ErrIdentity, scheme)
	}
	u := c.URIs[0]
	role, name, _ := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	id := Identity{UID: u.Host, Role: Role(role), Name: name}
	if err := id.Check(); err != nil || id.String() != u.String() {
		return Identity{}, fmt.Errorf("%w: its URI %q is not one of ours", ErrIdentity, u)
	}
	return id, nil
}

// usage is the extended key usage of a role: hubs only serve, the others only dial.
func usage(r Role) x509.ExtKeyUsage {
	if r == Hub {
		return x509.ExtKeyUsageServerAuth
	}
	return x509.ExtKeyUsageClientAuth
}
