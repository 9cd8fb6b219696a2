package ipsec

import (
	"crypto/x509"
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

func TestPSKOwner(t *testing.T) {
	for _, x := range []struct {
		id        string
		addresses []string
		want      string // empty: refused
	}{
		{"peer.example", nil, "peer.example"},
		{"C=CH, O=x/y, CN=z", nil, "C=CH, O=x/y, CN=z"},
		{"", []string{"192.0.2.2"}, "192.0.2.2"},
		{"", []string{"vpn.example"}, "vpn.example"},
		{"", nil, ""},
		{"", []string{"192.0.2.0/24"}, ""},
		{"", []string{"192.0.2.1", "192.0.2.2"}, ""},
		{"", []string{"%any"}, ""},
		{"%any", nil, ""},
		{"%ANY", nil, ""},
		{"0.0.0.0", nil, ""},
		{"::", nil, ""},
		{"*", nil, ""},
		{"*.example", nil, ""},
		{"C=CH, CN=*", nil, ""},
		{"192.0.2.0/24", nil, ""},
		{"asn1dn:#3000", nil, ""},
	} {
		got, err := pskOwner(&netstate.IPsecConnection{RemoteID: x.id, RemoteAddresses: x.addresses})
		if (err != nil) != (x.want == "") || got != x.want {
			t.Errorf("%q at %v: %q, %v", x.id, x.addresses, got, err)
		}
	}
}

func TestCanonicalIdentity(t *testing.T) {
	for _, same := range [][]string{
		{"peer.example", "PEER.example", "@peer.example", "fqdn:peer.example", "dns:peer.example", "@@peer.example", "{2}:peer.example", " peer.example"},
		{"192.0.2.2", "ipv4:192.0.2.2", "::ffff:192.0.2.2"},
		{"2001:db8::1", "2001:DB8:0::1", "ipv6:2001:db8::1"},
		{"CN=a,O=b", "cn=A, o=b", "/CN=a/O=b", "asn1dn:CN=a, O = b"},
		{"@#6869", "keyid:hi"},
	} {
		for _, id := range same {
			if canonicalIdentity(id) != canonicalIdentity(same[0]) {
				t.Errorf("%q and %q: %q, %q", same[0], id, canonicalIdentity(same[0]), canonicalIdentity(id))
			}
		}
	}
	for _, pair := range [][2]string{{"a.example", "b.example"}, {"192.0.2.1", "192.0.2.2"}, {"CN=a", "CN=b"}} {
		if canonicalIdentity(pair[0]) == canonicalIdentity(pair[1]) {
			t.Errorf("%q and %q are taken for the same", pair[0], pair[1])
		}
	}
}

// Whatever a peer calls itself, a failure is one printable, short line, blamed on the
// connection that it concerns.
func TestLogReader(t *testing.T) {
	desired := map[string]*connection{
		"a": {IPsecConnection: netstate.IPsecConnection{RemoteID: "a.example", RemoteAddresses: []string{"192.0.2.0/25"}}},
		"b": {IPsecConnection: netstate.IPsecConnection{RemoteID: "b.example", RemoteAddresses: []string{"192.0.2.200"}}},
		"c": {IPsecConnection: netstate.IPsecConnection{RemoteID: "c.example"}},
	}
	log := func(id, msg string) *vici.Section {
		return (&vici.Section{}).Set("ikesa-uniqueid", id).Set("msg", msg)
	}
	for _, x := range []struct{ looking, blamed string }{
		{"192.0.2.1[gw]...192.0.2.5[a.example]", "a"},
		{"192.0.2.1[gw]...203.0.113.5[b.example]", "b"},
		{"192.0.2.1[gw]...192.0.2.200[who]", "b"},
		{"192.0.2.1[gw]...203.0.113.9[\x1b[31m]...[x\n]", "c"},
	} {
		l := newLogReader()
		now := time.Now()
		if l.line(log("1", "looking for peer configs matching "+x.looking), desired, now) {
			t.Errorf("%s: already a failure", x.looking)
		}
		if !l.line(log("1", "no matching peer config found"), desired, now) {
			t.Errorf("%s: nobody is blamed", x.looking)
		}
		for name := range desired {
			f, ok := l.failure(name)
			if ok != (name == x.blamed) || ok && f.Reason != ReasonPeerIdentityMismatch {
				t.Errorf("%s: %s: %v %+v", x.looking, name, ok, f)
			}
			for _, r := range f.Message {
				if r < ' ' || r == 0x7f {
					t.Errorf("%s: %q", x.looking, f.Message)
				}
			}
		}
	}
	desired["b"].own = &x509.Certificate{NotAfter: time.Now().Add(-time.Hour)}
	l := newLogReader()
	l.line(log("7", "received AUTHENTICATION_FAILED notify error").Set("ikesa-name", "b"), desired, time.Now())
	if f, _ := l.failure("b"); f.Reason != ReasonCertificateExpired {
		t.Errorf("our own expired certificate: %+v", f)
	}
	for i := range 3 * maxContexts {
		l.line(log(time.Duration(i).String(), "192.0.2.9 is initiating an IKE_SA"), desired, time.Now())
	}
	if len(l.sas) > maxContexts {
		t.Errorf("%d IKE SAs are remembered", len(l.sas))
	}
}

func TestDigest(t *testing.T) {
	key := make([]byte, 32)
	base := func() netstate.IPsecConnection {
		return netstate.IPsecConnection{
			Name: "a", RemoteID: "a.example", Auth: netstate.IPsecAuth{PresharedKey: secret.New([]byte("k"))},
			LocalSelectors: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, RemoteSelectors: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")},
		}
	}
	digest := func(edit func(*netstate.IPsecConnection)) string {
		c := base()
		edit(&c)
		n, err := newConnection(c, netstate.LibIPsec, key)
		if err != nil {
			t.Fatal(err)
		}
		return n.digest
	}
	same := digest(func(*netstate.IPsecConnection) {})
	if same != digest(func(*netstate.IPsecConnection) {}) {
		t.Error("equal connections differ")
	}
	for what, edit := range map[string]func(*netstate.IPsecConnection){
		"key":      func(c *netstate.IPsecConnection) { c.Auth.PresharedKey = secret.New([]byte("l")) },
		"identity": func(c *netstate.IPsecConnection) { c.RemoteID = "b.example" },
		"initiate": func(c *netstate.IPsecConnection) { c.Initiate = netstate.InitiateNever },
		"DPD":      func(c *netstate.IPsecConnection) { c.DPDDelay = time.Second },
		"lifetime": func(c *netstate.IPsecConnection) { c.IKELifetime = time.Hour },
	} {
		if digest(edit) == same {
			t.Errorf("another %s is not noticed", what)
		}
	}
}
