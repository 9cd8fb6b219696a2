package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// graceAfterStart is how long a peer that was connected before this process began may stay
// away without a word: a restart is not worth a condition.
const graceAfterStart = 15 * time.Second

// teller writes status and events, on transitions only. Its loop's side says what is to be
// told; workers in the background write it, the newest for each object, until it is there.
type teller struct {
	opts    Cluster
	manager string
	log     *slog.Logger
	started time.Time

	told   map[model.Ref]*told // the loop's own
	active bool

	mu      sync.Mutex
	pending map[model.Ref]patch
	order   []model.Ref
	busy    map[model.Ref]bool
	wake    chan struct{}
	events  chan *eventsv1.Event
}

// told is what was said of an object.
type told struct {
	uid   types.UID
	last  standing
	at    time.Time
	since map[string]metav1.Condition
	path  metav1.Time // when the path's state last changed
	body  string      // of a gateway: all that was said
}

// patch is a status to be applied.
type patch struct {
	at   client.Object
	body []byte
}

// tellers is how many writers there are.
const tellers = 8

func newTeller(opts Cluster, manager string, log *slog.Logger) *teller {
	return &teller{
		opts: opts, manager: manager, log: log, started: time.Now(),
		told: map[model.Ref]*told{}, pending: map[model.Ref]patch{}, busy: map[model.Ref]bool{},
		wake: make(chan struct{}, tellers), events: make(chan *eventsv1.Event, 256),
	}
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
	for ref, d := range c.ours {
		c.tell(d, a.judge(d, refused[ref], peers[ref]), now)
	}
	for ref := range c.told {
		if _, there := c.ours[ref]; !there && ref.Kind != model.KindGateway {
			delete(c.told, ref)
		}
	}
	if c.own != nil {
		c.tellGateway(c.own, &a, refused[model.Ref{Kind: model.KindGateway, ID: c.opts.Gateway}], now)
	}
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
	if !first && !s.news(w.last, w.at, now) {
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
		status["paths"] = []v1alpha1.SitePath{w.pathNow(t.opts.Pod, s, known && was == s.connected.ok, now)}
		if known && was != s.connected.ok || !known && s.connected.ok {
			t.event(d, s.connected)
		}
	case *v1alpha1.Device:
		if s.endpoint != "" {
			status["endpoint"] = s.endpoint
		}
	}
	t.queue(ref, d.Object, status)
}

// recall reads what an earlier process, or another pod, has said.
func recall(d model.Decoded, pod string) *told {
	w := &told{uid: d.Object.GetUID(), since: map[string]metav1.Condition{}}
	var list []metav1.Condition
	switch o := d.Object.(type) {
	case *v1alpha1.VPNGateway:
		list = o.Status.Conditions
	case *v1alpha1.Site:
		list = o.Status.Conditions
		for i := range o.Status.Paths {
			if p := &o.Status.Paths[i]; p.Replica == pod && p.LastTransitionTime != nil {
				w.path = *p.LastTransitionTime
			}
		}
	case *v1alpha1.Device:
		list = o.Status.Conditions
	}
	for _, c := range list {
		w.since[c.Type] = c
	}
	return w
}

func (w *told) pathNow(pod string, s standing, unchanged bool, now time.Time) v1alpha1.SitePath {
	if !unchanged || w.path.IsZero() {
		w.path = metav1.NewTime(now.Truncate(time.Second))
	}
	at := w.path
	p := v1alpha1.SitePath{Replica: pod, State: v1alpha1.PathDown, Endpoint: s.endpoint, LastTransitionTime: &at, Message: clip(s.connected.message)}
	if s.connected.ok {
		p.State, p.Message = v1alpha1.PathUp, ""
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
	t.active = t.active || s.programmed.ok
	status := map[string]any{
		"endpoints": []v1alpha1.GatewayEndpoint{{Pod: t.opts.Pod, Node: t.opts.Node, PodIPs: texts(t.opts.PodIPs), HostIPs: texts(t.opts.HostIPs), Active: t.active}},
		"replicas": []v1alpha1.GatewayReplica{{
			Name: t.opts.Pod, NodeName: t.opts.Node, MTU: int32(smallest(a.report.MTU)),
			WireGuardDatapath: a.report.Datapath["wireguard"], IPsecDatapath: a.report.Datapath["ipsec"],
		}},
	}
	if a.report.Key != "" {
		status["publicKey"] = a.report.Key
	}
	body := fmt.Sprint(s, status)
	if body == w.body {
		return
	}
	w.body = body
	status["conditions"] = s.conditions(false, w.since, now)
	t.queue(ref, o, status)
}

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

// queue has a status written. The object's UID goes with it, so that a later object of the
// same name never gets it.
func (t *teller) queue(ref model.Ref, o metav1.Object, status map[string]any) {
	body, err := json.Marshal(map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": ref.Kind, "status": status,
		"metadata": map[string]any{"name": o.GetName(), "namespace": o.GetNamespace(), "uid": o.GetUID()},
	})
	if err != nil { // of plain data: it cannot be
		t.log.Error("status", "object", ref.String(), "error", err)
		return
	}
	meta := metav1.ObjectMeta{Name: o.GetName(), Namespace: o.GetNamespace()}
	p := patch{body: body}
	switch ref.Kind {
	case model.KindGateway:
		p.at = &v1alpha1.VPNGateway{ObjectMeta: meta}
	case model.KindSite:
		p.at = &v1alpha1.Site{ObjectMeta: meta}
	default:
		p.at = &v1alpha1.Device{ObjectMeta: meta}
	}
	t.mu.Lock()
	t.put(ref, p)
	t.mu.Unlock()
}

