package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"net/url"
	"time"
)

const (
	// AuthorityLifetime is how long an authority is valid.
	AuthorityLifetime = 5 * 365 * 24 * time.Hour
	// LeafLifetime is how long the certificate of a hub, spoke or client is valid.
	LeafLifetime = 7 * 24 * time.Hour
	// skew is how far clocks may be apart: certificates begin that much earlier.
	skew = time.Hour + 5*time.Minute
)

// Authority signs the certificates of one RemoteCluster.
type Authority struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
}

// NewKey makes a private key, as all that this package issues certificates for.
func NewKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// NewAuthority makes an authority with a key of its own, for AuthorityLifetime.
func NewAuthority(uid string, now time.Time) (*Authority, error) {
	return Lifetimes{}.NewAuthority(uid, now)
}

// NewAuthority makes an authority with a key of its own.
func (l Lifetimes) NewAuthority(uid string, now time.Time) (*Authority, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "culvert " + uid},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(l.complete().Authority),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make an authority: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &Authority{Certificate: c, Key: key}, nil
}

func newSerial() (*big.Int, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, err
	}
	b[0] &= 0x7f // RFC 5280: positive, at most 20 bytes
	return new(big.Int).SetBytes(b[:]), nil
}

// Request is what a certificate is issued for.
type Request struct {
	Identity  Identity
	PublicKey crypto.PublicKey
	DNSNames  []string     // of a hub
	Addresses []netip.Addr // of a hub
	Now       time.Time
	Lifetime  time.Duration // zero: LeafLifetime
}

// Issue signs a certificate and returns it as DER. It never outlives the authority.
func (a *Authority) Issue(r Request) ([]byte, error) {
	if err := r.Identity.Check(); err != nil {
		return nil, fmt.Errorf("issue a certificate: %w", err)
	}
	if r.Identity.Role != Hub && (len(r.DNSNames) > 0 || len(r.Addresses) > 0) {
		return nil, fmt.Errorf("issue a certificate: a %s has no DNS names and addresses", r.Identity.Role)
	}
	if err := checkKey(r.PublicKey); err != nil {
		return nil, fmt.Errorf("issue a certificate: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	if r.Lifetime == 0 {
		r.Lifetime = LeafLifetime
	}
	uri, err := url.Parse(r.Identity.String())
	if err != nil {
		return nil, err
	}
	until := r.Now.Add(r.Lifetime)
	if until.After(a.Certificate.NotAfter) {
		until = a.Certificate.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: commonName(r.Identity)},
		NotBefore:             r.Now.Add(-skew),
		NotAfter:              until,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{usage(r.Identity.Role)},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{uri},
		DNSNames:              r.DNSNames,
	}
	for _, ip := range r.Addresses {
		template.IPAddresses = append(template.IPAddresses, ip.AsSlice())
	}
	return x509.CreateCertificate(rand.Reader, template, a.Certificate, r.PublicKey, a.Key)
}

// commonName is for people; X.520 allows 64 bytes.
func commonName(i Identity) string {
	s := string(i.Role) + " " + i.Name
	return s[:min(len(s), 64)]
}

// checkKey: P-256, P-384 and Ed25519, which every TLS 1.3 implementation has.
func checkKey(k crypto.PublicKey) error {
	switch k := k.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
	case ed25519.PublicKey:
		return nil
	}
	return errors.New("the key is of another kind than ECDSA P-256, P-384 and Ed25519: make one of these")
}

// NewRequest makes a certificate request for a key (PKCS #10, DER). It says nothing but
// the key: who one is, the signer knows.
func NewRequest(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// maxRequest is the largest certificate request.
const maxRequest = 4 << 10

// KeyOfRequest checks a certificate request and returns its key. Names in it are ignored.
func KeyOfRequest(der []byte) (crypto.PublicKey, error) {
	if len(der) > maxRequest {
		return nil, fmt.Errorf("certificate request: %d bytes, allowed are %d", len(der), maxRequest)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := checkKey(r.PublicKey); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return r.PublicKey, nil
}
