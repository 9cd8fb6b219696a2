package pki

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"hash/fnv"
	"time"
)

// RenewAt is when a certificate is to be renewed: between half and two thirds of its life,
// spread by its serial number so that a thousand spokes do not come at once.
func RenewAt(c *x509.Certificate) time.Time {
	begin := c.NotBefore.Add(skew) // when it was issued
	life := Lifetime(c)
	h := fnv.New32a()
	_, _ = h.Write(c.SerialNumber.Bytes())
	spread := time.Duration(h.Sum32()%1000) * (life / 6) / 1000
	return begin.Add(life/2 + spread)
}

// Renew reports whether a certificate is to be renewed now, and why, in a word: it is
// "due", "expired", "authority" (it is from one that no longer signs), "names" (it lacks
// some), or nothing ("").
func Renew(c *x509.Certificate, names []string, signer *x509.Certificate, now time.Time) (why string) {
	switch {
	case now.After(c.NotAfter):
		return "expired"
	case signer != nil && c.CheckSignatureFrom(signer) != nil:
		return "authority"
	case !now.Before(RenewAt(c)):
		return "due"
	}
	have := map[string]bool{}
	for _, n := range c.DNSNames {
		have[n] = true
	}
	for _, a := range c.IPAddresses {
		have[a.String()] = true
	}
	for _, n := range names {
		if !have[n] {
			return "names"
		}
	}
	return ""
}

// AuthorityPlan is what is to be done with the authorities of a RemoteCluster.
type AuthorityPlan struct {
	Signer int   // index of the one that signs; -1: none is valid
	Trust  []int // indexes of those that certificates may be from
	Make   bool  // make a new one
}

// Lifetimes are how long certificates are valid. A zero field is AuthorityLifetime or
// LeafLifetime.
type Lifetimes struct {
	Authority time.Duration
	Leaf      time.Duration
}

// Check reports lifetimes with which nobody could renew in time.
func (l Lifetimes) Check() error {
	l = l.complete()
	const shortest, longest = 10 * time.Second, 100 * 365 * 24 * time.Hour
	switch {
	case l.Leaf < shortest || l.Leaf > LeafLifetime:
		return fmt.Errorf("certificates valid for %s: use %s to %s", l.Leaf, shortest, LeafLifetime)
	case l.Authority < 20*l.Leaf || l.Authority > longest:
		return fmt.Errorf("authorities valid for %s: use at least 20 times the %s of a certificate, and at most 100 years", l.Authority, l.Leaf)
	}
	return nil
}

func (l Lifetimes) complete() Lifetimes {
	return Lifetimes{Authority: cmp.Or(l.Authority, AuthorityLifetime), Leaf: cmp.Or(l.Leaf, LeafLifetime)}
}

// Lifetime is how long a certificate is valid from when it was issued.
func Lifetime(c *x509.Certificate) time.Duration { return c.NotAfter.Sub(c.NotBefore.Add(skew)) }

// PlanAuthorities decides over authorities, in any order. A new one is made a fifth of
// their life before the last one ends. It is trusted from the beginning but signs only when
// everybody has renewed and so heard of it, twice the life of a certificate later; the old
// one is trusted until its end.
func PlanAuthorities(list []*x509.Certificate, life Lifetimes, now time.Time) AuthorityPlan {
	life = life.complete()
	early, spread := life.Authority/5, 2*life.Leaf
	p := AuthorityPlan{Signer: -1, Make: true}
	for i, a := range list {
		if now.After(a.NotAfter) || now.Before(a.NotBefore) {
			continue
		}
		p.Trust = append(p.Trust, i)
		if a.NotAfter.Sub(now) > early {
			p.Make = false
		}
		if p.Signer < 0 {
			p.Signer = i
			continue
		}
		s := list[p.Signer]
		known := func(c *x509.Certificate) bool { return now.Sub(c.NotBefore.Add(skew)) >= spread }
		switch {
		case known(a) && !known(s), known(a) == known(s) && known(a) && a.NotBefore.After(s.NotBefore),
			known(a) == known(s) && !known(a) && a.NotBefore.Before(s.NotBefore):
			p.Signer = i
		}
	}
	return p
}
