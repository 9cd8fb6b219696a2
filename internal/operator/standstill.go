package operator

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// standstills are the reasons of Ready that take the place of what pods said that can say
// nothing any more.
var standstills = []string{reasonNoReadyPod, reasonNodeNotReady}

// stillFor is how long a gateway may be without a ready pod before that is told: a pod that is
// replaced, also on another node, is back sooner.
const stillFor = 15 * time.Second

// standstill finds the gateways of which no pod has been ready for a while, whatever their pods
// said last: on a node that lost power, Kubernetes says it in their place. It comes before
// status.
func (r *round) standstill(context.Context) error {
	quiet := map[model.ID]time.Time{}
	for id, g := range r.gateways {
		o := r.seen.gateways[id]
		if r.seen.readyPods[model.ID{Namespace: id.Namespace, Name: workload.GatewayName(id.Name)}] > 0 {
			continue
		}
		ready := meta.FindStatusCondition(o.Status.Conditions, v1alpha1.ConditionReady)
		if ready != nil && ready.Status == metav1.ConditionFalse {
			if slices.Contains(standstills, ready.Reason) { // told; a pod that begins says something else
				g.still = r.whyStill(o)
			}
			continue
		}
		since, known := r.quiet[id]
		if !known {
			since = r.Now()
		}
		quiet[id] = since
		if r.Now().Sub(since) >= stillFor {
			g.still = r.whyStill(o)
		} else {
			r.waiting = true
		}
	}
	r.quiet = quiet
	return nil
}

// whyStill is the condition Ready of a gateway that stands still, and what a person can do.
func (r *round) whyStill(o *v1alpha1.VPNGateway) *metav1.Condition {
	c := &metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: reasonNoReadyPod, ObservedGeneration: o.Generation}
	c.Message = fmt.Sprintf("no pod of the gateway is ready, so that it carries no traffic: 'kubectl -n %s describe pods %s' says why", o.Namespace, workload.GatewayName(o.Name))
	for _, e := range o.Status.Endpoints {
		if e.Active && e.Node != "" && !r.nodeReady(e.Node) {
			c.Reason = reasonNodeNotReady
			c.Message = fmt.Sprintf("node %[1]s, on which pod %[2]s works, is gone or not Ready, so that the gateway carries no traffic: it does again when the node is back; "+
				"where that takes long and the machine is off, 'kubectl taint node %[1]s node.kubernetes.io/out-of-service=nodeshutdown:NoExecute' starts the pod on another one (spec.replicas: 2 does so within 2 s)", e.Node, e.Pod)
		}
	}
	return c
}

func (r *round) nodeReady(name string) bool {
	i := slices.IndexFunc(r.seen.nodes, func(n corev1.Node) bool { return n.Name == name })
	if i < 0 {
		return false
	}
	return slices.ContainsFunc(r.seen.nodes[i].Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// standIn is the condition Ready of a gateway when the operator says it; nil: its pods do.
func (r *round) standIn(g *gatewayState, o *v1alpha1.VPNGateway) *metav1.Condition {
	have := meta.FindStatusCondition(o.Status.Conditions, v1alpha1.ConditionReady)
	switch {
	case g != nil && g.still != nil:
		return g.still
	case have == nil || !slices.Contains(standstills, have.Reason) && !handedBack(have):
		return nil
	case g == nil: // it is refused now
		return have
	}
	return handBack(*have, o.Generation)
}

// cutOff is the condition Connected of a Site or Device that was connected to a gateway that
// stands still; nil: the gateway's pods say it.
func (r *round) cutOff(gateway model.ID, generation int64, conditions []metav1.Condition) *metav1.Condition {
	g := r.gateways[gateway]
	have := meta.FindStatusCondition(conditions, v1alpha1.ConditionConnected)
	ours := have != nil && (have.Reason == reasonGatewayNotReady || handedBack(have))
	switch {
	case have == nil || !ours && have.Status != metav1.ConditionTrue:
		return nil
	case g != nil && g.still != nil:
		return &metav1.Condition{
			Type: v1alpha1.ConditionConnected, Status: metav1.ConditionUnknown, Reason: reasonGatewayNotReady, ObservedGeneration: generation,
			Message: fmt.Sprintf("VPNGateway %s carries no traffic: see its condition Ready", gateway),
		}
	case !ours:
		return nil
	case g == nil:
		return have
	}
	return handBack(*have, generation)
}

// handBack leaves a condition to the gateway's pods: one that was cut off only says again what it
// said. The API server would refuse it without a value: what is told by two stays.
func handBack(c metav1.Condition, generation int64) *metav1.Condition {
	c.Status, c.Reason, c.ObservedGeneration = metav1.ConditionUnknown, model.ReasonHandedBack, generation
	c.Message = "a pod of the gateway is ready again, and has not said yet how it stands"
	return &c
}

func handedBack(c *metav1.Condition) bool { return c.Reason == model.ReasonHandedBack }

// gatewayOf is the gateway that a Site or Device names.
func gatewayOf(o metav1.Object, ref v1alpha1.GatewayReference) model.ID {
	id := model.ID{Namespace: ref.Namespace, Name: ref.Name}
	if id.Namespace == "" {
		id.Namespace = o.GetNamespace()
	}
	return id
}
