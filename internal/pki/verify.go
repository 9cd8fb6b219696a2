package pki

import (
	"crypto/x509"
	"fmt"
	"slices"
	"time"
)

// Expect is what a peer's certificate must be.
type Expect struct {
	UID         string
	Role        Role
	Name        string // empty: any
	Authorities []*x509.Certificate
	Revoked     Revocations
	Now         time.Time
}

// Verify checks the chain that a peer has shown, the leaf first, and returns who it is.
// The error says what is wrong in one line and is an ErrIdentity. It belongs into
// tls.Config.VerifyConnection: resumed sessions skip VerifyPeerCertificate.
func Verify(chain []*x509.Certificate, e Expect) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, fmt.Errorf("%w: there is none", ErrIdentity)
	}
	leaf := chain[0]
	id, err := IdentityOf(leaf)
	if err != nil {
		return Identity{}, err
	}
	switch {
	case id.UID != e.UID:
		return id, fmt.Errorf("%w: it is of another RemoteCluster (UID %s)", ErrIdentity, id.UID)
	case id.Role != e.Role:
		return id, fmt.Errorf("%w: it is of a %s, not of a %s", ErrIdentity, id.Role, e.Role)
	case e.Name != "" && id.Name != e.Name:
		return id, fmt.Errorf("%w: it is of %s %q, not of %q", ErrIdentity, id.Role, id.Name, e.Name)
	case !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{usage(e.Role)}):
		return id, fmt.Errorf("%w: its extended key usage is not that of a %s", ErrIdentity, e.Role)
	}
	roots := x509.NewCertPool()
	for _, a := range e.Authorities {
		roots.AddCert(a)
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: e.Now, KeyUsages: []x509.ExtKeyUsage{usage(e.Role)}})
	switch {
	case err != nil && e.Now.After(leaf.NotAfter):
		return id, fmt.Errorf("%w: it expired at %s: join again, or set the clock", ErrIdentity, leaf.NotAfter.UTC().Format(time.RFC3339))
	case err != nil && e.Now.Before(leaf.NotBefore):
		return id, fmt.Errorf("%w: it is valid only from %s: set the clock", ErrIdentity, leaf.NotBefore.UTC().Format(time.RFC3339))
	case err != nil:
		return id, fmt.Errorf("%w: %w", ErrIdentity, err)
	case e.Revoked.Revoked(leaf, id):
		return id, fmt.Errorf("%w: it has been revoked", ErrIdentity)
	}
	return id, nil
}

// Revocation takes the certificates of one owner back.
type Revocation struct {
	Role Role   `json:"role"`
	Name string `json:"name"`
	// Before is the time of the revocation: certificates issued until then no longer count,
	// so that the owner can join again under its name.
	Before time.Time `json:"before"`
}

// Revocations are all that are in force.
type Revocations []Revocation

// Revoked reports whether a certificate no longer counts. Certificates begin earlier than
// they are issued, by the allowance for clocks.
func (r Revocations) Revoked(c *x509.Certificate, id Identity) bool {
	return slices.ContainsFunc(r, func(x Revocation) bool {
		return x.Role == id.Role && x.Name == id.Name && !c.NotBefore.Add(skew).After(x.Before)
	})
}

// Prune leaves out what no certificate can be under any more.
func (r Revocations) Prune(now time.Time) Revocations {
	return slices.DeleteFunc(slices.Clone(r), func(x Revocation) bool { return now.After(x.Before.Add(LeafLifetime + skew)) })
}
