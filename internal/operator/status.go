package operator

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// Reasons beside those of internal/model.
const (
	reasonAccepted              = "Accepted"
	reasonResolved              = "Resolved"
	reasonPending               = "Pending"               // cannot be judged yet
	reasonNoAddress             = "NoAddress"             // the gateway has none left, or not the one that was asked for
	reasonGatewayNotReady       = "GatewayNotReady"       // has no public key yet, or no ready pod
	reasonGatewayAddressUnknown = "GatewayAddressUnknown" // nobody knows where to dial
	reasonSecretTaken           = "SecretTaken"           // somebody else's Secret has the name
	reasonRangesUnknown         = "RangesUnknown"         // the cluster does not say
	reasonNoReadyPod            = "NoReadyPod"            // of a gateway
	reasonNodeNotReady          = "NodeNotReady"          // where a gateway's pod works
)

// references are the reasons that are about what an object refers to.
var references = []string{
	model.ReasonMissingReference, model.ReasonGatewayNotInForce, model.ReasonSecretNotFound, model.ReasonInvalidSecret,
}

// verdict is what the operator says about one object.
type verdict struct {
	accepted, resolved metav1.Condition
	// ready is false for what names a gateway that is not there, and for a gateway that stands
	// still; connected is not known for what was connected to that. Else they are nil: then the
	// gateway says it.
	ready, connected *metav1.Condition
	// only takes the place of all these, for kinds with other conditions.
	only []metav1.Condition
}

// conditions lists them.
func (v verdict) conditions() []metav1.Condition {
	if v.only != nil {
		return v.only
	}
	list := []metav1.Condition{v.accepted, v.resolved}
	for _, c := range []*metav1.Condition{v.ready, v.connected} {
		if c != nil {
			list = append(list, *c)
		}
	}
	return list
}

// judge makes the two conditions from an object's problems.
func (r *round) judge(ref model.Ref, generation int64, more ...*model.Problem) verdict {
	var refused, unresolved []model.Problem
	for _, p := range r.problems[ref] {
		if slices.Contains(references, p.Reason) {
			unresolved = append(unresolved, p)
		} else {
			refused = append(refused, p)
		}
	}
	for i, p := range more { // first of the object itself, then of what it refers to
		switch {
		case p == nil:
		case i == 0:
			refused = append(refused, *p)
		default:
			unresolved = append(unresolved, *p)
		}
	}
	v := verdict{
		accepted: metav1.Condition{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionTrue, Reason: reasonAccepted, ObservedGeneration: generation},
		resolved: metav1.Condition{Type: v1alpha1.ConditionResolvedRefs, Status: metav1.ConditionTrue, Reason: reasonResolved, ObservedGeneration: generation},
	}
	suffix := ""
	if r.kept[ref] {
		suffix = "; the last good version stays in effect"
	}
	if len(unresolved) > 0 {
		v.resolved.Status, v.resolved.Reason, v.resolved.Message = metav1.ConditionFalse, unresolved[0].Reason, said(unresolved)+suffix
		if len(r.problems[ref]) > 0 {
			v.accepted.Status, v.accepted.Reason = metav1.ConditionUnknown, reasonPending
			v.accepted.Message = "waits for what it refers to, see ResolvedRefs" + suffix
		}
	}
	if len(r.problems[ref]) > 0 && v.resolved.Reason == model.ReasonMissingReference && !r.kept[ref] {
		v.ready = &metav1.Condition{
			Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: v.resolved.Reason, Message: v.resolved.Message, ObservedGeneration: generation,
		}
	}
	if len(refused) > 0 {
		v.accepted.Status, v.accepted.Reason, v.accepted.Message = metav1.ConditionFalse, refused[0].Reason, said(refused)+suffix
	}
	return v
}

// said is the problems in one line.
func said(problems []model.Problem) string {
	const longest = 2000
	parts := make([]string, len(problems))
	for i, p := range problems {
		parts[i] = strings.TrimPrefix(p.Field+": "+p.Message, ": ")
	}
	text := strings.Join(parts, " · ")
	if len(text) > longest {
		text = strings.ToValidUTF8(text[:longest], "") + "…"
	}
	return text
}

