package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func authority(t testing.TB, uid string, at time.Time) *Authority {
	t.Helper()
	a, err := NewAuthority(uid, at)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func issue(t testing.TB, a *Authority, id Identity, at time.Time) *x509.Certificate {
	t.Helper()
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	r := Request{Identity: id, PublicKey: key.Public(), Now: at}
	if id.Role == Hub {
		r.DNSNames = []string{"h0.example.com"}
	}
	der, err := a.Issue(r)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestIdentity(t *testing.T) {
	for _, id := range []Identity{{"3f2a91c4-0000", Hub, "0"}, {"u", Spoke, "node-1.example.com"}, {"u", Client, "api"}} {
		if err := id.Check(); err != nil {
			t.Error(err)
		}
		u, err := url.Parse(id.String())
		if err != nil {
			t.Fatal(err)
		}
		got, err := IdentityOf(&x509.Certificate{URIs: []*url.URL{u}})
		if err != nil || got != id {
			t.Errorf("%v: %v, %v", id, got, err)
		}
	}
	for _, id := range []Identity{{"", Hub, "0"}, {"u", "admin", "0"}, {"u", Spoke, ""}, {"u", Spoke, "a/b"}, {"u", Spoke, "A"}, {"u", Spoke, "a b"}, {"u/x", Spoke, "a"}, {"u", Spoke, "a%2f"}, {"u", Spoke, ".a"}, {"u", Spoke, strings.Repeat("a", 254)}} {
		if id.Check() == nil {
			t.Errorf("%+v: accepted", id)
		}
	}
	for _, text := range []string{"culvert://u/spoke/a?x", "culvert://u/spoke/a#x", "culvert://x@u/spoke/a", "culvert://u:1/spoke/a", "spiffe://u/spoke/a", "culvert://u/spoke", "culvert://u/spoke/a/b", "culvert:u/spoke/a"} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := IdentityOf(&x509.Certificate{URIs: []*url.URL{u}}); !errors.Is(err, ErrIdentity) {
			t.Errorf("%s: %v", text, got)
		}
	}
	u, _ := url.Parse("culvert://u/spoke/a")
	if _, err := IdentityOf(&x509.Certificate{URIs: []*url.URL{u, u}}); err == nil {
		t.Error("two identities in one certificate")
	}
}

func TestVerify(t *testing.T) {
	a, b, other := authority(t, "u", now), authority(t, "u", now), authority(t, "v", now)
	spoke := issue(t, a, Identity{"u", Spoke, "s"}, now)
	expect := Expect{UID: "u", Role: Spoke, Authorities: []*x509.Certificate{a.Certificate}, Now: now}
	for name, c := range map[string]struct {
		cert   *x509.Certificate
		change func(*Expect)
		want   string // empty: good
	}{
		"good":                 {spoke, func(*Expect) {}, ""},
		"good, by name":        {spoke, func(e *Expect) { e.Name = "s" }, ""},
		"good, two trusted":    {spoke, func(e *Expect) { e.Authorities = append(e.Authorities, b.Certificate) }, ""},
		"an hour early":        {spoke, func(e *Expect) { e.Now = now.Add(-time.Hour) }, ""},
		"at its end":           {spoke, func(e *Expect) { e.Now = now.Add(LeafLifetime) }, ""},
		"expired":              {spoke, func(e *Expect) { e.Now = now.Add(LeafLifetime + time.Minute) }, "expired"},
		"too early":            {spoke, func(e *Expect) { e.Now = now.Add(-2 * time.Hour) }, "valid only from"},
		"another name":         {spoke, func(e *Expect) { e.Name = "t" }, "not of"},
		"another role":         {spoke, func(e *Expect) { e.Role = Client }, "not of a client"},
		"another tenant":       {spoke, func(e *Expect) { e.UID = "v" }, "another RemoteCluster"},
		"another authority":    {spoke, func(e *Expect) { e.Authorities = []*x509.Certificate{b.Certificate} }, "unknown authority"},
		"no authority":         {spoke, func(e *Expect) { e.Authorities = nil }, "unknown authority"},
		"the authority itself": {a.Certificate, func(*Expect) {}, "whose it is"},
		"other tenant's":       {issue(t, other, Identity{"u", Spoke, "s"}, now), func(*Expect) {}, "unknown authority"},
		"revoked":              {spoke, func(e *Expect) { e.Revoked = Revocations{{Spoke, "s", now}} }, "revoked"},
		"revoked before":       {spoke, func(e *Expect) { e.Revoked = Revocations{{Spoke, "s", now.Add(-time.Minute)}} }, ""},
		"another one revoked":  {spoke, func(e *Expect) { e.Revoked = Revocations{{Spoke, "t", now}, {Client, "s", now}} }, ""},
	} {
		e := expect
		c.change(&e)
		id, err := Verify([]*x509.Certificate{c.cert}, e)
		if c.want == "" && (err != nil || id.Name != "s") || c.want != "" && (!errors.Is(err, ErrIdentity) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, %v; want %q", name, id, err, c.want)
		}
	}
	if _, err := Verify(nil, expect); !errors.Is(err, ErrIdentity) {
		t.Errorf("%v", err)
	}
	// The usage alone does not do, nor does the name alone.
	hub := issue(t, a, Identity{"u", Hub, "0"}, now)
	forged := *spoke
	forged.ExtKeyUsage = hub.ExtKeyUsage
	if _, err := Verify([]*x509.Certificate{&forged}, expect); err == nil {
		t.Error("a spoke with a hub's usage")
	}
}

func TestIssue(t *testing.T) {
	a := authority(t, "u", now)
	key, _ := NewKey()
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	for name, r := range map[string]Request{
		"RSA":             {Identity: Identity{"u", Spoke, "s"}, PublicKey: weak.Public(), Now: now},
		"P-224":           {Identity: Identity{"u", Spoke, "s"}, PublicKey: p224.Public(), Now: now},
		"no key":          {Identity: Identity{"u", Spoke, "s"}, Now: now},
		"bad identity":    {Identity: Identity{"u", "root", "s"}, PublicKey: key.Public(), Now: now},
		"spoke with name": {Identity: Identity{"u", Spoke, "s"}, PublicKey: key.Public(), DNSNames: []string{"h0"}, Now: now},
	} {
		if _, err := a.Issue(r); err == nil {
			t.Errorf("%s: issued", name)
		}
	}
	// No certificate outlives its authority.
	late := issue(t, a, Identity{"u", Spoke, "s"}, a.Certificate.NotAfter.Add(-time.Hour))
	if late.NotAfter.After(a.Certificate.NotAfter) {
		t.Error(late.NotAfter)
	}
	csr, err := NewRequest(key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := KeyOfRequest(csr)
	if err != nil || !key.PublicKey.Equal(got) {
		t.Errorf("%v", err)
	}
	broken := bytes.Clone(csr)
	broken[len(broken)-5] ^= 1
	if _, err := KeyOfRequest(broken); err == nil {
		t.Error("a request with a broken signature")
	}
	if _, err := KeyOfRequest(make([]byte, maxRequest+1)); err == nil {
		t.Error("a huge request")
	}
}

func TestRenewal(t *testing.T) {
	a := authority(t, "u", now)
	c := issue(t, a, Identity{"u", Hub, "0"}, now)
	at := RenewAt(c)
	if at.Before(now.Add(LeafLifetime/2)) || at.After(now.Add(LeafLifetime*2/3+time.Second)) {
		t.Errorf("renewed after %s of %s", at.Sub(now), LeafLifetime)
	}
	for _, x := range []struct {
		at    time.Time
		names []string
		by    *x509.Certificate
		want  string
	}{
		{now, []string{"h0.example.com"}, a.Certificate, ""},
		{at.Add(-time.Minute), nil, a.Certificate, ""},
		{at, nil, a.Certificate, "due"},
		{now.Add(LeafLifetime + time.Second), nil, a.Certificate, "expired"},
		{now, []string{"h0.example.com", "other"}, a.Certificate, "names"},
		{now, nil, authority(t, "u", now).Certificate, "authority"},
	} {
		if got := Renew(c, x.names, x.by, x.at); got != x.want {
			t.Errorf("%s: %q, want %q", x.at.Sub(now), got, x.want)
		}
	}
}

// In twenty years of weekly looks there is always a signer, everybody has heard of it before
// it signs, and no authority is made without need.
func TestAuthoritiesRotate(t *testing.T) {
	var list []*x509.Certificate
	made := 0
	known := map[string]time.Time{} // since when trusted
	for at := now; at.Before(now.Add(20 * 365 * 24 * time.Hour)); at = at.Add(24 * time.Hour) {
		p := PlanAuthorities(list, Lifetimes{}, at)
		if p.Make {
			list = append(list, authority(t, "u", at).Certificate)
			made++
			p = PlanAuthorities(list, Lifetimes{}, at)
		}
		if p.Signer < 0 || p.Make {
			t.Fatalf("%s: %+v", at, p)
		}
		for _, i := range p.Trust {
			if _, ok := known[list[i].SerialNumber.String()]; !ok {
				known[list[i].SerialNumber.String()] = at
			}
		}
		signer := list[p.Signer]
		if since := known[signer.SerialNumber.String()]; len(p.Trust) > 1 && at.Sub(since) < LeafLifetime {
			t.Fatalf("%s: signed by one that is known only since %s", at, since)
		}
		if signer.NotAfter.Sub(at) < 2*LeafLifetime {
			t.Fatalf("%s: the signer ends at %s", at, signer.NotAfter)
		}
	}
	if made > 6 {
		t.Errorf("%d authorities in 20 years", made)
	}
}

// Lifetimes of others make others rotate: one that is longer than what there is does so at
// once, and what could not be renewed in time is refused.
func TestLifetimes(t *testing.T) {
	list := []*x509.Certificate{authority(t, "u", now.Add(-time.Hour)).Certificate}
	long := Lifetimes{Authority: 10 * AuthorityLifetime, Leaf: time.Minute}
	if p := PlanAuthorities(list, long, now); !p.Make || p.Signer != 0 {
		t.Fatalf("%+v", p)
	}
	next, err := long.NewAuthority("u", now)
	if err != nil {
		t.Fatal(err)
	}
	list = append(list, next.Certificate)
	for after, signer := range map[time.Duration]int{0: 0, 119 * time.Second: 0, 121 * time.Second: 1} {
		if p := PlanAuthorities(list, long, now.Add(after)); p.Make || p.Signer != signer || len(p.Trust) != 2 {
			t.Errorf("after %s: %+v", after, p)
		}
	}
	for l, ok := range map[Lifetimes]bool{
		{}: true, long: true, {Leaf: 10 * time.Second, Authority: time.Hour}: true,
		{Leaf: time.Second}: false, {Leaf: LeafLifetime + 1}: false, {Authority: 19 * LeafLifetime}: false, {Authority: 1 << 62}: false,
	} {
		if err := l.Check(); (err == nil) != ok {
			t.Errorf("%+v: %v", l, err)
		}
	}
}

func TestTokens(t *testing.T) {
	id := Identity{"u", Spoke, "s"}
	text, token, err := NewToken(id, now)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(token.Hash, []byte(text)) || len(text) < 32 {
		t.Error("the token itself is kept, or is short")
	}
	list := []Token{{Hash: hash([]byte("another"))}, token}
	if _, _, err := Redeem(list, "nonsense", nil, now); !errors.Is(err, ErrToken) {
		t.Errorf("%v", err)
	}
	if _, _, err := Redeem(list, "", nil, now); !errors.Is(err, ErrToken) {
		t.Errorf("empty: %v", err)
	}
	if _, _, err := Redeem(list, text, []byte("csr"), now.Add(TokenLifetime+time.Second)); !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("%v", err)
	}
	got, rest, err := Redeem(list, text, []byte("csr"), now.Add(time.Minute))
	if err != nil || got != id {
		t.Fatalf("%v, %v", got, err)
	}
	if !list[1].Used.IsZero() {
		t.Error("the given list was changed")
	}
	if _, _, err := Redeem(rest, text, []byte("another csr"), now.Add(2*time.Minute)); !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "was used") {
		t.Errorf("used twice: %v", err)
	}
	if _, _, err := Redeem(rest, text, []byte("csr"), now.Add(2*time.Minute)); err != nil {
		t.Errorf("the same request again: %v", err)
	}
	if n := len(PruneTokens(rest, now.Add(26*time.Hour))); n != 0 {
		t.Errorf("%d tokens are kept for ever", n)
	}
}
