package operator

import (
	"context"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// A gateway without a ready pod stands still, but not for as long as a pod takes that is replaced,
// and not for a new pod that has spoken and is not ready yet. What comes of it, test/cluster/operator
// sees.
func TestStandstill(t *testing.T) {
	id := model.ID{Namespace: "default", Name: "edge"}
	w := newWorld(t)
	o := w.operator(interceptor.Funcs{})
	g := gateway()
	g.Namespace = "default"
	g.Status.Endpoints = []v1alpha1.GatewayEndpoint{{Pod: "culvert-edge-0", Node: "n1", Active: true}}
	n1 := *node("n1", "10.244.1.0/24", "172.30.0.11")
	n1.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	says := func(status metav1.ConditionStatus, reason string) {
		g.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionReady, Status: status, Reason: reason}}
	}
	step := func(what string, ready int32, later time.Duration, want string) {
		t.Helper()
		w.now = w.now.Add(later)
		r := &round{Operator: o, gateways: map[model.ID]*gatewayState{id: {}}, seen: &snapshot{
			gateways: map[model.ID]*v1alpha1.VPNGateway{id: g}, nodes: []corev1.Node{n1},
			readyPods: map[model.ID]int32{{Namespace: "default", Name: "culvert-edge"}: ready},
		}}
		if err := r.standstill(context.Background()); err != nil {
			t.Fatal(err)
		}
		got := ""
		if c := r.gateways[id].still; c != nil {
			got = c.Reason
			if c.Status != metav1.ConditionFalse || !strings.Contains(c.Message, "carries no traffic") {
				t.Errorf("%s: it says %+v", what, c)
			}
		}
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	step("a new gateway", 0, 0, "")
	step("whose pod does not start", 0, stillFor, reasonNoReadyPod)
	says(metav1.ConditionTrue, "Ready")
	step("it works", 1, time.Minute, "")
	step("its pod is not ready", 0, time.Minute, "")
	step("it is again", 1, stillFor-time.Second, "")
	step("another time", 0, time.Second, "")
	step("and not for long", 0, stillFor-time.Second, "")
	step("and for longer", 0, time.Second, reasonNoReadyPod)
	says(metav1.ConditionFalse, reasonNoReadyPod)
	o = w.operator(interceptor.Funcs{})
	step("another operator", 0, time.Second, reasonNoReadyPod)
	n1.Status.Conditions[0].Status = corev1.ConditionUnknown
	step("its node is gone", 0, time.Second, reasonNodeNotReady)
	says(metav1.ConditionFalse, reasonNodeNotReady)
	step("and back", 1, time.Second, "")
	step("and gone", 0, time.Second, reasonNodeNotReady)
	says(metav1.ConditionTrue, "Ready")
	step("a new pod speaks", 0, time.Minute, "")
	step("and is not ready yet", 0, stillFor-time.Second, "")
	says(metav1.ConditionFalse, "ApplyFailed")
	step("it says itself what is wrong", 0, time.Minute, "")
}
