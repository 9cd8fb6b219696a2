package gateway

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

func berlin() model.Decoded {
	return model.Decoded{Object: &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "berlin", Generation: 3}}}
}

func TestWhereASiteStands(t *testing.T) {
	up := &PeerReport{Type: "ipsec", Connected: true, Endpoint: "192.0.2.1:4500", Since: time.Unix(1000, 0)}
	down := &PeerReport{Type: "ipsec", Reason: "AuthenticationFailed", Message: "wrong key"}
	refused := &model.Problem{Field: "spec.cidrs[0]", Reason: model.ReasonOverlap, Message: "overlaps another"}
	for name, c := range map[string]struct {
		account               account
		refused               *model.Problem
		peer                  *PeerReport
		programmed, connected string // "ok REASON: message" or "no …"
	}{
		"up":   {peer: up, programmed: "ok Programmed: in effect", connected: "ok Connected: since 1970-01-01T00:16:40Z"},
		"down": {peer: down, programmed: "ok Programmed: in effect", connected: "no AuthenticationFailed: wrong key"},
		"refused": {refused: refused, programmed: "no Overlap: spec.cidrs[0]: overlaps another",
			connected: "no NotProgrammed: the gateway does not know it: see condition Programmed"},
		"refused, an earlier version stays": {
			account: account{kept: map[model.Ref]bool{berlin().Ref(): true}}, refused: refused, peer: up,
			programmed: "no Overlap: spec.cidrs[0]: overlaps another (the last good version stays in effect)", connected: "ok Connected: since 1970-01-01T00:16:40Z",
		},
		"not resolved": {
			account: account{waiting: map[string]string{"site a/berlin": "no address yet"}}, peer: down,
			programmed: "no Waiting: no address yet", connected: "no AuthenticationFailed: wrong key",
		},
		"not applied": {
			account: account{report: Report{Errors: map[string]string{"ipsec": "no\ndaemon"}}}, peer: down,
			programmed: "no ApplyFailed: ipsec: no; daemon", connected: "no AuthenticationFailed: wrong key",
		},
		"another's trouble": {
			account: account{report: Report{Errors: map[string]string{"ipsec": "no daemon"}}}, peer: &PeerReport{Type: "wireguard", Connected: true, Since: time.Unix(1000, 0)},
			programmed: "ok Programmed: in effect", connected: "ok Connected: handshake at 1970-01-01T00:16:40Z",
		},
	} {
		s := c.account.judge(berlin(), c.refused, c.peer)
		if got := text(s.programmed); got != c.programmed {
			t.Errorf("%s: programmed %q, want %q", name, got, c.programmed)
		}
		if got := text(s.connected); got != c.connected {
			t.Errorf("%s: connected %q, want %q", name, got, c.connected)
		}
	}
	// Locked out on purpose is in effect.
	d := model.Decoded{Object: &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "phone"}}}
	a := account{waiting: map[string]string{"device a/phone": "spec.suspend is true: locked out"}}
	if got := text(a.judge(d, nil, &PeerReport{Type: "wireguard"}).programmed); !strings.HasPrefix(got, "ok LockedOut") {
		t.Errorf("suspended: %q", got)
	}
}

func text(v verdict) string {
	if v.ok {
		return "ok " + v.reason + ": " + v.message
	}
	return "no " + v.reason + ": " + v.message
}

// Status is written on transitions only, and times are those of transitions.
func TestOnlyTransitionsAreTold(t *testing.T) {
	base := standing{generation: 1, programmed: verdict{true, "Programmed", "in effect"}, connected: verdict{false, "Timeout", "no answer (1)"}}
	now := time.Unix(100000, 0)
	for name, c := range map[string]struct {
		edit  func(*standing)
		after time.Duration
		news  bool
	}{
		"the same":                       {func(*standing) {}, time.Hour, false},
		"another generation":             {func(s *standing) { s.generation = 2 }, 0, true},
		"connected":                      {func(s *standing) { s.connected = verdict{true, "Connected", "since now"} }, 0, true},
		"another cause":                  {func(s *standing) { s.connected.reason = "AuthenticationFailed" }, 0, true},
		"other words, at once":           {func(s *standing) { s.connected.message = "no answer (2)" }, time.Second, false},
		"other words, after two minutes": {func(s *standing) { s.connected.message = "no answer (2)" }, 2 * time.Minute, true},
		"another endpoint":               {func(s *standing) { s.endpoint = "192.0.2.9:1" }, time.Hour, false},
		"not programmed":                 {func(s *standing) { s.programmed = verdict{false, "Overlap", "x"} }, 0, true},
	} {
		s := base
		c.edit(&s)
		if got := s.news(base, now, now.Add(c.after)); got != c.news {
			t.Errorf("%s: news %v, want %v", name, got, c.news)
		}
	}

	since := map[string]metav1.Condition{}
	base.conditions(true, since, now)
	later := now.Add(time.Minute)
	next := base
	next.generation, next.connected = 2, verdict{true, "Connected", ""}
	for _, got := range next.conditions(true, since, later) {
		want := now
		if got.Type == v1alpha1.ConditionConnected {
			want = later
		}
		if !got.LastTransitionTime.Time.Equal(want) || got.ObservedGeneration != 2 {
			t.Errorf("%s: since %s, want %s; generation %d", got.Type, got.LastTransitionTime, want, got.ObservedGeneration)
		}
	}
}