func (t *teller) put(ref model.Ref, p patch) {
	if _, waits := t.pending[ref]; !waits {
		t.order = append(t.order, ref)
	}
	t.pending[ref] = p
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// take returns the status that has waited longest and that nobody is writing.
func (t *teller) take() (model.Ref, patch, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, ref := range t.order {
		if t.busy[ref] {
			continue
		}
		p := t.pending[ref]
		if i == 0 {
			t.order = t.order[1:]
		} else {
			t.order = slices.Delete(t.order, i, i+1)
		}
		delete(t.pending, ref)
		t.busy[ref] = true
		return ref, p, true
	}
	return model.Ref{}, patch{}, false
}

// done puts a status that could not be written back, unless there is a newer one.
func (t *teller) done(ref model.Ref, p patch, again bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.busy, ref)
	if _, newer := t.pending[ref]; again && !newer {
		t.put(ref, p)
	}
}

// run writes until ctx ends.
func (t *teller) run(ctx context.Context) {
	var wg sync.WaitGroup
	for range tellers {
		wg.Go(func() { t.write(ctx) })
	}
	wg.Go(func() { t.writeEvents(ctx) })
	wg.Wait()
}

func (t *teller) write(ctx context.Context) {
	pause := time.Second
	for {
		ref, p, ok := t.take()
		if !ok {
			select {
			case <-ctx.Done():
				return
			case <-t.wake:
			}
			continue
		}
		again, err := t.apply(ctx, p)
		t.done(ref, p, again)
		if err == nil {
			pause = time.Second
			continue
		}
		if ctx.Err() != nil {
			return
		}
		t.log.Warn("cannot write status", "object", ref.String(), "error", err, "again", again)
		if !again {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, 30*time.Second)
	}
}

// apply writes one status; again says whether another attempt makes sense.
func (t *teller) apply(ctx context.Context, p patch) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	err = t.opts.Client.Status().Patch(ctx, p.at, client.RawPatch(types.ApplyPatchType, p.body), client.FieldOwner(t.manager), client.ForceOwnership)
	switch {
	case err == nil, apierrors.IsNotFound(err), apierrors.IsConflict(err): // it is gone
		return false, nil
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return false, err
	}
	return true, err
}

// event announces that a site came or went.
func (t *teller) event(d model.Decoded, v verdict) {
	now := metav1.NowMicro()
	e := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: d.Object.GetNamespace(), Name: fmt.Sprintf("%s.%x", d.Object.GetName(), now.UnixNano())},
		EventTime:  now, ReportingController: "culvert.dev/gateway", ReportingInstance: t.opts.Pod,
		Regarding: corev1.ObjectReference{
			APIVersion: v1alpha1.GroupVersion.String(), Kind: d.Kind(),
			Namespace: d.Object.GetNamespace(), Name: d.Object.GetName(), UID: d.Object.GetUID(),
		},
		Type: corev1.EventTypeNormal, Action: "Connect", Reason: "Connected", Note: "connected through " + t.opts.Pod,
	}
	if !v.ok {
		e.Type, e.Action, e.Reason, e.Note = corev1.EventTypeWarning, "Disconnect", "Disconnected", clip(reasonOf(v.reason)+": "+v.message)
	}
	select {
	case t.events <- e:
	default: // an API server that is away: the condition will tell
	}
}

func (t *teller) writeEvents(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-t.events:
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			if err := t.opts.Client.Create(ctx, e); err != nil && ctx.Err() == nil {
				t.log.Warn("cannot write an event", "object", e.Regarding.Name, "error", err)
			}
			cancel()
		}
	}
}
