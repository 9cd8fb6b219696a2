package operator

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
)

// flaky is an API server with one Node that goes away at times, and refuses everybody for a
// second when it starts.
type flaky struct {
	mu    sync.Mutex
	away  bool
	since time.Time // when it started
	node  string
	open  []*watch.FakeWatcher
}

func (f *flaky) ask() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.away:
		return &url.Error{Op: "Get", URL: "https://server", Err: errors.New("connection refused")}
	case time.Since(f.since) < time.Second:
		return apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "", errors.New("no roles yet"))
	}
	return nil
}

func (f *flaky) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = true
	for _, w := range f.open {
		w.Stop()
	}
	f.open = nil
}

func (f *flaky) start(node string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away, f.since, f.node = false, time.Now(), node
}

func (f *flaky) list() *corev1.NodeList {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &corev1.NodeList{ListMeta: metav1.ListMeta{ResourceVersion: "1"}, Items: []corev1.Node{{ObjectMeta: metav1.ObjectMeta{Name: f.node}}}}
}

func (f *flaky) watch() watch.Interface {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := watch.NewFakeWithChanSize(1, false)
	w.Add(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: f.node, ResourceVersion: "2"}})
	f.open = append(f.open, w)
	return w
}

// After one outage after the other the operator sees what is new within seconds.
func TestOutages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &flaky{}
		f.start("n0")
		o := &outage{log: slog.New(slog.DiscardHandler)}
		informer := o.newInformer(&toolscache.ListWatch{
			ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) {
				return f.list(), f.ask()
			},
			WatchFuncWithContext: func(_ context.Context, o metav1.ListOptions) (watch.Interface, error) {
				if err := f.ask(); err != nil {
					return nil, err
				}
				if o.SendInitialEvents != nil {
					return nil, apierrors.NewInvalid(schema.GroupKind{}, "", nil)
				}
				return f.watch(), nil
			},
		}, &corev1.Node{}, 0, toolscache.Indexers{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { informer.RunWithContext(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		for i, node := range []string{"n1", "n2", "n3"} {
			time.Sleep(10 * time.Second)
			f.stop()
			time.Sleep([]time.Duration{6 * time.Second, 20 * time.Second, 2 * time.Second}[i])
			f.start(node)
			start := time.Now()
			for !slices.Contains(informer.GetStore().ListKeys(), node) {
				if time.Sleep(100 * time.Millisecond); time.Since(start) > time.Minute {
					t.Fatalf("outage %d: %s is not seen", i, node)
				}
			}
			took := time.Since(start)
			t.Logf("outage %d: seen %s after the API server is back", i, took)
			if took > 10*time.Second {
				t.Errorf("outage %d: seen %s after the API server is back, want 10 s at most", i, took)
			}
		}
	})
}

// What the API server means is passed on: at once where it is about the request, and after a
// while where it may be because it is starting.
func TestPersistEnds(t *testing.T) {
	gone := apierrors.NewResourceExpired("too old")
	forbidden := apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "", nil)
	for name, tc := range map[string]struct {
		err         error
		least, most time.Duration
	}{
		"expired":   {gone, 0, 0},
		"forbidden": {forbidden, outageRefused, outageRefused + 2*outageLongest},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				o := &outage{log: slog.New(slog.DiscardHandler)}
				if err := o.persist(t.Context(), func() error { return tc.err }); !errors.Is(err, tc.err) {
					t.Errorf("error %v, want %v", err, tc.err)
				}
				if took := time.Since(start); took < tc.least || took > tc.most {
					t.Errorf("it took %s, want %s to %s", took, tc.least, tc.most)
				}
			})
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			away := &url.Error{Op: "Get", URL: "https://server", Err: errors.New("connection refused")}
			o := &outage{log: slog.New(slog.DiscardHandler)}
			if err := o.persist(ctx, func() error { return away }); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want the context's", err)
			}
		})
	})
}
