package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// authority issues the cluster's certificates, all into one directory: NAME.crt and
// NAME.key.
type authority struct {
	directory string
	name      string
	own       *x509.Certificate
	key       *ecdsa.PrivateKey
}

// subject is who a certificate is for.
type subject struct {
	user   string // common name: Kubernetes' user
	groups []string
	dns    []string
	ips    []netip.Addr
}

func newAuthority(directory, name string) (*authority, error) {
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return nil, err
	}
	a := &authority{directory: directory, name: name}
	template := certificate(subject{user: "cvk-" + name})
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = nil
	var err error
	if a.key, err = a.issue(name, template); err != nil {
		return nil, err
	}
	return a, nil
}

func certificate(s subject) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		panic(err) // the system has no randomness
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: s.user, Organization: s.groups},
		DNSNames:     s.dns,
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, a := range s.ips {
		t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
	}
	return t
}

// cert issues a certificate for both ends of a connection.
func (a *authority) cert(name string, s subject) error {
	_, err := a.issue(name, certificate(s))
	return err
}

func (a *authority) issue(name string, template *x509.Certificate) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	parent, signer := a.own, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, fmt.Errorf("certificate %s: %w", name, err)
	}
	if a.own == nil {
		if a.own, err = x509.ParseCertificate(der); err != nil {
			return nil, err
		}
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	return key, errors.Join(
		a.write(name+".crt", "CERTIFICATE", der),
		a.write(name+".key", "PRIVATE KEY", private),
		a.write(name+".pub", "PUBLIC KEY", public),
	)
}

func (a *authority) write(file, kind string, der []byte) error {
	return os.WriteFile(filepath.Join(a.directory, file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// kubeconfig writes NAME.kubeconfig for a user with a certificate of its own.
func (a *authority) kubeconfig(name, server string, s subject) error {
	if err := a.cert(name, s); err != nil {
		return err
	}
	file := func(f string) string { return filepath.Join(a.directory, f) }
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- {name: cvk, cluster: {server: %q, certificate-authority: %s}}
users:
- {name: %[3]q, user: {client-certificate: %[4]s, client-key: %[5]s}}
contexts:
- {name: cvk, context: {cluster: cvk, user: %[3]q}}
current-context: cvk
`, server, file(a.name+".crt"), s.user, file(name+".crt"), file(name+".key"))
	return os.WriteFile(file(name+".kubeconfig"), []byte(text), 0o600)
}
