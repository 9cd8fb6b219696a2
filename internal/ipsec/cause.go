package ipsec

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// cause is what one line of the daemon's log says about a failing IKE SA.
type cause struct {
	reason Reason
	// rank: a line that says more (3: exactly what is wrong) wins over one that says less
	// (1: that something is) about the same attempt.
	rank    int
	message string
}

// saContext is what earlier lines said about the same IKE SA.
type saContext struct {
	remote             string // address
	peerID             string // identity that the peer claims
	askedID            string // identity that the peer asks us to have
	offered, allowed   string // proposals
	certificateSubject string
	rank               int
	seen               time.Time
}

func (c *saContext) who() string {
	switch {
	case c.remote != "" && c.peerID != "":
		return fmt.Sprintf("the peer %s at %s", quote(c.peerID), c.remote)
	case c.remote != "":
		return "the peer at " + c.remote
	}
	return "the peer"
}

// quote makes text that a peer may have chosen harmless: one line, printable, short.
func quote(s string) string {
	if len(s) > 120 {
		s = strings.ToValidUTF8(s[:120], "") + "…"
	}
	return fmt.Sprintf("%q", s)
}

// contexts are the lines that only tell who is talking.
var contexts = []struct {
	re   *regexp.Regexp
	note func(*saContext, []string)
}{
	{regexp.MustCompile(`^(\S+) is initiating an IKE_SA$`), func(c *saContext, m []string) { c.remote = m[1] }},
	{regexp.MustCompile(`^initiating IKE_SA \S+ to (\S+)$`), func(c *saContext, m []string) { c.remote = m[1] }},
	{
		regexp.MustCompile(`^looking for peer configs matching [^\[]*\[(.*)\]\.\.\.([^\[]*)\[(.*)\]$`),
		func(c *saContext, m []string) { c.askedID, c.remote, c.peerID = m[1], m[2], m[3] },
	},
	{regexp.MustCompile(`^received proposals: (.*)$`), func(c *saContext, m []string) { c.offered = m[1] }},
	{regexp.MustCompile(`^configured proposals: (.*)$`), func(c *saContext, m []string) { c.allowed = m[1] }},
	{regexp.MustCompile(`^  using (?:trusted )?certificate "(.*)"$`), func(c *saContext, m []string) { c.certificateSubject = m[1] }},
}

