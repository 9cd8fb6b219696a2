package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// reasonNetworkPlugin is of a NodeEncryption that cannot keep its promise beside the cluster's
// network plugin.
const reasonNetworkPlugin = model.ReasonNetworkPlugin

// reasonPodsUnknown is of a NodeTunnel whose node has pods that are in none of its ranges.
const reasonPodsUnknown = "PodsNotRecognised"

// maxSilent is how many silent peers a NodeTunnel lists.
const maxSilent = 64

// tell writes what this node has to say into its NodeTunnel and, when every node is ready,
// that into the NodeEncryption.
func (e *encryption) tell(ctx context.Context, n node, r *plan.EncryptionResult) (int, error) {
	if r == nil {
		return 0, nil
	}
	changed := 0
	own := n.tunnels[e.node]
	spec := e.keys.spec()
	if own == nil || own.Spec != spec {
		if err := e.write(ctx, v1alpha1.NodeTunnel{ObjectMeta: metav1.ObjectMeta{Name: e.node, OwnerReferences: []metav1.OwnerReference{
			{APIVersion: "v1", Kind: "Node", Name: e.node, UID: n.uid}}}, Spec: spec}, "NodeTunnel", ""); err != nil {
			return changed, fmt.Errorf("publish this node's key: %w", err)
		}
		changed++
	}
	if own == nil {
		return changed, nil // it is there the next time
	}
	status := e.tunnelStatus(own, r, n.facts.Encryption.Mismatch)
	status.Exemptions = exemptions(n.facts.Encryption.Exempt)
	status.PlainPackets = e.plainPackets(own.Status.PlainPackets, r.Strict)
	e.announce(ctx, own, status.PlainPackets)
	if !equality.Semantic.DeepEqual(own.Status, status) {
		if err := e.write(ctx, v1alpha1.NodeTunnel{ObjectMeta: metav1.ObjectMeta{Name: e.node}, Spec: own.Spec, Status: status}, "NodeTunnel", "status"); err != nil {
			return changed, fmt.Errorf("report on this node's tunnels: %w", err)
		}
		changed++
	}
	did, err := e.tellAll(ctx, n, r)
	return changed + did, err
}

// tunnelStatus is what this node sees. LastHandshakeTime stays as it was written first: it
// is written on transitions only.
func (e *encryption) tunnelStatus(own *v1alpha1.NodeTunnel, r *plan.EncryptionResult, mismatch string) v1alpha1.NodeTunnelStatus {
	s := *own.Status.DeepCopy()
	silent, last := e.silent(r)
	s.ObservedGeneration = own.Generation
	s.Peers, s.ConnectedPeers = int32(len(r.Peers)), int32(len(r.Peers)-len(silent))
	s.SilentPeers = nil
	for _, name := range silent[:min(len(silent), maxSilent)] {
		p := v1alpha1.SilentPeer{Node: name}
		if t := last[name]; !t.IsZero() {
			p.LastHandshakeTime = &metav1.Time{Time: t.Truncate(time.Second)}
		}
		if i := slices.IndexFunc(own.Status.SilentPeers, func(o v1alpha1.SilentPeer) bool { return o.Node == name }); i >= 0 {
			p = own.Status.SilentPeers[i]
		}
		s.SilentPeers = append(s.SilentPeers, p)
	}
	c := metav1.Condition{Type: "Ready", Status: metav1.ConditionTrue, Reason: "Connected", Message: "all other nodes answer", ObservedGeneration: own.Generation}
	switch missing := r.Nodes - len(r.Peers); {
	case mismatch != "": // others must not take this node for ready
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, reasonPodsUnknown, mismatch
	case missing > 0:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "KeyMissing", fmt.Sprintf("%d of %d other nodes have no key yet", missing, r.Nodes)
	case len(silent) > 0:
		c.Status, c.Reason = metav1.ConditionFalse, "Silent"
		c.Message = fmt.Sprintf("%d of %d other nodes do not answer: is their UDP port open between the nodes?", len(silent), r.Nodes)
	}
	meta.SetStatusCondition(&s.Conditions, c)
	e.held(&s, own.Generation, r.Strict)
	return s
}

// held says whether pods would wait for the guard if this node booted now; nothing, where they
// need not, or nobody asked for it.
func (e *encryption) held(s *v1alpha1.NodeTunnelStatus, generation int64, strict bool) {
	if !strict || e.chain.Chain == nil {
		meta.RemoveStatusCondition(&s.Conditions, model.ConditionPodsHeld)
		return
	}
	c := metav1.Condition{Type: model.ConditionPodsHeld, Status: metav1.ConditionTrue, Reason: "Chained", ObservedGeneration: generation,
		Message: "pods of this node get no network before its guard stands"}
	if e.heldErr != nil {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "NotChained", e.heldErr.Error()
	}
	meta.SetStatusCondition(&s.Conditions, c)
}

