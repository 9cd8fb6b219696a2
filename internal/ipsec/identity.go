package ipsec

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// pskOwner is the identity whose holder a connection's pre-shared key authenticates: the
// daemon looks keys up by the peer's identity alone, so it must be one exact identity.
// It is RemoteID or, when that is empty, the peer's one address.
func pskOwner(c *netstate.IPsecConnection) (string, error) {
	id := c.RemoteID
	if id == "" {
		if len(c.RemoteAddresses) != 1 || strings.Contains(c.RemoteAddresses[0], "/") {
			return "", fmt.Errorf("a pre-shared key needs a remote identity: without it, or one remote address, the key would admit any peer; set remoteID")
		}
		id = c.RemoteAddresses[0]
	}
	if strings.ContainsRune(id, '*') || anyIdentity(id) || strings.ContainsRune(id, '/') && !strings.ContainsRune(id, '=') {
		return "", fmt.Errorf("remote identity %q matches several peers, which a pre-shared key must not: set remoteID to one identity", id)
	}
	if rest, ok := strings.CutPrefix(strings.ToLower(id), "asn1dn:#"); ok {
		return "", fmt.Errorf("remote identity asn1dn:#%.16s… cannot be compared with others: write the name as text", rest)
	}
	return id, nil
}

// anyIdentity reports whether the daemon reads the text as "anyone".
func anyIdentity(id string) bool {
	switch strings.ToLower(id) {
	case "", "%any", "%any6", "0.0.0.0", "::", "*":
		return true
	}
	a, err := netip.ParseAddr(id)
	return err == nil && a.IsUnspecified()
}

// canonicalIdentity makes identities that the daemon may take for the same equal. It
// errs on that side: two that come out equal here may still differ for the daemon.
func canonicalIdentity(id string) string {
	s := strings.ToLower(strings.TrimSpace(id))
	if _, rest, ok := strings.Cut(s, "}:"); ok && strings.HasPrefix(s, "{") {
		s = rest
	}
	for _, prefix := range []string{
		"fqdn:", "dns:", "email:", "rfc822:", "userfqdn:", "ipv4:", "ipv6:", "ip:", "keyid:", "asn1dn:", "asn1gn:", "uri:", "xmppaddr:",
	} {
		s = strings.TrimPrefix(s, prefix)
	}
	if h, ok := strings.CutPrefix(strings.TrimPrefix(s, "@"), "#"); ok {
		if b, err := hex.DecodeString(h); err == nil {
			s = string(b)
		}
	}
	s = strings.TrimLeft(s, "@")
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Unmap().String()
	}
	if strings.ContainsRune(s, '=') {
		fields := strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == '/' })
		for i, f := range fields {
			k, v, _ := strings.Cut(f, "=")
			fields[i] = strings.TrimSpace(k) + "=" + strings.TrimSpace(v)
		}
		s = strings.Join(fields, ",")
	}
	return s
}