// since fills in the times: that of the condition in force when nothing turned.
func (r *round) since(c metav1.Condition, have []metav1.Condition) metav1.Condition {
	c.LastTransitionTime = metav1.NewTime(r.Now().Truncate(1e9))
	if old := meta.FindStatusCondition(have, c.Type); old != nil && old.Status == c.Status {
		c.LastTransitionTime = old.LastTransitionTime
	}
	return c
}

// statusWrite is one status that differs from what is wanted.
type statusWrite struct {
	object  client.Object
	kind    string
	status  map[string]any
	exact   bool // only onto the version that was seen
	verdict verdict
	have    []metav1.Condition
}

// status tells people, and gateways, what was decided.
func (r *round) status(ctx context.Context) error {
	var writes []statusWrite
	for id, o := range r.seen.gateways {
		if w, ok := r.gatewayStatus(id, o); ok {
			writes = append(writes, w)
		}
	}
	for id, o := range r.seen.sites {
		if w, ok := r.siteStatus(id, o); ok {
			writes = append(writes, w)
		}
	}
	for id, o := range r.seen.devices {
		if w, ok := r.deviceStatus(id, o); ok {
			writes = append(writes, w)
		}
	}
	for id, o := range r.seen.remotes {
		if w, ok := r.remoteStatus(id, o); ok {
			writes = append(writes, w)
		}
	}
	slices.SortFunc(writes, func(a, b statusWrite) int {
		return compareStrings(a.kind+"/"+idOf(a.object).String(), b.kind+"/"+idOf(b.object).String())
	})
	return each(ctx, writes, r.writeStatus)
}

// sameVerdict reports whether the conditions say what is to be said.
func sameVerdict(v verdict, have []metav1.Condition) bool {
	if c := meta.FindStatusCondition(have, v1alpha1.ConditionReady); v.only == nil && v.ready == nil && c != nil && c.Reason == model.ReasonMissingReference {
		return false
	}
	for _, c := range v.conditions() {
		old := meta.FindStatusCondition(have, c.Type)
		if old == nil || old.Status != c.Status || old.Reason != c.Reason || old.Message != c.Message || old.ObservedGeneration != c.ObservedGeneration {
			return false
		}
	}
	return true
}

func (r *round) gatewayStatus(id model.ID, o *v1alpha1.VPNGateway) (statusWrite, bool) {
	g, accepted := r.gateways[id]
	var missing *model.Problem
	status := map[string]any{"observedGeneration": o.Generation}
	want := o.Status
	if accepted {
		missing = r.rangesProblem(g, o)
		want.Address, want.WireGuardPort = g.address, 0
		if g.port != g.WireGuardPort {
			want.WireGuardPort = int32(g.port)
		}
		want.Cluster = v1alpha1.ClusterRangesStatus{PodCIDRs: texts(g.Pods), ServiceCIDRs: texts(g.ServiceRanges), NodeCIDRs: texts(g.Nodes)}
		want.Sites, want.Devices = int32(len(g.Sites)), int32(len(g.Devices))
		if want.NodeLink = v1alpha1.NodeLink(g.link); g.Masquerade {
			want.NodeLink = ""
		}
	}
	v := r.judge(model.Ref{Kind: model.KindGateway, ID: id}, o.Generation, nil, missing)
	if v.ready == nil {
		v.ready = r.standIn(g, o)
	}
	same := sameVerdict(v, o.Status.Conditions) && o.Status.ObservedGeneration == o.Generation &&
		want.Address == o.Status.Address && want.WireGuardPort == o.Status.WireGuardPort && want.NodeLink == o.Status.NodeLink &&
		want.Sites == o.Status.Sites && want.Devices == o.Status.Devices &&
		slices.Equal(want.Cluster.PodCIDRs, o.Status.Cluster.PodCIDRs) &&
		slices.Equal(want.Cluster.ServiceCIDRs, o.Status.Cluster.ServiceCIDRs) &&
		slices.Equal(want.Cluster.NodeCIDRs, o.Status.Cluster.NodeCIDRs)
	if same {
		return statusWrite{}, false
	}
	set(status, "address", want.Address)
	if want.WireGuardPort != 0 {
		status["wireguardPort"] = int64(want.WireGuardPort)
	}
	set(status, "nodeLink", string(want.NodeLink))
	status["sites"], status["devices"] = int64(want.Sites), int64(want.Devices)
	status["cluster"] = map[string]any{
		"podCIDRs": anys(want.Cluster.PodCIDRs), "serviceCIDRs": anys(want.Cluster.ServiceCIDRs), "nodeCIDRs": anys(want.Cluster.NodeCIDRs),
	}
	return statusWrite{object: o, kind: model.KindGateway, status: status, verdict: v, have: o.Status.Conditions}, true
}