// tellAll reports on the cluster as a whole. All agents come to the same conclusion: each
// waits a while of its own, so that one of them writes it.
func (e *encryption) tellAll(ctx context.Context, n node, r *plan.EncryptionResult) (int, error) {
	o := n.encryption
	s := *o.Status.DeepCopy()
	s.ObservedGeneration = o.Generation
	s.Nodes, s.TotalNodes, s.ReadyNodes = int32(len(n.model.NodeEncryption.Nodes)), int32(len(n.model.Nodes)), 0
	for _, t := range n.model.NodeEncryption.Nodes {
		if t.Ready && slices.ContainsFunc(n.model.Nodes, func(o model.Node) bool { return o.Name == t.Name }) {
			s.ReadyNodes++
		}
	}
	e.conditions(&s, n, r)
	if equality.Semantic.DeepEqual(o.Status, s) {
		e.differs = time.Time{}
		return 0, nil
	}
	if e.differs.IsZero() {
		e.differs = time.Now()
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(e.node))
	patience := time.Duration(h.Sum32()%uint32(max(1, min(len(n.model.Nodes), 20)))) * time.Second / 2
	if time.Since(e.differs) < patience {
		e.soon(soonEvery)
		return 0, nil
	}
	if err := e.write(ctx, v1alpha1.NodeEncryption{ObjectMeta: metav1.ObjectMeta{Name: o.Name}, Spec: o.Spec, Status: s}, "NodeEncryption", "status"); err != nil {
		return 0, fmt.Errorf("report on the encryption between nodes: %w", err)
	}
	return 1, nil
}

func (e *encryption) conditions(s *v1alpha1.NodeEncryptionStatus, n node, r *plan.EncryptionResult) {
	m := n.model.NodeEncryption
	set := func(kind string, ok bool, reason, message string) {
		c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: n.encryption.Generation}
		if ok {
			c.Status = metav1.ConditionTrue
		}
		meta.SetStatusCondition(&s.Conditions, c)
	}
	refused := n.facts.Encryption.Refused
	if refused == "" {
		set(v1alpha1.ConditionAccepted, true, "Accepted", "")
	} else {
		set(v1alpha1.ConditionAccepted, false, reasonNetworkPlugin, refused)
	}
	var waits []string
	for _, o := range n.model.Nodes {
		if !slices.ContainsFunc(m.Nodes, func(t model.NodeTunnel) bool { return t.Name == o.Name && t.Ready }) {
			waits = append(waits, o.Name)
		}
	}
	list := strings.Join(waits[:min(len(waits), 5)], ", ")
	if len(waits) > 5 {
		list += fmt.Sprintf(" and %d more", len(waits)-5)
	}
	switch {
	case refused != "":
		set("Ready", false, reasonNetworkPlugin, refused)
	case len(waits) == 0:
		set("Ready", true, "Connected", fmt.Sprintf("all %d nodes answer each other", len(n.model.Nodes)))
	default:
		set("Ready", false, "Waiting", fmt.Sprintf("%d of %d nodes are not ready: %s", len(waits), len(n.model.Nodes), list))
	}
	switch {
	case !m.Strict:
		set(model.ConditionEnforced, false, "Permissive", "what cannot be encrypted is sent as it is")
	case m.Enforced && refused != "": // nodes that join drop, too; what goes past the firewall they do not see
		set(model.ConditionEnforced, true, reasonNetworkPlugin, "what cannot be encrypted is dropped where the kernel's firewall sees it, but: "+refused)
	case m.Enforced || r.Enforce:
		set(model.ConditionEnforced, true, "Strict", "what cannot be encrypted is dropped")
	case refused != "":
		set(model.ConditionEnforced, false, reasonNetworkPlugin, refused)
	default:
		set(model.ConditionEnforced, false, "Waiting", "Strict waits until every node is ready; until then what cannot be encrypted is sent as it is")
	}
}

// write hands an object to the API server, as server-side apply wants it: without what is
// not said.
func (e *encryption) write(ctx context.Context, o any, kind, subresource string) error {
	data, err := json.Marshal(o)
	if err != nil {
		return err
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		return err
	}
	m["apiVersion"], m["kind"] = v1alpha1.GroupVersion.String(), kind
	if md, ok := m["metadata"].(map[string]any); ok {
		delete(md, "creationTimestamp")
	}
	if subresource == "" {
		delete(m, "status")
	} else {
		delete(m, "spec")
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return e.cluster.Apply(ctx, m, subresource)
}

// soon has the loop turn again in a while.
func (e *encryption) soon(d time.Duration) {
	if e.again == 0 || d < e.again {
		e.again = d
	}
}

// watchPeers has the loop turn while something is expected of a peer.
func (e *encryption) watchPeers(n node, r *plan.EncryptionResult) {
	if r == nil {
		return
	}
	if silent, _ := e.silent(r); len(silent) > 0 || len(r.Peers) < r.Nodes {
		e.soon(soonEvery)
	}
	if slices.ContainsFunc(n.model.NodeEncryption.Nodes, func(t model.NodeTunnel) bool { return !t.NextPublicKey.IsZero() }) {
		e.soon(hurryEvery)
	}
}
