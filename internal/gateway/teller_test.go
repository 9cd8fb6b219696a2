package gateway

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// The newest status of each object is written, in the order in which they came, and never
// two of one object at a time.
func TestTellerWritesTheNewest(t *testing.T) {
	w := newTeller(Cluster{Pod: "edge-0"}, slog.New(slog.DiscardHandler))
	site := func(i int) model.Decoded {
		return model.Decoded{Object: &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: fmt.Sprint("s", i), UID: "u"}}}
	}
	say := func(i, version int) {
		w.queue(site(i).Ref(), site(i).Object, gatewayManager, map[string]any{"version": version})
	}
	say(1, 1)
	say(2, 1)
	say(1, 2)
	first, p, ok := w.take()
	if !ok || first.ID.Name != "s1" || version(t, p) != 2 {
		t.Fatalf("first is %v, version %d", first, version(t, p))
	}
	say(1, 3) // while version 2 is on its way
	second, q, _ := w.take()
	if second.ID.Name != "s2" {
		t.Errorf("second is %v", second)
	}
	if ref, _, ok := w.take(); ok {
		t.Errorf("%v is written twice at a time", ref)
	}
	w.done(first, p, true) // it failed, and is outdated
	if _, p, ok := w.take(); !ok || version(t, p) != 3 {
		t.Errorf("after the failure version %d is written, want 3", version(t, p))
	}
	w.done(second, q, true) // it failed, and is still the newest
	if _, q, ok := w.take(); !ok || version(t, q) != 1 {
		t.Error("a status that could not be written is lost")
	}
}

func version(t *testing.T, p patch) int {
	t.Helper()
	var o struct {
		Metadata struct{ UID string }
		Status   struct{ Version int }
	}
	if err := json.Unmarshal(p.body, &o); err != nil || o.Metadata.UID != "u" {
		t.Fatalf("%s: %v", p.body, err)
	}
	return o.Status.Version
}

// A process that begins says nothing of a site that was connected before, until it has had
// the time to see it again; what comes and goes later is an event each.
func TestRestartIsNoTransition(t *testing.T) {
	w := newTeller(Cluster{Pod: "edge-0"}, slog.New(slog.DiscardHandler))
	o := &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "berlin", UID: "u"}}
	o.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionConnected, Status: metav1.ConditionTrue, Reason: "Connected"}}
	d := model.Decoded{Object: o}
	fine := verdict{true, "Programmed", ""}
	down, up := standing{programmed: fine, connected: verdict{false, "Timeout", "no answer"}}, standing{programmed: fine, connected: verdict{true, "Connected", ""}}
	var events []string
	step := func(s standing, after time.Duration, writes bool) {
		t.Helper()
		w.tell(d, s, w.started.Add(after))
		wrote := false
		for ref, p, ok := w.take(); ok; ref, p, ok = w.take() {
			w.done(ref, p, false)
			wrote = true
		}
		if wrote != writes {
			t.Errorf("after %s: written %v, want %v", after, wrote, writes)
		}
		for len(w.events) > 0 {
			events = append(events, (<-w.events).Reason)
		}
	}
	step(down, time.Second, false)
	step(up, 2*time.Second, true)
	step(up, time.Minute, false)
	step(down, 2*time.Minute, true)
	step(down, 3*time.Minute, false)
	step(up, 4*time.Minute, true)
	if want := []string{"Disconnected", "Connected"}; !slices.Equal(events, want) {
		t.Errorf("events %v, want %v", events, want)
	}
}

// What the operator said in this pod's place, and hands back, is said again, path and all.
func TestHandedBack(t *testing.T) {
	w := newTeller(Cluster{Pod: "edge-0"}, slog.New(slog.DiscardHandler))
	o := &v1alpha1.Site{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "berlin", UID: "u"}}
	up := standing{programmed: verdict{true, "Programmed", ""}, connected: verdict{true, "Connected", ""}}
	step := func(reason string, after time.Duration, writes int) {
		t.Helper()
		o.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionConnected, Status: metav1.ConditionUnknown, Reason: reason}}
		w.tell(model.Decoded{Object: o}, up, w.started.Add(after))
		wrote := 0
		for ref, p, ok := w.take(); ok; ref, p, ok = w.take() {
			w.done(ref, p, false)
			wrote++
		}
		if wrote != writes {
			t.Errorf("%s after %s: %d statuses written, want %d", reason, after, wrote, writes)
		}
	}
	step("None", 0, 2) // the conditions, and this pod's path
	step("Connected", time.Minute, 0)
	step("GatewayNotReady", 2*time.Minute, 0) // the operator's turn
	step(model.ReasonHandedBack, 3*time.Minute, 2)
	step(model.ReasonHandedBack, 3*time.Minute+time.Second, 0) // not seen yet
	step("Connected", 4*time.Minute, 0)
}