// causes are the lines that tell what is wrong, in strongSwan 5.9's words.
var causes = []struct {
	re     *regexp.Regexp
	reason Reason
	rank   int
	text   func(c *saContext, m []string) string
}{
	{
		regexp.MustCompile(`^tried \d+ shared keys? for .* but MAC mismatched$`), ReasonAuthenticationFailed, 3,
		func(c *saContext, _ []string) string {
			return c.who() + " uses another pre-shared key than this connection: set the same key on both sides"
		},
	},
	{
		regexp.MustCompile(`^no shared key found for '(.*)' - '(.*)'$`), ReasonPeerIdentityMismatch, 3,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("no pre-shared key belongs to the identity %s that %s has: set remoteID to the identity that the peer sends", quote(m[2]), c.who())
		},
	},
	{
		regexp.MustCompile(`^no matching peer config found$`), ReasonPeerIdentityMismatch, 2,
		func(c *saContext, _ []string) string {
			return fmt.Sprintf("%s, which asks us to be %s, fits no connection: set remoteID and localID to what the peer uses, or change them there", c.who(), quote(c.askedID))
		},
	},
	{
		regexp.MustCompile(`^constraint check failed: .*identity '(.*)' required ?$`), ReasonPeerIdentityMismatch, 3,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("%s does not prove the identity %s that this connection expects: correct remoteID, or the identity or certificate of the peer", c.who(), quote(m[1]))
		},
	},
	{
		regexp.MustCompile(`^constraint check failed: peer not authenticated by CA '(.*)'`), ReasonAuthenticationFailed, 3,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("the certificate of %s was not issued by the CA %s of this connection: give the peer one that was, or correct the CA", c.who(), quote(m[1]))
		},
	},
	{
		regexp.MustCompile(`^(?:subject|issuer|ocsp signer) certificate invalid \(valid from (.*) to (.*)\)$`), ReasonCertificateExpired, 3,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("the certificate of %s (or its CA's) is valid from %s to %s only, and not now: renew it, or correct the clocks", c.who(), m[1], m[2])
		},
	},
	{
		regexp.MustCompile(`^certificate was revoked on (.*), reason: (.*)$`), ReasonCertificateRevoked, 3,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("the certificate of %s was revoked on %s (%s): give the peer a new one", c.who(), m[1], m[2])
		},
	},
	{
		regexp.MustCompile(`^constraint check failed: RULE_CRL_VALIDATION is (\S+), but requires at least`), ReasonRevocationUnknown, 2,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("no current CRL says whether the certificate of %s is revoked (%s), and this connection insists on one: supply a CRL of its issuer that has not run out", c.who(), m[1])
		},
	},
	{
		regexp.MustCompile(`^no issuer certificate found for "(.*)"$`), ReasonAuthenticationFailed, 2,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("the certificate %s of %s does not lead to a CA of this connection: correct the CA certificates, or let the peer send its intermediate certificates", quote(m[1]), c.who())
		},
	},
	{
		regexp.MustCompile(`^no trusted .* public key found for '(.*)'$`), ReasonAuthenticationFailed, 1,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("%s has no certificate for %s that is to be trusted: correct the CA certificates of this connection, or the peer's certificate", c.who(), quote(m[1]))
		},
	},
	{
		regexp.MustCompile(`^no private key found for '(.*)'$`), ReasonInvalidConfiguration, 3,
		func(_ *saContext, m []string) string {
			return fmt.Sprintf("our private key does not fit the certificate or identity %s: correct localID, or give certificate and key that belong together", quote(m[1]))
		},
	},
	{
		regexp.MustCompile(`^received AUTHENTICATION_FAILED notify error$`), ReasonAuthenticationFailed, 1,
		func(c *saContext, _ []string) string {
			return c.who() + " refuses us and IKE does not say why: compare key or certificate and the identities (our localID, its remoteID) on both sides, and look into the peer's log"
		},
	},
	{
		regexp.MustCompile(`^(?:received proposals unacceptable|no acceptable proposal found)$`), ReasonNoProposalChosen, 3,
		func(c *saContext, _ []string) string {
			return fmt.Sprintf("%s offers only %s, and this connection allows only %s: allow a strong one on the other side", c.who(), short(c.offered), short(c.allowed))
		},
	},
	{
		regexp.MustCompile(`^received NO_PROPOSAL_CHOSEN notify`), ReasonNoProposalChosen, 2,
		func(c *saContext, _ []string) string {
			return c.who() + " accepts none of the proposals of this connection (or knows no connection with our address): compare the proposals and addresses on both sides"
		},
	},
	{
		regexp.MustCompile(`^(?:no acceptable traffic selectors found|traffic selectors (.*) unacceptable)$`), ReasonTrafficSelectorsUnmatched, 3,
		func(c *saContext, m []string) string {
			return fmt.Sprintf("%s wants other ranges %s than this connection has: make the ranges on both sides mirror each other", c.who(), short(m[1]))
		},
	},
	{
		regexp.MustCompile(`^received TS_UNACCEPTABLE notify`), ReasonTrafficSelectorsUnmatched, 2,
		func(c *saContext, _ []string) string {
			return c.who() + " does not accept our ranges: make the ranges on both sides mirror each other, or use one child per pair"
		},
	},
	{
		regexp.MustCompile(`^giving up after \d+ retransmits$|^(?:establishing|rekeying) IKE_SA failed, peer not responding$`), ReasonPeerUnreachable, 2,
		func(c *saContext, _ []string) string {
			return c.who() + " does not answer: see that it runs, that its address is right, and that UDP 500 and 4500 pass in both directions"
		},
	},
	{
		regexp.MustCompile(`^unable to resolve (\S+?),? .*initiat`), ReasonPeerUnreachable, 3,
		func(_ *saContext, m []string) string {
			return fmt.Sprintf("the peer's name %s has no address: correct it, or DNS", quote(m[1]))
		},
	},
	{
		regexp.MustCompile(`^deleting half open IKE_SA with (\S+) after timeout$`), ReasonPeerUnreachable, 1,
		func(_ *saContext, m []string) string {
			return fmt.Sprintf("the peer at %s began and did not go on: see that UDP 4500 and fragments pass in both directions", m[1])
		},
	},
	{
		regexp.MustCompile(`^unable to install (.*) in kernel$`), ReasonDatapathFailed, 2,
		func(_ *saContext, m []string) string {
			return fmt.Sprintf("the datapath refused the %s: see the IKE daemon's log", m[1])
		},
	},
}

func short(s string) string {
	s = strings.NewReplacer("IKE:", "", "ESP:", "").Replace(s)
	if len(s) > 160 {
		s = s[:160] + "…"
	}
	return s
}

// explain takes in one line and returns what it says is wrong, or nil.
func (c *saContext) explain(msg string, now time.Time) *cause {
	for _, x := range contexts {
		if m := x.re.FindStringSubmatch(msg); m != nil {
			x.note(c, m)
			return nil
		}
	}
	for _, x := range causes {
		m := x.re.FindStringSubmatch(msg)
		if m == nil {
			continue
		}
		out := &cause{reason: x.reason, rank: x.rank, message: x.text(c, m)}
		if x.reason == ReasonCertificateExpired && notYet(m[1], now) {
			out.reason = ReasonCertificateNotYetValid
		}
		return out
	}
	return nil
}

// notYet reports whether a time as the daemon prints it lies in the future.
func notYet(from string, now time.Time) bool {
	t, err := time.ParseInLocation("Jan _2 15:04:05 2006", from, time.Local)
	return err == nil && now.Before(t)
}
