package ipsec

import (
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// A peer whose identity nobody knows may be any of the sites that dial in: all of them say
// so, except one of which something more exact is known.
func TestUnknownIdentityMayBeAnySiteThatDialsIn(t *testing.T) {
	desired := map[string]*connection{}
	for _, name := range []string{"a", "b", "c"} {
		desired[name] = &connection{IPsecConnection: netstate.IPsecConnection{Name: name, RemoteID: name + ".example.com"}}
	}
	desired["fixed"] = &connection{IPsecConnection: netstate.IPsecConnection{Name: "fixed", RemoteAddresses: []string{"192.0.2.9"}}}
	l := newLogReader()
	say := func(id, name, msg string) {
		m := (&vici.Section{}).Set("ikesa-uniqueid", id).Set("msg", msg)
		if name != "" {
			m.Set("ikesa-name", name)
		}
		l.line(m, desired, time.Now())
	}
	say("1", "c", "tried 1 shared key for 'x' - 'c.example.com', but MAC mismatched")
	say("2", "", "looking for peer configs matching 203.0.113.1[vpn.example.com]...192.0.2.7[mallory.example.com]")
	say("2", "", "no matching peer config found")
	for _, name := range []string{"a", "b"} {
		f, ok := l.failure(name)
		if !ok || f.Reason != ReasonPeerIdentityMismatch || !strings.Contains(f.Message, "mallory.example.com") {
			t.Errorf("%s: %+v", name, f)
		}
	}
	if f, _ := l.failure("c"); f.Reason != ReasonAuthenticationFailed {
		t.Errorf("c: %+v, want what is known for sure", f)
	}
	if f, ok := l.failure("fixed"); ok {
		t.Errorf("fixed: %+v, though the peer is elsewhere", f)
	}
}