// rangesProblem says that the cluster does not tell its ranges.
func (r *round) rangesProblem(g *gatewayState, o *v1alpha1.VPNGateway) *model.Problem {
	problem := func(field, format string) *model.Problem {
		return &model.Problem{Field: field, Reason: reasonRangesUnknown, Message: fmt.Sprintf(format, field)}
	}
	switch {
	case len(g.Pods) == 0 && len(o.Spec.Cluster.PodCIDRs) == 0:
		return problem("spec.cluster.podCIDRs", "is empty and no Node has spec.podCIDRs, so that pods cannot be reached: write the ranges of your CNI into %s")
	case len(g.ServiceRanges) == 0 && len(o.Spec.Cluster.ServiceCIDRs) == 0:
		return problem("spec.cluster.serviceCIDRs", "is empty and the cluster does not tell, so that services cannot be reached: write the API server's --service-cluster-ip-range into %s")
	}
	return nil
}

func (r *round) siteStatus(id model.ID, o *v1alpha1.Site) (statusWrite, bool) {
	v := r.judge(model.Ref{Kind: model.KindSite, ID: id}, o.Generation)
	v.connected = r.cutOff(gatewayOf(o, o.Spec.GatewayRef), o.Generation, o.Status.Conditions)
	if sameVerdict(v, o.Status.Conditions) && o.Status.ObservedGeneration == o.Generation {
		return statusWrite{}, false
	}
	return statusWrite{
		object: o, kind: model.KindSite, status: map[string]any{"observedGeneration": o.Generation},
		verdict: v, have: o.Status.Conditions,
	}, true
}

func (r *round) deviceStatus(id model.ID, o *v1alpha1.Device) (statusWrite, bool) {
	want := v1alpha1.DeviceStatus{Addresses: o.Status.Addresses, PublicKey: o.Status.PublicKey, ConfigurationSecret: o.Status.ConfigurationSecret}
	var refused, waiting *model.Problem
	if d, accepted := r.devices[id]; accepted {
		if d.undecided {
			return statusWrite{}, false
		}
		refused, waiting = d.refused, d.waiting
		want = v1alpha1.DeviceStatus{Addresses: d.addresses, PublicKey: d.publicKey, ConfigurationSecret: d.secret}
	}
	v := r.judge(model.Ref{Kind: model.KindDevice, ID: id}, o.Generation, refused, waiting)
	v.connected = r.cutOff(gatewayOf(o, o.Spec.GatewayRef), o.Generation, o.Status.Conditions)
	exact := !slices.Equal(want.Addresses, o.Status.Addresses) || want.PublicKey != o.Status.PublicKey
	if !exact && want.ConfigurationSecret == o.Status.ConfigurationSecret && sameVerdict(v, o.Status.Conditions) && o.Status.ObservedGeneration == o.Generation {
		return statusWrite{}, false
	}
	status := map[string]any{"observedGeneration": o.Generation}
	if len(want.Addresses) > 0 {
		status["addresses"] = anys(want.Addresses)
	}
	set(status, "publicKey", want.PublicKey)
	set(status, "configurationSecret", want.ConfigurationSecret)
	return statusWrite{object: o, kind: model.KindDevice, status: status, exact: exact, verdict: v, have: o.Status.Conditions}, true
}

