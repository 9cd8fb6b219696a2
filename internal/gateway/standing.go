package gateway

import (
	"fmt"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// verdict is one condition's value.
type verdict struct {
	ok              bool
	reason, message string
}

// standing is what is to be said about one object; times are left to the teller.
type standing struct {
	generation int64
	programmed verdict
	connected  verdict // a gateway has none
	endpoint   string  // where the peer is
	paths      string  // which of several tunnels to it are up, and which one is used
}

// judge says where a Site or Device of the gateway stands. Refused is the first problem
// that it has, or nil; peer what is seen of it, or nil when it is not in effect.
func (a *account) judge(d model.Decoded, refused *model.Problem, peer *PeerReport) standing {
	s := standing{generation: d.Object.GetGeneration(), programmed: a.programmed(d, refused, peer)}
	switch {
	case peer == nil:
		s.connected = verdict{false, "NotProgrammed", "the gateway does not know it: see condition Programmed"}
	case peer.Connected:
		s.endpoint, s.paths = peer.Endpoint, pathsMessage(peer.Paths)
		s.connected = verdict{true, "Connected", "since " + peer.Since.UTC().Format(time.RFC3339)}
		if peer.Type == "wireguard" {
			s.connected.message = "handshake at " + peer.Since.UTC().Format(time.RFC3339)
		}
	default:
		s.endpoint = peer.Endpoint
		s.connected = verdict{false, peer.Reason, peer.Message}
	}
	return s
}

func (a *account) programmed(d model.Decoded, refused *model.Problem, peer *PeerReport) verdict {
	if refused != nil {
		message := refused.Message
		if refused.Field != "" {
			message = refused.Field + ": " + message
		}
		if a.kept[d.Ref()] {
			message += " (the last good version stays in effect)"
		}
		return verdict{false, refused.Reason, message}
	}
	if peer == nil {
		return verdict{false, model.ReasonGatewayNotInForce, "the gateway is not in effect itself: see its conditions"}
	}
	name := plan.SiteName(d.Ref().ID)
	if d.Kind() == model.KindDevice {
		name = plan.DeviceName(d.Ref().ID)
	}
	if why := a.waiting[name]; why != "" {
		// Locked out on purpose: that is in effect.
		if strings.HasPrefix(why, "spec.suspend") || strings.HasPrefix(why, "spec.expirationTime") {
			return verdict{true, "LockedOut", why}
		}
		return verdict{false, "Waiting", why}
	}
	return a.applied(peer.Type == "ipsec")
}

// applied says whether everything is in effect that an object needs.
func (a *account) applied(ipsec bool) verdict {
	steps := essential
	if ipsec {
		steps = append([]string{"ipsec"}, essential...)
	}
	for _, step := range steps {
		if msg := a.report.Errors[step]; msg != "" {
			return verdict{false, "ApplyFailed", oneLine(fmt.Sprintf("%s: %s", step, msg))}
		}
	}
	return verdict{true, "Programmed", "in effect"}
}

func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }

// news reports whether a standing must be told, after another one was at a time. What the
// daemon says about a peer that stays away changes with every attempt: that is told once a
// minute.
func (s standing) news(was standing, at, now time.Time) bool {
	if s.generation != was.generation || s.programmed != was.programmed ||
		s.connected.ok != was.connected.ok || s.connected.reason != was.connected.reason || s.paths != was.paths {
		return true
	}
	return !s.connected.ok && s.connected.message != was.connected.message && now.Sub(at) > time.Minute
}

// conditions are Programmed, Ready and Connected with the times of their last changes,
// which are kept in since.
func (s standing) conditions(peer bool, since map[string]metav1.Condition, now time.Time) []metav1.Condition {
	ready := verdict{true, "Ready", "Culvert did its part"}
	if !s.programmed.ok {
		ready = s.programmed
	}
	list := []struct {
		kind string
		verdict
	}{{v1alpha1.ConditionProgrammed, s.programmed}, {v1alpha1.ConditionReady, ready}}
	if peer {
		list = append(list, struct {
			kind string
			verdict
		}{v1alpha1.ConditionConnected, s.connected})
	}
	var out []metav1.Condition
	for _, x := range list {
		status := metav1.ConditionFalse
		if x.ok {
			status = metav1.ConditionTrue
		}
		c := metav1.Condition{
			Type: x.kind, Status: status, ObservedGeneration: s.generation, Reason: reasonOf(x.reason), Message: clip(x.message),
			LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
		}
		if was, ok := since[x.kind]; ok && was.Status == status {
			c.LastTransitionTime = was.LastTransitionTime
		}
		since[x.kind] = c
		out = append(out, c)
	}
	return out
}

// reasonOf is never empty: an API server would refuse it.
func reasonOf(s string) string {
	if s == "" {
		return "Unknown"
	}
	return s
}

// longestMessage is what the CRDs allow for a path's message.
const longestMessage = 1024

func clip(s string) string {
	if len(s) <= longestMessage {
		return s
	}
	return strings.ToValidUTF8(s[:longestMessage-3], "") + "…"
}
