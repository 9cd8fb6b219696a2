package operator

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/workload"
)

// writers is how many requests are under way at once.
const writers = 16

// cacheLag is how long the cache may take to show what was written; after that it is
// believed again.
const cacheLag = 15 * time.Second

// appliedObject is what was written last to an object.
type appliedObject struct {
	hash    [sha256.Size]byte
	version uint64 // resourceVersion afterwards
	at      time.Time
	seen    bool // the cache has shown it since
}

// processName tells this process from others.
func processName() string { return rand.Text()[:8] }

// each calls do for every item, a few at a time, and returns the errors of all.
func each[T any](ctx context.Context, items []T, do func(context.Context, T) error) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	slots := make(chan struct{}, writers)
	for _, item := range items {
		if ctx.Err() != nil {
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := do(ctx, item); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return summary(errs)
}

// summary is a few of many errors: one cause makes thousands.
func summary(errs []error) error {
	const few = 5
	if len(errs) > few {
		errs = append(errs[:few:few], fmt.Errorf("and %d more", len(errs)-few))
	}
	return errors.Join(errs...)
}

// applyConfiguration is an object as an apply request has it: without status and without
// what is null.
func applyConfiguration(o runtime.Object) (*unstructured.Unstructured, error) {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return nil, err
	}
	delete(m, "status")
	dropNull(m)
	return &unstructured.Unstructured{Object: m}, nil
}

func dropNull(m map[string]any) {
	for k, v := range m {
		switch x := v.(type) {
		case nil:
			delete(m, k)
		case map[string]any:
			dropNull(x)
		case []any:
			for _, e := range x {
				if em, ok := e.(map[string]any); ok {
					dropNull(em)
				}
			}
		}
	}
}

// stale reports whether a resourceVersion is older than one that was written.
func stale(cached string, written uint64) bool {
	v, err := strconv.ParseUint(cached, 10, 64)
	return err == nil && v < written
}

func versionOf(u *unstructured.Unstructured) uint64 {
	v, _ := strconv.ParseUint(u.GetResourceVersion(), 10, 64)
	return v
}

func hashOf(v any) [sha256.Size]byte {
	b, err := json.Marshal(v)
	if err != nil {
		return [sha256.Size]byte{}
	}
	return sha256.Sum256(b)
}

func keyOf(o workload.Object) objectKey {
	return objectKey{o.GetObjectKind().GroupVersionKind().GroupKind(), o.GetNamespace(), o.GetName()}
}

// want names an object that is to exist, and applies it unless it is known to be so. It
// is not to be called by two at once; the writing is done by the function returned, which
// may be nil.
func (r *round) want(o workload.Object) (func(context.Context) error, error) {
	key := keyOf(o)
	r.desired[key] = true
	u, err := applyConfiguration(o)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", key.kind.Kind, idOf(o), err)
	}
	hash := hashOf(u.Object)
	have, exists := r.seen.owned[key]
	last, known := r.applied[key]
	if known && last.hash == hash {
		switch {
		case exists && stale(have.meta.ResourceVersion, last.version):
			return nil, nil
		case exists && have.meta.ResourceVersion == strconv.FormatUint(last.version, 10):
			last.seen = true
			r.applied[key] = last
			return nil, nil
		case !exists && !last.seen && r.Now().Sub(last.at) < cacheLag:
			return nil, nil
		}
	}
	return func(ctx context.Context) error {
		err := r.Writer.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(Manager), client.ForceOwnership)
		if err != nil {
			return fmt.Errorf("apply %s %s: %w", key.kind.Kind, idOf(o), err)
		}
		r.note(key, appliedObject{hash: hash, version: versionOf(u), at: r.Now()})
		return nil
	}, nil
}

var noteLock sync.Mutex

func (r *round) note(key objectKey, a appliedObject) {
	noteLock.Lock()
	defer noteLock.Unlock()
	r.applied[key] = a
}

// remove deletes the very object that was seen.
func (r *round) remove(ctx context.Context, kind schema.GroupVersionKind, m metav1.ObjectMeta) error {
	p := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name}}
	p.SetGroupVersionKind(kind)
	uid := m.UID
	err := r.Writer.Delete(ctx, p, client.Preconditions{UID: &uid}, client.PropagationPolicy(metav1.DeletePropagationBackground))
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete %s %s: %w", kind.Kind, idOf(p), err)
	}
	return nil
}
