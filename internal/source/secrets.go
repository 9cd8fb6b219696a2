package source

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/model"
)

// How often Secrets are read again: those that could be read, and those that could not
// (it is missing, or the right to read it is on its way).
const (
	secretEvery  = 15 * time.Second
	missingEvery = 2 * time.Second
)

// secretReaders is how many Secrets are read at once.
const secretReaders = 8

// secrets reads the Secrets that are wanted, each by its name. One that could be read and
// cannot be asked for any more, since the API server is away, stays as it was.
type secrets struct {
	client client.Reader
	log    *slog.Logger
	notify func()
	wake   chan struct{}

	mu     sync.Mutex
	wanted map[model.Ref]*secretState
}

type secretState struct {
	object *corev1.Secret // nil: not there, or not to be read
	err    error          // of the last attempt; nil: not tried yet, or read
	next   time.Time      // when it is read again
	asked  bool           // the API server has said whether it is there
}

func newSecrets(c client.Reader, log *slog.Logger, notify func()) *secrets {
	return &secrets{client: c, log: log, notify: notify, wake: make(chan struct{}, 1), wanted: map[model.Ref]*secretState{}}
}

// want says which Secrets matter from now on, and returns those that were read, in the
// order of their names. Ones that are new are read at once, in the background, and
// announced.
func (s *secrets) want(refs []model.Ref) []*corev1.Secret {
	s.mu.Lock()
	defer s.mu.Unlock()
	keep := make(map[model.Ref]*secretState, len(refs))
	fresh := false
	for _, ref := range refs {
		if keep[ref] != nil {
			continue
		}
		keep[ref] = s.wanted[ref]
		if keep[ref] == nil {
			keep[ref], fresh = &secretState{}, true
		}
	}
	s.wanted = keep
	if fresh {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	var out []*corev1.Secret
	for _, st := range keep {
		if st.object != nil {
			out = append(out, st.object)
		}
	}
	slices.SortFunc(out, func(a, b *corev1.Secret) int {
		return compareKeys(a.Namespace, b.Namespace, a.Name, b.Name)
	})
	return out
}

func compareKeys(a, b, x, y string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	case x < y:
		return -1
	case x > y:
		return 1
	}
	return 0
}

// pending reports whether a Secret that is wanted has not been asked for yet.
func (s *secrets) pending() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.wanted {
		if !st.asked {
			return true
		}
	}
	return false
}

func (s *secrets) err(ref model.Ref) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.wanted[ref]; st != nil {
		return st.err
	}
	return nil
}

// run reads what is due until ctx ends.
func (s *secrets) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-timer.C:
		}
		due, next := s.due(time.Now())
		if s.read(ctx, due) {
			s.notify()
		}
		timer.Reset(min(max(time.Until(next), 50*time.Millisecond), missingEvery))
	}
}

func (s *secrets) due(now time.Time) (due []model.Ref, next time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next = now.Add(missingEvery)
	for ref, st := range s.wanted {
		if !st.next.After(now) {
			due = append(due, ref)
		} else if st.next.Before(next) {
			next = st.next
		}
	}
	return due, next
}

// read gets Secrets and reports whether anything came out that was not known.
func (s *secrets) read(ctx context.Context, due []model.Ref) bool {
	jobs := make(chan model.Ref)
	var wg sync.WaitGroup
	var mu sync.Mutex
	changed := false
	for range min(secretReaders, len(due)) {
		wg.Go(func() {
			for ref := range jobs {
				if s.get(ctx, ref) {
					mu.Lock()
					changed = true
					mu.Unlock()
				}
			}
		})
	}
	for _, ref := range due {
		jobs <- ref
	}
	close(jobs)
	wg.Wait()
	return changed
}

func (s *secrets) get(ctx context.Context, ref model.Ref) (changed bool) {
	asking, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	o := &corev1.Secret{}
	err := s.client.Get(asking, client.ObjectKey{Namespace: ref.ID.Namespace, Name: ref.ID.Name}, o)
	if ctx.Err() != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.wanted[ref]
	if st == nil { // not wanted any more
		return false
	}
	first := !st.asked
	st.next = time.Now().Add(secretEvery)
	before := st.err
	switch {
	case err == nil:
		o.ManagedFields = nil
		st.asked, st.err = true, nil
		if st.object != nil && st.object.UID == o.UID && equality.Semantic.DeepEqual(st.object.Data, o.Data) {
			return first || before != nil
		}
		st.object = o
		return true
	case apierrors.IsNotFound(err):
		st.err = fmt.Errorf("there is no %s: create it", ref)
	case apierrors.IsForbidden(err):
		st.err = fmt.Errorf("%s may not be read by this gateway: the operator gives it the right when it accepts the object that names it; see whether the operator runs", ref)
	default: // the API server is away, or busy: what is known stays
		st.next = time.Now().Add(missingEvery)
		if st.object == nil {
			st.err = fmt.Errorf("%s cannot be read: %w", ref, err)
		}
		return (before == nil) != (st.err == nil)
	}
	had := st.object != nil
	st.asked, st.object, st.next = true, nil, time.Now().Add(missingEvery)
	return had || first || before == nil || before.Error() != st.err.Error()
}
