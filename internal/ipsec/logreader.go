package ipsec

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
)

const (
	maxContexts = 4096             // IKE SAs that are remembered; then old ones are dropped
	contextAge  = 2 * time.Minute  // after which an IKE SA's context is dropped
	rankHold    = 10 * time.Second // an exact cause stands at least that long against a vague one
)

// logReader finds out from the daemon's log events why connections fail. The daemon
// tells a failing IKE SA's peer next to nothing, and its clients nothing but this.
type logReader struct {
	sas      map[string]*saContext // by the IKE SA's unique ID
	failures map[string]recorded   // by connection
}

type recorded struct {
	Failure
	rank  int
	guess bool // one of several connections that it may be about
}

func newLogReader() *logReader {
	return &logReader{sas: map[string]*saContext{}, failures: map[string]recorded{}}
}

func (l *logReader) failure(name string) (Failure, bool) {
	f, ok := l.failures[name]
	return f.Failure, ok
}

// forget drops what is known of a connection that is loaded anew, removed, or up.
func (l *logReader) forget(name string) { delete(l.failures, name) }

// line takes in one log event and reports whether it was a failure of one of desired.
func (l *logReader) line(m *vici.Section, desired map[string]*connection, now time.Time) bool {
	id := m.Get("ikesa-uniqueid")
	c := l.sas[id]
	if c == nil {
		c = &saContext{}
	}
	c.seen = now
	if id != "" && l.sas[id] == nil {
		l.prune(now)
		l.sas[id] = c
	}
	found := c.explain(m.Get("msg"), now)
	if found == nil || found.rank < c.rank {
		return false
	}
	c.rank = found.rank
	names, guess := attribute(m.Get("ikesa-name"), c, desired)
	for _, name := range names {
		l.record(name, recorded{guess: guess}, ownFault(desired[name], found, now), now)
	}
	return len(names) > 0
}

// ownFault finds in ourselves what a peer that refuses us does not say.
func ownFault(c *connection, found *cause, now time.Time) *cause {
	if c.own == nil || found.reason != ReasonAuthenticationFailed || found.rank > 1 {
		return found
	}
	switch {
	case now.After(c.own.NotAfter):
		return &cause{ReasonCertificateExpired, 3, fmt.Sprintf("our own certificate ran out on %s: renew it", c.own.NotAfter.UTC().Format(time.RFC3339))}
	case now.Before(c.own.NotBefore):
		return &cause{ReasonCertificateNotYetValid, 3, fmt.Sprintf("our own certificate is valid from %s on: wait, or correct the clock", c.own.NotBefore.UTC().Format(time.RFC3339))}
	}
	return found
}

func (l *logReader) record(name string, r recorded, found *cause, now time.Time) {
	old, ok := l.failures[name]
	switch {
	case ok && old.rank == 3 && found.rank == 1 && now.Sub(old.Time) < rankHold:
		return
	case ok && r.guess && !old.guess: // whoever dials must not hide what is known
		return
	}
	r.rank, r.Failure = found.rank, Failure{Reason: found.reason, Message: found.message, Time: now}
	l.failures[name] = r
}

// prune keeps the number of contexts bounded, whatever peers do.
func (l *logReader) prune(now time.Time) {
	if len(l.sas) < maxContexts {
		return
	}
	for id, c := range l.sas {
		if now.Sub(c.seen) > contextAge {
			delete(l.sas, id)
		}
	}
	if len(l.sas) >= maxContexts {
		clear(l.sas)
	}
}

// attribute names the connections that an IKE SA belongs to: the one that the daemon
// names, else those of the identity that the peer claims, else those of its address,
// else those without an address, which is a guess when there are several.
func attribute(name string, c *saContext, desired map[string]*connection) (names []string, guess bool) {
	if desired[name] != nil {
		return []string{name}, false
	}
	var byID, byAddress, open []string
	remote, err := netip.ParseAddr(c.remote)
	for name, d := range desired {
		if c.peerID != "" && d.RemoteID != "" && canonicalIdentity(d.RemoteID) == canonicalIdentity(c.peerID) {
			byID = append(byID, name)
		}
		switch {
		case len(d.RemoteAddresses) == 0:
			open = append(open, name)
		case err == nil && slices.ContainsFunc(d.RemoteAddresses, func(s string) bool { return covers(s, remote) }):
			byAddress = append(byAddress, name)
		}
	}
	switch {
	case len(byID) > 0:
		return byID, false
	case len(byAddress) > 0:
		return byAddress, false
	}
	return open, len(open) > 1
}

// covers reports whether an address, or a prefix, of a connection holds a. A DNS name
// does not.
func covers(s string, a netip.Addr) bool {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Contains(a)
	}
	x, err := netip.ParseAddr(s)
	return err == nil && x == a
}
