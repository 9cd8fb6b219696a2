package gateway

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// graceAfterStart is how long a peer that was connected before this process began may stay
// away without a word: a restart is not worth a condition.
const graceAfterStart = 15 * time.Second

// teller says where objects stand, on transitions only. What is to be told is decided on the
// loop's side, and written in the background.
type teller struct {
	*writer
	opts    Cluster
	started time.Time // this process, or its work when others have worked before

	told     map[model.Ref]*told // the loop's own
	working  bool                // this pod is the one that works
	serving  bool                // and has been programmed
	vouching bool                // the IKE daemon may need this process's word
}

// Field managers: what a pod says of itself, and what whichever pod works says of the objects.
// The latter have one name, so that a pod that takes over changes nothing that stays true.
func podManager(pod string) string { return gatewayManager + "/" + pod }

const gatewayManager = "culvert-gateway"

// told is what was said of an object.
type told struct {
	uid   types.UID
	last  standing
	at    time.Time
	since map[string]metav1.Condition
	path  metav1.Time // when the path's state last changed
	body  string      // of a gateway: all that was said
	entry string      // of a gateway: what this pod said of itself
}

func newTeller(opts Cluster, log *slog.Logger) *teller {
	return &teller{writer: newWriter(opts, log), opts: opts, started: time.Now(), told: map[model.Ref]*told{}, vouching: true}
}

// Tell implements backing.
func (c *cluster) Tell(a account) {
	if a.report.Applied.IsZero() { // nothing is known yet
		return
	}
	now := time.Now()
	refused := map[model.Ref]*model.Problem{}
	for i := range a.problems {
		p := &a.problems[i]
		if ref := (model.Ref{Kind: p.Kind, ID: p.Object}); refused[ref] == nil {
			refused[ref] = p
		}
	}
	peers := map[model.Ref]*PeerReport{}
	if a.gateway != nil && a.gateway.ID == c.opts.Gateway {
		for i, s := range a.gateway.Sites {
			if i < len(a.report.Sites) {
				peers[model.Ref{Kind: model.KindSite, ID: s.ID}] = &a.report.Sites[i]
			}
		}
		for i, d := range a.gateway.Devices {
			if i < len(a.report.Devices) {
				peers[model.Ref{Kind: model.KindDevice, ID: d.ID}] = &a.report.Devices[i]
			}
		}
	}
	if a.active != c.working { // another pod has told since, or will
		if a.active {
			c.started = now
		}
		c.told, c.working, c.vouching = map[model.Ref]*told{}, a.active, true
		c.forget(gatewayManager)
	}
	if c.vouching && !a.active && a.report.Errors["ipsec"] == "" && a.report.Errors["wireguard"] == "" {
		c.vouching = false
		c.elector.stoodDown()
	}
	if c.own != nil { // first of all: the nodes follow it
		c.tellGateway(c.own, &a, refused[model.Ref{Kind: model.KindGateway, ID: c.opts.Gateway}], now)
		c.tellSlices(a.gateway)
	}
	for ref, d := range c.ours {
		if s := a.judge(d, refused[ref], peers[ref]); c.working {
			c.tell(d, s, now)
		} else {
			c.tellStandby(d, now)
		}
	}
	for ref := range c.told {
		if _, there := c.ours[ref]; !there && ref.Kind != model.KindGateway {
			delete(c.told, ref)
		}
	}
}

// tellStandby says of a Site that there is no path through this pod.
func (t *teller) tellStandby(d model.Decoded, now time.Time) {
	ref := d.Ref()
	if _, site := d.Object.(*v1alpha1.Site); !site || t.told[ref] != nil && t.told[ref].uid == d.Object.GetUID() {
		return
	}
	w := recall(d, t.opts.Pod)
	t.told[ref] = w
	s := standing{connected: verdict{false, "Standby", "this pod stands by for the one that works"}}
	t.queue(ref, d.Object, podManager(t.opts.Pod), map[string]any{"paths": []v1alpha1.SitePath{w.pathNow(t.opts.Pod, s, false, now)}})
}

// tell says where a Site or Device stands, if that is news.
func (t *teller) tell(d model.Decoded, s standing, now time.Time) {
	ref := d.Ref()
	w := t.told[ref]
	if w == nil || w.uid != d.Object.GetUID() {
		w = recall(d, t.opts.Pod)
		t.told[ref] = w
	}
	first := w.at.IsZero()
	if !first && !s.news(w.last, w.at, now) && !w.taken(d, v1alpha1.ConditionConnected, now) {
		return
	}
	before, known := w.since[v1alpha1.ConditionConnected]
	was := before.Status == metav1.ConditionTrue
	if known && was && !s.connected.ok && s.programmed.ok && now.Sub(t.started) < graceAfterStart {
		return
	}
	w.last, w.at = s, now
	status := map[string]any{"conditions": s.conditions(true, w.since, now)}
	switch d.Object.(type) {
	case *v1alpha1.Site:
		path := w.pathNow(t.opts.Pod, s, known && was == s.connected.ok, now)
		t.queue(ref, d.Object, podManager(t.opts.Pod), map[string]any{"paths": []v1alpha1.SitePath{path}})
		if known && was != s.connected.ok || !known && s.connected.ok {
			t.event(d, s.connected)
		}
	case *v1alpha1.Device:
		if s.endpoint != "" {
			status["endpoint"] = s.endpoint
		}
	}
	t.queue(ref, d.Object, gatewayManager, status)
}

