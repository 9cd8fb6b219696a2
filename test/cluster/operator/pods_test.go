package operator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// podManager and a pod's name are the field manager of what it says of itself.
const podManager = "culvert-gateway/"

// What a pod wrote that a gateway no longer has goes from the statuses; the others' entries
// stay.
func TestDepartedPods(t *testing.T) {
	ns := inNamespace(t, "departed")
	startOperator(t, "--alone")
	create(t, gateway(ns, func(s *v1alpha1.VPNGatewaySpec) { s.Replicas = new(int32(2)) }), site(ns, "berlin", "10.1.0.0/16"))
	eventually(t, 20*time.Second, func() error { return get(&appsv1.StatefulSet{}, ns, "culvert-edge") })
	for _, pod := range []string{"culvert-edge-0", "culvert-edge-1"} {
		applyStatus(t, &v1alpha1.VPNGateway{}, ns, "edge", podManager+pod, `{"endpoints":[{"pod":"`+pod+`","node":"n1","podIPs":["10.244.1.9"]}]}`)
		applyStatus(t, &v1alpha1.Site{}, ns, "berlin", podManager+pod, `{"paths":[{"replica":"`+pod+`","state":"Up"}]}`)
	}
	var g v1alpha1.VPNGateway
	var s v1alpha1.Site
	pods := func() (string, error) {
		err := errors.Join(get(&g, ns, "edge"), get(&s, ns, "berlin"))
		text := "gateway:"
		for _, e := range g.Status.Endpoints {
			text += " " + e.Pod
		}
		text += ", site:"
		for _, p := range s.Status.Paths {
			text += " " + p.Replica
		}
		return text, err
	}
	if got, err := pods(); err != nil || got != "gateway: culvert-edge-0 culvert-edge-1, site: culvert-edge-0 culvert-edge-1" {
		t.Fatalf("before: %s %v", got, err)
	}
	fewer := client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"replicas":1}}`)) // the operator writes, too
	if err := shared.client.Patch(t.Context(), &g, fewer); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, func() error {
		got, err := pods()
		if err == nil && got != "gateway: culvert-edge-0, site: culvert-edge-0" {
			err = errors.New(got)
		}
		return err
	})
}

// A path that is up through a pod that died goes once another pod works; that one's stays, and so
// does what a pod says that lives.
func TestDeadPods(t *testing.T) {
	t.Parallel()
	ns := inNamespace(t, "dead")
	startOperator(t, "--alone")
	create(t, gateway(ns, func(s *v1alpha1.VPNGatewaySpec) { s.Replicas = new(int32(3)) }), site(ns, "berlin", "10.1.0.0/16"))
	eventually(t, 20*time.Second, func() error { return get(&appsv1.StatefulSet{}, ns, "culvert-edge") })
	podsAre(t, ns, corev1.ConditionTrue, 3)
	for _, says := range [][3]string{{"culvert-edge-0", "true", "Up"}, {"culvert-edge-1", "false", "Down"}, {"culvert-edge-2", "false", "Down"}} {
		pod := says[0]
		applyStatus(t, &v1alpha1.VPNGateway{}, ns, "edge", podManager+pod, `{"endpoints":[{"pod":"`+pod+`","podIPs":["10.244.1.9"],"active":`+says[1]+`}]}`)
		applyStatus(t, &v1alpha1.Site{}, ns, "berlin", podManager+pod, `{"paths":[{"replica":"`+pod+`","state":"`+says[2]+`"}]}`)
	}
	paths := func() string {
		var s v1alpha1.Site
		if err := get(&s, ns, "berlin"); err != nil {
			return err.Error()
		}
		var list []string
		for _, p := range s.Status.Paths {
			list = append(list, fmt.Sprintf("%s %s, ", p.Replica, p.State))
		}
		slices.Sort(list)
		return strings.Join(list, "")
	}
	time.Sleep(7 * time.Second) // longer than the operator doubts
	const before = "culvert-edge-0 Up, culvert-edge-1 Down, culvert-edge-2 Down, "
	if got := paths(); got != before {
		t.Fatalf("with one that works: %s", got)
	}
	// The second takes over, and corrects what the first cannot say any more.
	applyStatus(t, &v1alpha1.VPNGateway{}, ns, "edge", podManager+"culvert-edge-1", `{"endpoints":[{"pod":"culvert-edge-1","podIPs":["10.244.1.9"],"active":true},{"pod":"culvert-edge-0","active":false}]}`)
	applyStatus(t, &v1alpha1.Site{}, ns, "berlin", podManager+"culvert-edge-1", `{"paths":[{"replica":"culvert-edge-1","state":"Up"}]}`)
	eventually(t, 30*time.Second, func() error {
		if got := paths(); got != "culvert-edge-1 Up, culvert-edge-2 Down, " {
			return errors.New(got)
		}
		return nil
	})
	// It is back, and stands by.
	applyStatus(t, &v1alpha1.Site{}, ns, "berlin", podManager+"culvert-edge-0", `{"paths":[{"replica":"culvert-edge-0","state":"Down"}]}`)
	time.Sleep(7 * time.Second)
	if got := paths(); !strings.Contains(got, "culvert-edge-0 Down, ") || !strings.Contains(got, "culvert-edge-1 Up, ") {
		t.Errorf("after the first is back: %s", got)
	}
}

// applyStatus applies a status as a gateway pod, or as whichever of them works.
func applyStatus(t *testing.T, o client.Object, ns, name, manager, status string) {
	t.Helper()
	o.SetNamespace(ns)
	o.SetName(name)
	kind := strings.TrimPrefix(fmt.Sprintf("%T", o), "*v1alpha1.")
	body := fmt.Sprintf(`{"apiVersion":%q,"kind":%q,"metadata":{"namespace":%q,"name":%q},"status":%s}`, v1alpha1.GroupVersion, kind, ns, name, status)
	err := shared.client.Status().Patch(context.Background(), o, client.RawPatch("application/apply-patch+yaml", []byte(body)), client.FieldOwner(manager), client.ForceOwnership)
	if err != nil {
		t.Fatal(err)
	}
}

// podsAre says of a gateway's pods, as a kubelet or the node controller does, whether they are
// ready.
func podsAre(t *testing.T, ns string, ready corev1.ConditionStatus, n int) {
	t.Helper()
	var pods corev1.PodList
	eventually(t, 20*time.Second, func() error {
		err := shared.client.List(t.Context(), &pods, client.InNamespace(ns), client.MatchingLabels{"culvert.dev/gateway": "edge"})
		if err == nil && len(pods.Items) != n {
			err = fmt.Errorf("%d pods, want %d", len(pods.Items), n)
		}
		return err
	})
	for i := range pods.Items {
		patch := fmt.Sprintf(`{"status":{"phase":"Running","conditions":[{"type":"Ready","status":%q}]}}`, ready)
		if err := shared.client.Status().Patch(t.Context(), &pods.Items[i], client.RawPatch("application/strategic-merge-patch+json", []byte(patch))); err != nil {
			t.Fatal(err)
		}
	}
}

// A gateway whose only pod is on a node that died says nothing any more. Kubernetes says that no
// pod is ready, and the operator what that means, until a pod speaks again.
func TestGatewayStandsStill(t *testing.T) {
	t.Parallel()
	const (
		well  = "gateway: True Ready, site: True Connected, phone: True Connected, laptop: False PeerUnreachable, paths: Up"
		still = "gateway: False NodeNotReady, site: Unknown GatewayNotReady, phone: Unknown GatewayNotReady, laptop: False PeerUnreachable, paths:"
	)
	ns := inNamespace(t, "still")
	startOperator(t, "--alone")
	create(t, gateway(ns), site(ns, "berlin", "10.1.0.0/16"), device(ns, "phone"), device(ns, "laptop"))
	speaks := func() { // the pod
		say := func(o client.Object, name, manager, status string) { applyStatus(t, o, ns, name, manager, status) }
		condition := func(kind, status, reason string) string {
			return fmt.Sprintf(`"conditions":[{"type":%q,"status":%q,"reason":%q,"message":"","lastTransitionTime":"2023-01-01T00:00:00Z"}]`, kind, status, reason)
		}
		const whichever, own = "culvert-gateway", podManager + "culvert-edge-0"
		say(&v1alpha1.VPNGateway{}, "edge", own, `{"endpoints":[{"pod":"culvert-edge-0","node":"n1","podIPs":["10.244.1.9"],"active":true}]}`)
		say(&v1alpha1.VPNGateway{}, "edge", whichever, `{"publicKey":"`+gatewayKey+`",`+condition("Ready", "True", "Ready")+`}`)
		say(&v1alpha1.Site{}, "berlin", own, `{"paths":[{"replica":"culvert-edge-0","state":"Up"}]}`)
		say(&v1alpha1.Site{}, "berlin", whichever, `{`+condition("Connected", "True", "Connected")+`}`)
		say(&v1alpha1.Device{}, "phone", whichever, `{`+condition("Connected", "True", "Connected")+`}`)
		say(&v1alpha1.Device{}, "laptop", whichever, `{`+condition("Connected", "False", "PeerUnreachable")+`}`)
	}
	podsAre(t, ns, corev1.ConditionTrue, 1)
	speaks()
	told := func() string {
		var g v1alpha1.VPNGateway
		var s v1alpha1.Site
		var phone, laptop v1alpha1.Device
		if err := errors.Join(get(&g, ns, "edge"), get(&s, ns, "berlin"), get(&phone, ns, "phone"), get(&laptop, ns, "laptop")); err != nil {
			return err.Error()
		}
		two := func(text string) string { return strings.Join(strings.Fields(text + " -")[:2], " ") }
		text := fmt.Sprintf("gateway: %s, site: %s, phone: %s, laptop: %s, paths:", two(says(g.Status.Conditions, "Ready")),
			two(says(s.Status.Conditions, "Connected")), two(says(phone.Status.Conditions, "Connected")), two(says(laptop.Status.Conditions, "Connected")))
		for _, p := range s.Status.Paths {
			text += " " + string(p.State)
		}
		return text
	}
	becomes := func(want string, limit time.Duration) {
		t.Helper()
		eventually(t, limit, func() error {
			if got := told(); got != want {
				return fmt.Errorf("%s\nwant %s", got, want)
			}
			return nil
		})
	}
	becomes(well, 10*time.Second)
	start := time.Now()
	podsAre(t, ns, corev1.ConditionFalse, 1)
	becomes(still, 60*time.Second)
	took := time.Since(start)
	t.Logf("told after %s", took.Round(100*time.Millisecond))
	if took < 14*time.Second {
		t.Error("a pod that is replaced is not that quick")
	}
	// It was cut off only: it sees that its word is gone, and speaks again.
	podsAre(t, ns, corev1.ConditionTrue, 1)
	becomes("gateway: Unknown HandedBack, site: Unknown HandedBack, phone: Unknown HandedBack, laptop: False PeerUnreachable, paths:", 30*time.Second)
	// It speaks once more where an operator, another test's, has said so a little later.
	for said := 1; ; said++ {
		speaks()
		time.Sleep(2 * time.Second)
		got := told()
		if got == well {
			return
		}
		if said == 4 {
			t.Fatalf("the pod is not believed: %s\nwant %s", got, well)
		}
	}
}
