package model

import (
	"bytes"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// Lengths of an IKE pre-shared key, in bytes. Anyone who poses as the gateway can try
// short ones offline (RFC 7296, section 2.15).
const (
	minimumPresharedKey = 8
	maximumPresharedKey = 4096
)

// minimumRSA is the shortest RSA modulus in use, in bits.
const minimumRSA = 2048

// secretKey reads one key of a Secret in the object's namespace. Nil: it is not there, and
// that has been said.
func (p *parser) secretKey(r *report, field, name, key string) []byte {
	switch {
	case name == "":
		r.refuse(field+".name", ReasonInvalidSpec, "is missing: name a Secret in namespace %s", r.e.ref.ID.Namespace)
		return nil
	case !isDNSName(name):
		r.refuse(field+".name", ReasonInvalidSpec, "%s is not the name of a Secret", quote(name))
		return nil
	case key == "":
		r.refuse(field+".key", ReasonInvalidSpec, "is missing: name the key in the Secret's data")
		return nil
	case len(key) > 253 || strings.Trim(key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != "":
		r.refuse(field+".key", ReasonInvalidSpec, "%s is not a key of a Secret: use letters, digits, '-', '_' and '.'", quote(key))
		return nil
	}
	if p.opts.SecretsElsewhere {
		return nil
	}
	id := ID{r.e.ref.ID.Namespace, name}
	s, ok := p.secrets[id]
	if !ok {
		r.await(field, ReasonSecretNotFound, "there is no Secret %s: create it, with key %s", id, quote(key))
		return nil
	}
	v, ok := secretValue(s, key)
	if !ok {
		r.await(field, ReasonSecretNotFound, "Secret %s has no key %s: add it, or correct the name", id, quote(key))
		return nil
	}
	if len(v) == 0 {
		r.refuse(field, ReasonInvalidSecret, "key %s of Secret %s is empty", quote(key), id)
		return nil
	}
	return v
}

// secretValue also reads stringData, which only files have; as in an API server, it wins.
func secretValue(s *corev1.Secret, key string) ([]byte, bool) {
	if v, ok := s.StringData[key]; ok {
		return []byte(v), true
	}
	v, ok := s.Data[key]
	return v, ok
}

// wireGuardPresharedKey reads 32 bytes in base64; nil is none.
func (p *parser) wireGuardPresharedKey(r *report, field string, ref *v1alpha1.SecretKeyReference) secret.Bytes {
	if ref == nil {
		return secret.Bytes{}
	}
	v := p.secretKey(r, field, ref.Name, ref.Key)
	if v == nil {
		return secret.Bytes{}
	}
	// The parser's own words would repeat the key.
	k, err := netstate.ParseKey(string(bytes.TrimSpace(v)))
	if err != nil || k.IsZero() {
		r.refuse(field, ReasonInvalidSecret, "key %s of Secret %s/%s is no WireGuard pre-shared key (32 bytes in base64): put there what 'wg genpsk' prints", quote(ref.Key), r.e.ref.ID.Namespace, ref.Name)
		return secret.Bytes{}
	}
	return secret.New(k[:])
}

// ipsecAuth reads the credentials of an IPsec site.
func (p *parser) ipsecAuth(r *report, s *IPsecSite, a *v1alpha1.IPsecAuth) netstate.IPsecAuth {
	switch {
	case a.PresharedKeySecretRef != nil && a.Certificate != nil:
		r.refuse("spec.ipsec.auth", ReasonInvalidSpec, "has both presharedKeySecretRef and certificate: leave one of them out")
	case a.PresharedKeySecretRef != nil:
		return netstate.IPsecAuth{PresharedKey: p.ipsecPresharedKey(r, a.PresharedKeySecretRef)}
	case a.Certificate != nil:
		return p.ipsecCertificate(r, s, a.Certificate)
	default:
		r.refuse("spec.ipsec.auth", ReasonInvalidSpec, "has neither presharedKeySecretRef nor certificate: say how both sides prove who they are")
	}
	return netstate.IPsecAuth{}
}

func (p *parser) ipsecPresharedKey(r *report, ref *v1alpha1.SecretKeyReference) secret.Bytes {
	const field = "spec.ipsec.auth.presharedKeySecretRef"
	v := p.secretKey(r, field, ref.Name, ref.Key)
	if v == nil {
		return secret.Bytes{}
	}
	v = bytes.TrimSuffix(bytes.TrimSuffix(v, []byte("\n")), []byte("\r"))
	where := fmt.Sprintf("key %s of Secret %s/%s", quote(ref.Key), r.e.ref.ID.Namespace, ref.Name)
	if len(v) < minimumPresharedKey {
		r.refuse(field, ReasonInvalidSecret, "%s has %d bytes, which can be guessed: use at least %d, better 32 random ones", where, len(v), minimumPresharedKey)
		return secret.Bytes{}
	}
	if len(v) > maximumPresharedKey {
		r.refuse(field, ReasonInvalidSecret, "%s has %d bytes: use at most %d", where, len(v), maximumPresharedKey)
		return secret.Bytes{}
	}
	return secret.New(v)
}

func (p *parser) ipsecCertificate(r *report, s *IPsecSite, c *v1alpha1.IPsecCertificate) netstate.IPsecAuth {
	const field = "spec.ipsec.auth.certificate"
	var out netstate.IPsecAuth
	name := c.CertificateSecretRef.Name
	chain := p.secretKey(r, field+".certificateSecretRef", name, corev1.TLSCertKey)
	var key []byte
	if chain != nil {
		key = p.secretKey(r, field+".certificateSecretRef", name, corev1.TLSPrivateKeyKey)
	}
	if chain != nil && key != nil {
		if why := checkKeyPair(chain, key, s.LocalID); why != "" {
			r.refuse(field+".certificateSecretRef", ReasonInvalidSecret, "Secret %s/%s: %s", r.e.ref.ID.Namespace, name, why)
		}
		out.Certificate, out.PrivateKey = bytes.Clone(chain), secret.New(key)
	}
	if cas := p.secretKey(r, field+".caSecretRef", c.CASecretRef.Name, c.CASecretRef.Key); cas != nil {
		if why := checkAuthorities(cas); why != "" {
			r.refuse(field+".caSecretRef", ReasonInvalidSecret, "key %s of Secret %s/%s: %s", quote(c.CASecretRef.Key), r.e.ref.ID.Namespace, c.CASecretRef.Name, why)
		}
		out.RemoteCAs = bytes.Clone(cas)
	}
	if ref := c.CRLSecretRef; ref != nil {
		if crls := p.secretKey(r, field+".crlSecretRef", ref.Name, ref.Key); crls != nil {
			if why := checkCRLs(crls); why != "" {
				r.refuse(field+".crlSecretRef", ReasonInvalidSecret, "key %s of Secret %s/%s: %s", quote(ref.Key), r.e.ref.ID.Namespace, ref.Name, why)
			}
			out.RevokedBy = bytes.Clone(crls)
		}
	}
	return out
}

// checkKeyPair says what is wrong with a certificate and its key, without a word of either.
// Whether it has expired is not asked: that changes by itself.
func checkKeyPair(chain, key []byte, localID string) string {
	certs, why := parseCertificates(chain)
	if why != "" {
		return "tls.crt " + why
	}
	leaf := certs[0]
	if k, ok := leaf.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < minimumRSA {
		return fmt.Sprintf("the RSA key in tls.crt has %d bits: make one with at least %d, or an ECDSA key", k.N.BitLen(), minimumRSA)
	}
	if _, err := tls.X509KeyPair(chain, key); err != nil {
		if block, _ := pem.Decode(key); block == nil {
			return "tls.key holds no PEM: put the certificate's private key there, unencrypted"
		}
		return "tls.key is not the private key of the first certificate in tls.crt, or is encrypted: put the matching key there, unencrypted PEM"
	}
	if localID != "" && !certifies(leaf, localID) {
		return fmt.Sprintf("the certificate does not name localID %s: issue it with this subject alternative name, or correct localID", quote(localID))
	}
	return ""
}

// certifies reports whether a certificate names an identity. A distinguished name is left
// to the IKE daemon.
func certifies(c *x509.Certificate, id string) bool {
	if strings.Contains(id, "=") || strings.Contains(id, ":") && net.ParseIP(id) == nil {
		return true
	}
	if ip := net.ParseIP(id); ip != nil {
		for _, a := range c.IPAddresses {
			if a.Equal(ip) {
				return true
			}
		}
		return false
	}
	id = strings.TrimPrefix(id, "@")
	for _, l := range [][]string{c.DNSNames, c.EmailAddresses} {
		for _, n := range l {
			if strings.EqualFold(n, id) {
				return true
			}
		}
	}
	return false
}

func checkAuthorities(data []byte) string {
	certs, why := parseCertificates(data)
	if why != "" {
		return why
	}
	for _, c := range certs {
		if !c.IsCA {
			return fmt.Sprintf("the certificate of %s is not that of an authority (CA:TRUE): put the issuer's certificate there", quote(c.Subject.String()))
		}
	}
	return ""
}

// parseCertificates reads PEM certificates, one at least.
func parseCertificates(data []byte) (out []*x509.Certificate, why string) {
	for rest := data; ; {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			if len(bytes.TrimSpace(rest)) != 0 && len(out) > 0 {
				return nil, "has something after the last PEM block: remove it"
			}
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Sprintf("has a PEM block of type %s: put only certificates there", quote(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Sprintf("has a certificate that cannot be read (number %d): replace it", len(out)+1)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, "holds no PEM certificate: put one there, beginning with -----BEGIN CERTIFICATE-----"
	}
	return out, ""
}

func checkCRLs(data []byte) string {
	n := 0
	for rest := data; ; n++ {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			return fmt.Sprintf("has a PEM block of type %s: put only revocation lists there", quote(block.Type))
		}
		if _, err := x509.ParseRevocationList(block.Bytes); err != nil {
			return fmt.Sprintf("has a revocation list that cannot be read (number %d): replace it", n+1)
		}
	}
	if n == 0 {
		return "holds no PEM revocation list: put one there, beginning with -----BEGIN X509 CRL-----"
	}
	return ""
}