// recall reads what an earlier process, or another pod, has said.
func recall(d model.Decoded, pod string) *told {
	w := &told{uid: d.Object.GetUID(), since: map[string]metav1.Condition{}}
	if o, site := d.Object.(*v1alpha1.Site); site {
		for i := range o.Status.Paths {
			if p := &o.Status.Paths[i]; p.Replica == pod && p.LastTransitionTime != nil {
				w.path = *p.LastTransitionTime
			}
		}
	}
	for _, c := range conditionsOf(d) {
		w.since[c.Type] = c
	}
	return w
}

// tellAgain is how long what was said may take to be seen.
const tellAgain = 2 * time.Second

// taken reports whether a condition must be told again: for a while the operator took this pod for
// dead, and said so in its place.
func (w *told) taken(d model.Decoded, kind string, now time.Time) bool {
	c := meta.FindStatusCondition(conditionsOf(d), kind)
	return c != nil && c.Reason == model.ReasonHandedBack && now.Sub(w.at) > tellAgain
}

func conditionsOf(d model.Decoded) []metav1.Condition {
	switch o := d.Object.(type) {
	case *v1alpha1.VPNGateway:
		return o.Status.Conditions
	case *v1alpha1.Site:
		return o.Status.Conditions
	case *v1alpha1.Device:
		return o.Status.Conditions
	}
	return nil
}

func (w *told) pathNow(pod string, s standing, unchanged bool, now time.Time) v1alpha1.SitePath {
	if !unchanged || w.path.IsZero() {
		w.path = metav1.NewTime(now.Truncate(time.Second))
	}
	at := w.path
	p := v1alpha1.SitePath{Replica: pod, State: v1alpha1.PathDown, Endpoint: s.endpoint, LastTransitionTime: &at, Message: clip(s.connected.message)}
	if s.connected.ok {
		p.State, p.Message = v1alpha1.PathUp, s.paths
	}
	return p
}

// tellGateway says where the gateway and this pod of it stand, if that is news.
func (t *teller) tellGateway(o *v1alpha1.VPNGateway, a *account, refused *model.Problem, now time.Time) {
	d := model.Decoded{Object: o}
	ref := d.Ref()
	w := t.told[ref]
	if w == nil || w.uid != o.UID {
		w = recall(d, t.opts.Pod)
		t.told[ref] = w
	}
	s := standing{generation: o.Generation, programmed: a.applied(false)}
	if refused != nil {
		s.programmed = verdict{false, refused.Reason, refused.Field + ": " + refused.Message}
	} else if a.gateway == nil {
		s.programmed = verdict{false, model.ReasonGatewayNotInForce, "no VPNGateway is in effect"}
	}
	t.serving = t.working && (t.serving || s.programmed.ok)
	t.tellEndpoint(o, a, w)
	if !t.working {
		return
	}
	status := map[string]any{}
	if a.report.Key != "" {
		status["publicKey"] = a.report.Key
	}
	body := fmt.Sprint(s, status)
	if body == w.body && !w.taken(d, v1alpha1.ConditionReady, now) {
		return
	}
	w.body, w.at = body, now
	status["conditions"] = s.conditions(false, w.since, now)
	t.queue(ref, o, gatewayManager, status)
}

// tellEndpoint says where this pod is, and whether the nodes are to send to it. One that
// cannot say any more that it has stopped is corrected in the same breath, so that never two
// are named.
func (t *teller) tellEndpoint(o *v1alpha1.VPNGateway, a *account, w *told) {
	own := v1alpha1.GatewayEndpoint{Pod: t.opts.Pod, Node: t.opts.Node, PodIPs: texts(t.opts.PodIPs), HostIPs: texts(t.opts.HostIPs), Active: t.serving}
	endpoints := []any{own}
	for _, e := range o.Status.Endpoints {
		if t.serving && e.Active && e.Pod != own.Pod {
			endpoints = append(endpoints, map[string]any{"pod": e.Pod, "active": false})
		}
	}
	status := map[string]any{
		"endpoints": endpoints,
		"replicas": []v1alpha1.GatewayReplica{{
			Name: t.opts.Pod, NodeName: t.opts.Node, MTU: int32(smallest(a.report.MTU)),
			WireGuardDatapath: a.report.Datapath["wireguard"], IPsecDatapath: a.report.Datapath["ipsec"],
		}},
	}
	if entry := fmt.Sprint(status); entry != w.entry {
		w.entry = entry
		t.queue(model.Ref{Kind: model.KindGateway, ID: t.opts.Gateway}, o, podManager(t.opts.Pod), status)
	}
}

// tellSlices leads the Service to this pod, as soon as it serves.
func (c *cluster) tellSlices(gw *model.Gateway) {
	if !c.serving || gw == nil || c.service == nil {
		return
	}
	at := workload.GatewayPod{Name: c.opts.Pod, Node: c.opts.Node, IPs: c.opts.PodIPs}
	for _, s := range workload.EndpointSlices(gw, c.service.UID, at) {
		if workload.SameEndpoints(s, c.slices[s.Name]) {
			delete(c.sliced, s.Name)
			continue
		}
		if now := time.Now(); now.Sub(c.sliced[s.Name]) > sliceAgain {
			c.sliced[s.Name] = now
			c.queueSlice(s)
		}
	}
}

// sliceAgain is how long an EndpointSlice that was written may take to be seen.
const sliceAgain = time.Second

func texts(list []netip.Addr) []v1alpha1.IP {
	out := make([]v1alpha1.IP, 0, len(list))
	for _, a := range list {
		out = append(out, v1alpha1.IP(a.String()))
	}
	return out
}

func smallest(mtu map[string]int) int {
	least := 0
	for _, m := range mtu {
		if least == 0 || m < least {
			least = m
		}
	}
	return least
}