// writeStatus applies one status.
func (r *round) writeStatus(ctx context.Context, w statusWrite) error {
	uid := w.object.GetUID()
	hash := hashOf([]any{w.status, w.verdict})
	noteLock.Lock()
	last, known := r.statuses[uid]
	noteLock.Unlock()
	if known && last.hash == hash && stale(w.object.GetResourceVersion(), last.version) && r.Now().Sub(last.at) < cacheLag {
		return nil
	}
	var conditions []any
	for _, c := range w.verdict.conditions() {
		m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(new(r.since(c, w.have)))
		if err != nil {
			return err
		}
		conditions = append(conditions, m)
	}
	w.status["conditions"] = conditions
	u := &unstructured.Unstructured{Object: map[string]any{"status": w.status}}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(w.kind))
	u.SetNamespace(w.object.GetNamespace())
	u.SetName(w.object.GetName())
	u.SetUID(uid)
	if w.exact {
		u.SetResourceVersion(w.object.GetResourceVersion())
	}
	var err error
	for range exactAttempts {
		written := u.DeepCopy()
		err = r.Writer.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(written), client.FieldOwner(Manager), client.ForceOwnership)
		if err == nil {
			u = written
		}
		if !w.exact || !apierrors.IsConflict(err) || !r.onlyOthersWrote(ctx, w.object, u) {
			break
		}
	}
	switch {
	case apierrors.IsNotFound(err):
		return nil // nobody is left to be told
	case err != nil:
		return fmt.Errorf("status of %s %s: %w", w.kind, idOf(w.object), err)
	}
	noteLock.Lock()
	r.statuses[uid] = appliedObject{hash: hash, version: versionOf(u), at: r.Now()}
	noteLock.Unlock()
	r.tell(w)
	return nil
}

// exactAttempts bounds how often a status is tried again that others write at the same
// time.
const exactAttempts = 5

// onlyOthersWrote reports whether what the operator says of a device is still what it saw,
// and if so makes the write fit the version that is there now.
func (r *round) onlyOthersWrote(ctx context.Context, seen client.Object, u *unstructured.Unstructured) bool {
	was, ok := seen.(*v1alpha1.Device)
	var now v1alpha1.Device
	if !ok || r.Live.Get(ctx, client.ObjectKeyFromObject(seen), &now) != nil {
		return false
	}
	if now.UID != was.UID || now.Status.PublicKey != was.Status.PublicKey || !slices.Equal(now.Status.Addresses, was.Status.Addresses) {
		return false
	}
	u.SetResourceVersion(now.ResourceVersion)
	return true
}

// tell makes an event of a turn that people may have to do something about, and of its end.
func (r *round) tell(w statusWrite) {
	list := []metav1.Condition{w.verdict.accepted, w.verdict.resolved}
	if w.verdict.only != nil {
		list = w.verdict.only
	} else if w.kind == model.KindGateway && w.verdict.ready != nil {
		list = append(list, *w.verdict.ready)
	}
	for _, c := range list {
		old := meta.FindStatusCondition(w.have, c.Type)
		switch {
		case c.Type == v1alpha1.ConditionReady && w.verdict.only != nil, c.Type == v1alpha1.ConditionConnected && old == nil: // told by others, or still to come
		case c.Type == v1alpha1.ConditionConnected && c.Status == metav1.ConditionTrue && old.Status != c.Status:
			r.Event(w.object, false, c.Reason, "spokes are connected")
		case c.Status == metav1.ConditionFalse && (old == nil || old.Status != c.Status || old.Reason != c.Reason):
			r.Event(w.object, true, c.Reason, c.Message)
		case c.Status == metav1.ConditionTrue && old != nil && old.Status != c.Status:
			r.Event(w.object, false, c.Reason, c.Type+" again")
		}
	}
}

func set(m map[string]any, key, value string) {
	if value != "" {
		m[key] = value
	}
}

func anys(list []string) []any {
	out := make([]any, len(list))
	for i, s := range list {
		out[i] = s
	}
	return out
}

func texts[T fmt.Stringer](list []T) []string {
	var out []string
	for _, x := range list {
		out = append(out, x.String())
	}
	return out
}

// serviceName is the name of a gateway's Service.
func serviceName(g *model.Gateway) string { return workload.GatewayName(g.Name) }

// nodePort is the port of every node that leads to a gateway's WireGuard; 0: none yet.
func nodePort(s *corev1.Service) uint16 {
	if s == nil {
		return 0
	}
	for _, p := range s.Spec.Ports {
		if p.Name == workload.PortWireGuard {
			return uint16(p.NodePort)
		}
	}
	return 0
}
