package ipsec

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// What is offered and accepted when a connection names no proposals. Weak algorithms
// are never implied.
var (
	defaultIKE = []string{
		"aes256gcm16-prfsha384-ecp384", "aes256gcm16-prfsha384-x25519",
		"aes256gcm16-prfsha256-x25519", "aes256gcm16-prfsha256-ecp256", "aes256gcm16-prfsha384-modp4096",
		"aes256-sha384-ecp384", "aes256-sha256-x25519", "aes256-sha256-modp4096",
	}
	defaultESP = []string{
		"aes256gcm16-x25519", "aes256gcm16-ecp384", "aes256gcm16-modp4096", "aes256gcm16", "aes256-sha384", "aes256-sha256",
	}
)

// connection is a desired connection, checked and turned into the daemon's terms.
type connection struct {
	netstate.IPsecConnection
	load     *vici.Section     // the request of load-conn
	children []string          // names of the child SAs, in order
	owner    string            // of the pre-shared key; empty: certificates
	certs    []blob            // to load besides
	own      *x509.Certificate // our certificate; nil: pre-shared key
	digest   string            // equal for equal connections; no key can be told from it
}

// blob is a certificate or CRL for load-cert.
type blob struct{ kind, flag, der string }

var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.-]{0,199}$`)

// newConnection checks c. digestKey keys the digest.
func newConnection(c netstate.IPsecConnection, datapath netstate.IPsecDatapath, digestKey []byte) (*connection, error) {
	if !validName.MatchString(c.Name) {
		return nil, fmt.Errorf("connection name %q: letters, digits, '-' and '.' only", c.Name)
	}
	if len(c.LocalSelectors) == 0 || len(c.RemoteSelectors) == 0 {
		return nil, errors.New("both sides need at least one traffic selector")
	}
	if c.Initiate == netstate.InitiateOnTraffic && datapath == netstate.LibIPsec {
		return nil, errors.New("initiate: OnTraffic needs ESP in the kernel, which this host does not have: use Always or Never")
	}
	out := &connection{IPsecConnection: c, load: &vici.Section{}}
	s := out.load.Add(c.Name)
	s.Set("version", "2").Set("mobike", "yes").Set("unique", "replace").Set("fragmentation", "yes")
	if len(c.LocalAddresses) > 0 {
		s.SetList("local_addrs", c.LocalAddresses...)
	}
	if len(c.RemoteAddresses) > 0 {
		s.SetList("remote_addrs", c.RemoteAddresses...)
	}
	s.SetList("proposals", or(c.IKEProposals, defaultIKE)...)
	s.Set("keyingtries", keyingTries(c.Initiate))
	setLifetime(s, "over_time", c.IKELifetime, 0)
	setSeconds(s, "dpd_delay", dpdDelay(&c))
	if datapath == netstate.LibIPsec {
		s.Set("encap", "yes")
	}
	if err := out.setAuth(s); err != nil {
		return nil, err
	}
	if err := out.setChildren(s.Add("children"), datapath); err != nil {
		return nil, err
	}
	return out, out.setDigest(digestKey)
}

func or(a, b []string) []string {
	if len(a) > 0 {
		return a
	}
	return b
}

// keyingTries is how often the daemon itself repeats an unanswered attempt (0: for ever).
func keyingTries(i netstate.IPsecInitiate) string {
	if i == netstate.InitiateAlways {
		return "0"
	}
	return "1"
}

// dpdDelay lets the side that initiates ask first, since only that side can follow when a
// NAT in front of it changes (RFC 4555, section 3.8), and it does so only when it asks; it
// does not ask while it is asked.
func dpdDelay(c *netstate.IPsecConnection) time.Duration {
	if c.Initiate == netstate.InitiateNever {
		return 3 * c.DPDDelay
	}
	return c.DPDDelay
}

func setSeconds(s *vici.Section, key string, d time.Duration) {
	if d > 0 {
		s.Set(key, strconv.FormatInt(max(1, int64(d/time.Second)), 10))
	}
}

// setLifetime makes an SA rekeyed after 90 to 100 % of d, and leaves at least a minute
// (the daemon by itself: a tenth of d) for that before the SA ends. The end is given as a
// time since base.
func setLifetime(s *vici.Section, endKey string, d, base time.Duration) {
	if d > 0 {
		setSeconds(s, "rekey_time", d)
		s.Set("rand_time", strconv.FormatInt(int64(d/10/time.Second), 10))
		setSeconds(s, endKey, base+max(d/10, time.Minute))
	}
}

func (c *connection) setAuth(s *vici.Section) error {
	psk, cert := !c.Auth.PresharedKey.IsZero(), len(c.Auth.Certificate) > 0
	local, remote := s.Add("local"), s.Add("remote")
	if c.LocalID != "" {
		local.Set("id", c.LocalID)
	}
	switch {
	case psk == cert:
		return errors.New("exactly one of a pre-shared key and a certificate is needed")
	case psk:
		var err error
		if c.owner, err = pskOwner(&c.IPsecConnection); err != nil {
			return err
		}
		local.Set("auth", "psk")
		remote.Set("auth", "psk").Set("id", c.owner)
		return nil
	}
	local.Set("auth", "pubkey")
	remote.Set("auth", "pubkey")
	if c.RemoteID != "" {
		remote.Set("id", c.RemoteID)
	}
	return c.setCertificates(local, remote)
}

func (c *connection) setCertificates(local, remote *vici.Section) error {
	own, err := blobs(c.Auth.Certificate, "CERTIFICATE", "X509", "NONE")
	if err != nil {
		return fmt.Errorf("our certificate: %w", err)
	}
	cas, err := blobs(c.Auth.RemoteCAs, "CERTIFICATE", "X509", "CA")
	if err != nil {
		return fmt.Errorf("the peer's CA certificates: %w", err)
	}
	if len(own) == 0 || len(cas) == 0 || c.Auth.PrivateKey.IsZero() {
		return errors.New("certificate authentication needs our certificate, its private key and the peer's CA certificates, all in PEM")
	}
	crls, err := blobs(c.Auth.RevokedBy, "X509 CRL", "X509_CRL", "")
	if err != nil {
		return fmt.Errorf("the CRLs: %w", err)
	}
	if c.own, err = x509.ParseCertificate([]byte(own[0].der)); err != nil {
		return fmt.Errorf("our certificate: %w", err)
	}
	local.SetList("certs", own[0].der)
	names := make([]string, len(cas))
	for i, ca := range cas {
		names[i] = ca.der
	}
	remote.SetList("cacerts", names...)
	if len(crls) > 0 {
		remote.Set("revocation", "strict")
	}
	c.certs = append(append(own, cas...), crls...)
	return nil
}

// blobs takes the blocks of one type out of PEM text.
func blobs(text []byte, block, kind, flag string) ([]blob, error) {
	var out []blob
	for {
		var p *pem.Block
		if p, text = pem.Decode(text); p == nil {
			return out, nil
		}
		if p.Type != block {
			continue
		}
		if len(p.Bytes) > vici.MaxValue {
			return nil, fmt.Errorf("%s of %d bytes: the IKE daemon takes at most %d", block, len(p.Bytes), vici.MaxValue)
		}
		out = append(out, blob{kind: kind, flag: flag, der: string(p.Bytes)})
	}
}

// setChildren makes one child SA per family with all its selectors, or one per pair.
func (c *connection) setChildren(s *vici.Section, datapath netstate.IPsecDatapath) error {
	for _, family := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		local, remote := ofFamily(c.LocalSelectors, family), ofFamily(c.RemoteSelectors, family)
		if len(local) == 0 || len(remote) == 0 {
			continue
		}
		name := fmt.Sprintf("%s-%d", c.Name, family)
		if !c.ChildPerPair {
			c.addChild(s, name, local, remote, datapath)
			continue
		}
		for i, l := range local {
			for j, r := range remote {
				c.addChild(s, fmt.Sprintf("%s-%d-%d", name, i, j), []string{l}, []string{r}, datapath)
			}
		}
	}
	if len(c.children) == 0 {
		return errors.New("the traffic selectors of the two sides have no address family in common")
	}
	return nil
}

func ofFamily(all []netip.Prefix, f netstate.Family) []string {
	var out []string
	for _, p := range all {
		if netstate.FamilyOf(p.Addr()) == f {
			out = append(out, p.String())
		}
	}
	return out
}

func (c *connection) addChild(children *vici.Section, name string, local, remote []string, datapath netstate.IPsecDatapath) {
	c.children = append(c.children, name)
	s := children.Add(name)
	s.SetList("local_ts", local...).SetList("remote_ts", remote...)
	s.SetList("esp_proposals", or(c.ESPProposals, defaultESP)...)
	setLifetime(s, "life_time", c.ChildLifetime, c.ChildLifetime)
	s.Set("mode", "tunnel").Set("policies", "yes").Set("start_action", "none").Set("close_action", "none")
	switch c.Initiate {
	case netstate.InitiateAlways:
		s.Set("dpd_action", "restart")
	case netstate.InitiateOnTraffic:
		s.Set("start_action", "trap").Set("dpd_action", "trap")
	default:
		s.Set("dpd_action", "clear")
	}
	if datapath == netstate.KernelESP {
		s.Set("set_mark_out", fmt.Sprintf("%#x/%#x", netstate.MarkOuter, netstate.MarkMask))
		if c.InterfaceID != 0 {
			id := strconv.FormatUint(uint64(c.InterfaceID), 10)
			s.Set("if_id_in", id).Set("if_id_out", id)
		}
	}
}

// setDigest digests all that the daemon is told, keys included, under a key.
func (c *connection) setDigest(key []byte) error {
	b, err := c.load.Encode(nil)
	if err != nil {
		return err
	}
	h := hmac.New(sha256.New, key)
	part := func(b []byte) { fmt.Fprintf(h, "%d:%s", len(b), b) }
	part(b)
	part([]byte(c.Initiate))
	part(c.Auth.PresharedKey.Reveal())
	part(c.Auth.PrivateKey.Reveal())
	for _, x := range c.certs {
		part([]byte(x.der))
	}
	c.digest = hex.EncodeToString(h.Sum(nil))
	return nil
}
