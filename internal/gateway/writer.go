package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// writer writes statuses, EndpointSlices and events in the background: workers write the
// newest for each object until it is there, so that an API server that is away holds up
// nothing.
type writer struct {
	opts Cluster
	log  *slog.Logger

	mu      sync.Mutex
	pending map[target]patch
	order   []target
	busy    map[target]bool
	wake    chan struct{}
	events  chan *eventsv1.Event
}

// target is an object as one field manager sees it.
type target struct {
	model.Ref
	manager string
}

// patch is a status, or a whole object, to be applied.
type patch struct {
	at   client.Object
	body []byte
}

// writers is how many write at once, longestPause how long one waits after a failure.
const (
	writers      = 8
	longestPause = 5 * time.Second
)

func newWriter(opts Cluster, log *slog.Logger) *writer {
	return &writer{
		opts: opts, log: log, pending: map[target]patch{}, busy: map[target]bool{},
		wake: make(chan struct{}, writers), events: make(chan *eventsv1.Event, 256),
	}
}

// queue has a status written. The object's UID goes with it, so that a later object of the
// same name never gets it.
func (w *writer) queue(ref model.Ref, o metav1.Object, manager string, status map[string]any) {
	body, err := json.Marshal(map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": ref.Kind, "status": status,
		"metadata": map[string]any{"name": o.GetName(), "namespace": o.GetNamespace(), "uid": o.GetUID()},
	})
	if err != nil { // of plain data: it cannot be
		w.log.Error("status", "object", ref.String(), "error", err)
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
	w.mu.Lock()
	w.put(target{ref, manager}, p)
	w.mu.Unlock()
}

// queueSlice has an EndpointSlice written.
func (w *writer) queueSlice(s *discoveryv1.EndpointSlice) {
	body, err := json.Marshal(s)
	if err != nil { // of plain data: it cannot be
		w.log.Error("endpoint slice", "object", s.Name, "error", err)
		return
	}
	ref := model.Ref{Kind: model.KindEndpointSlice, ID: model.ID{Namespace: s.Namespace, Name: s.Name}}
	at := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name}}
	w.mu.Lock()
	w.put(target{ref, gatewayManager}, patch{at: at, body: body})
	w.mu.Unlock()
}

// forget drops what waits to be said by a field manager: it is another's turn.
func (w *writer) forget(manager string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.pending, func(t target, _ patch) bool { return t.manager == manager })
	w.order = slices.DeleteFunc(w.order, func(t target) bool { return t.manager == manager })
}

func (w *writer) put(ref target, p patch) {
	if _, waits := w.pending[ref]; !waits {
		w.order = append(w.order, ref)
	}
	w.pending[ref] = p
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// take returns the status that has waited longest and that nobody is writing.
func (w *writer) take() (target, patch, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, ref := range w.order {
		if w.busy[ref] {
			continue
		}
		p := w.pending[ref]
		if i == 0 {
			w.order = w.order[1:]
		} else {
			w.order = slices.Delete(w.order, i, i+1)
		}
		delete(w.pending, ref)
		w.busy[ref] = true
		return ref, p, true
	}
	return target{}, patch{}, false
}

// done puts a status that could not be written back, unless there is a newer one.
func (w *writer) done(ref target, p patch, again bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.busy, ref)
	if _, newer := w.pending[ref]; again && !newer {
		w.put(ref, p)
	}
}

// run writes until ctx ends.
func (w *writer) run(ctx context.Context) {
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() { w.write(ctx) })
	}
	wg.Go(func() { w.writeEvents(ctx) })
	wg.Wait()
}

func (w *writer) write(ctx context.Context) {
	pause := time.Second
	for {
		ref, p, ok := w.take()
		if !ok {
			select {
			case <-ctx.Done():
				return
			case <-w.wake:
			}
			continue
		}
		again, err := w.apply(ctx, ref.manager, p)
		w.done(ref, p, again)
		if err == nil {
			pause = time.Second
			continue
		}
		if ctx.Err() != nil {
			return
		}
		w.log.Warn("cannot report", "object", ref.String(), "error", err, "again", again)
		if !again {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}

// apply writes one of them; again says whether another attempt makes sense.
func (w *writer) apply(ctx context.Context, manager string, p patch) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	how := client.RawPatch(types.ApplyPatchType, p.body)
	if _, whole := p.at.(*discoveryv1.EndpointSlice); whole {
		err = w.opts.Client.Patch(ctx, p.at, how, client.FieldOwner(manager), client.ForceOwnership)
	} else {
		err = w.opts.Client.Status().Patch(ctx, p.at, how, client.FieldOwner(manager), client.ForceOwnership)
	}
	switch {
	case err == nil, apierrors.IsNotFound(err), apierrors.IsConflict(err): // it is gone
		return false, nil
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return false, err
	}
	return true, err
}

// event announces that a site came or went.
func (w *writer) event(d model.Decoded, v verdict) {
	now := metav1.NowMicro()
	e := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: d.Object.GetNamespace(), Name: fmt.Sprintf("%s.%x", d.Object.GetName(), now.UnixNano())},
		EventTime:  now, ReportingController: "culvert.dev/gateway", ReportingInstance: w.opts.Pod,
		Regarding: corev1.ObjectReference{
			APIVersion: v1alpha1.GroupVersion.String(), Kind: d.Kind(),
			Namespace: d.Object.GetNamespace(), Name: d.Object.GetName(), UID: d.Object.GetUID(),
		},
		Type: corev1.EventTypeNormal, Action: "Connect", Reason: "Connected", Note: "connected through " + w.opts.Pod,
	}
	if !v.ok {
		e.Type, e.Action, e.Reason, e.Note = corev1.EventTypeWarning, "Disconnect", "Disconnected", clip(reasonOf(v.reason)+": "+v.message)
	}
	select {
	case w.events <- e:
	default: // an API server that is away: the condition will tell
	}
}

func (w *writer) writeEvents(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-w.events:
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			if err := w.opts.Client.Create(ctx, e); err != nil && ctx.Err() == nil {
				w.log.Warn("cannot write an event", "object", e.Regarding.Name, "error", err)
			}
			cancel()
		}
	}
}
