package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// table holds the objects of one kind; it is what a reflector writes into.
type table struct {
	kind    string
	example metav1.Object
	list    func() client.ObjectList
	notify  func()
	synced  chan struct{} // closed with the first complete list

	mu      sync.Mutex
	once    sync.Once
	objects map[string]metav1.Object // by "namespace/name"
	sorted  []metav1.Object          // nil: to be made
}

func newTable(example metav1.Object, list func() client.ObjectList, notify func()) *table {
	return &table{
		kind: model.Decoded{Object: example}.Kind(), example: example, list: list, notify: notify,
		synced: make(chan struct{}), objects: map[string]metav1.Object{},
	}
}

func key(o metav1.Object) string { return o.GetNamespace() + "/" + o.GetName() }

// Add takes in a new object.
func (t *table) Add(obj any) error { return t.Update(obj) }

// Update takes in an object. One that says nothing new leaves the old one in place, so
// that whoever compares snapshots sees the very same object.
func (t *table) Update(obj any) error {
	o, ok := obj.(metav1.Object)
	if !ok {
		return fmt.Errorf("watch %s: got a %T", t.kind, obj)
	}
	t.mu.Lock()
	changed := t.put(o)
	t.mu.Unlock()
	if changed {
		t.notify()
	}
	return nil
}

func (t *table) put(o metav1.Object) bool {
	k := key(o)
	old, known := t.objects[k]
	if terminating(o) {
		delete(t.objects, k)
		t.sorted = nil
		return known
	}
	if known && same(old, o) {
		return false
	}
	o.SetManagedFields(nil)
	t.objects[k], t.sorted = o, nil
	return true
}

// terminating objects are gone, whatever finalizers still wait for: a device that was
// deleted must be locked out at once. A gateway works until its pods are stopped.
func terminating(o metav1.Object) bool {
	switch o.(type) {
	case *v1alpha1.Site, *v1alpha1.Device:
		return o.GetDeletionTimestamp() != nil
	}
	return false
}

// Delete takes an object out.
func (t *table) Delete(obj any) error {
	o, ok := obj.(metav1.Object)
	if !ok {
		return fmt.Errorf("watch %s: got a %T", t.kind, obj)
	}
	t.mu.Lock()
	_, known := t.objects[key(o)]
	delete(t.objects, key(o))
	t.sorted = nil
	t.mu.Unlock()
	if known {
		t.notify()
	}
	return nil
}

// Replace takes in a complete list.
func (t *table) Replace(list []any, _ string) error {
	t.mu.Lock()
	seen := make(map[string]bool, len(list))
	changed := false
	for _, obj := range list {
		o, ok := obj.(metav1.Object)
		if !ok {
			t.mu.Unlock()
			return fmt.Errorf("list %s: got a %T", t.kind, obj)
		}
		seen[key(o)] = true
		changed = t.put(o) || changed
	}
	for k := range t.objects {
		if !seen[k] {
			delete(t.objects, k)
			t.sorted, changed = nil, true
		}
	}
	t.mu.Unlock()
	t.once.Do(func() { close(t.synced) })
	if changed {
		t.notify()
	}
	return nil
}

// Resync does nothing: nobody waits for it.
func (t *table) Resync() error { return nil }

// snapshot lists the objects by namespace and name. The list is not to be changed.
func (t *table) snapshot() []metav1.Object {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sorted == nil {
		t.sorted = make([]metav1.Object, 0, len(t.objects))
		for _, k := range slices.Sorted(maps.Keys(t.objects)) {
			t.sorted = append(t.sorted, t.objects[k])
		}
	}
	return t.sorted
}

// same reports whether two versions of an object mean the same to a gateway: what it
// writes into status itself, and what others keep counting there, is no news.
func same(a, b metav1.Object) bool {
	if a.GetUID() != b.GetUID() || a.GetGeneration() != b.GetGeneration() || !(model.Decoded{Object: a}).Equal(model.Decoded{Object: b}) {
		return false
	}
	switch x := a.(type) {
	case *v1alpha1.VPNGateway:
		y := b.(*v1alpha1.VPNGateway)
		return equality.Semantic.DeepEqual(x.Status.Cluster, y.Status.Cluster) &&
			x.Status.Address == y.Status.Address && x.Status.WireGuardPort == y.Status.WireGuardPort && x.Status.NodeLink == y.Status.NodeLink &&
			equality.Semantic.DeepEqual(x.Status.Endpoints, y.Status.Endpoints) && sameSaid(x.Status.Conditions, y.Status.Conditions)
	case *v1alpha1.Site:
		return sameSaid(x.Status.Conditions, b.(*v1alpha1.Site).Status.Conditions)
	case *v1alpha1.Device:
		y := b.(*v1alpha1.Device)
		return slices.Equal(x.Status.Addresses, y.Status.Addresses) && x.Status.PublicKey == y.Status.PublicKey &&
			sameSaid(x.Status.Conditions, y.Status.Conditions)
	case *v1alpha1.NodeEncryption:
		return equality.Semantic.DeepEqual(x.Status, b.(*v1alpha1.NodeEncryption).Status)
	case *v1alpha1.NodeTunnel:
		y := b.(*v1alpha1.NodeTunnel)
		return x.Annotations[model.RotateAnnotation] == y.Annotations[model.RotateAnnotation] && equality.Semantic.DeepEqual(x.Status, y.Status)
	}
	return true
}

// sameSaid is about what the operator says.
func sameSaid(a, b []metav1.Condition) bool {
	return sameAccepted(a, b) && slices.Equal(handedBack(a), handedBack(b))
}

// handedBack are the conditions that a gateway's pod is to say again.
func handedBack(list []metav1.Condition) (kinds []string) {
	for _, c := range list {
		if c.Reason == model.ReasonHandedBack {
			kinds = append(kinds, c.Type)
		}
	}
	return kinds
}

func sameAccepted(a, b []metav1.Condition) bool {
	x, y := meta.FindStatusCondition(a, v1alpha1.ConditionAccepted), meta.FindStatusCondition(b, v1alpha1.ConditionAccepted)
	if x == nil || y == nil {
		return x == y
	}
	return x.Status == y.Status && x.Reason == y.Reason && x.ObservedGeneration == y.ObservedGeneration
}

// retry is how an API server is asked again: soon at first, and every few seconds at
// least, so that its return is noticed.
func retry() *wait.Backoff {
	return &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 100, Cap: 5 * time.Second}
}

// outage says once that something cannot be read, and once that it can again.
type outage struct {
	log  *slog.Logger
	what string

	mu  sync.Mutex
	bad string
}

func (o *outage) note(ctx context.Context, err error) {
	if ctx.Err() != nil || errors.Is(err, context.Canceled) {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case err == nil && o.bad != "":
		o.bad = ""
		o.log.Info("the API server can be read again", "kind", o.what)
	case err != nil && o.bad == "":
		o.bad = err.Error()
		o.log.Warn("cannot read from the API server: what is in effect stays", "kind", o.what, "error", err)
	}
}
