package operator

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
)

// Pauses between two attempts to read from an API server that is away, and for how long one
// that answers and refuses is asked again: one that starts refuses everybody for a moment.
const (
	outagePause   = 200 * time.Millisecond
	outageLongest = 3 * time.Second
	outageRefused = 8 * time.Second
)

// outage keeps informers asking while the API server is away. An informer's own pauses grow
// with each attempt that failed within two minutes, up to one: after a second outage the
// operator would see nothing new for as long.
type outage struct {
	log *slog.Logger

	mu   sync.Mutex
	away bool // as logged
}

// newInformer is toolscache.NewSharedIndexInformer, whose lists and watches go through persist.
func (o *outage) newInformer(lw toolscache.ListerWatcher, object runtime.Object, resync time.Duration, indexers toolscache.Indexers) toolscache.SharedIndexInformer {
	ask := toolscache.ToListerWatcherWithContext(lw)
	return toolscache.NewSharedIndexInformer(&toolscache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (list runtime.Object, err error) {
			err = o.persist(ctx, func() (err error) { list, err = ask.ListWithContext(ctx, options); return err })
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (w watch.Interface, err error) {
			err = o.persist(ctx, func() (err error) { w, err = ask.WatchWithContext(ctx, options); return err })
			return w, err
		},
	}, object, resync, indexers)
}

// persist asks until there is an answer, or ctx ends. What the API server refuses for longer
// than while it starts, or for what was asked, is an answer.
func (o *outage) persist(ctx context.Context, ask func() error) error {
	var refused time.Time // since when, with nothing else in between
	for pause := outagePause; ; pause = min(2*pause, outageLongest) {
		err := ask()
		switch {
		case ctx.Err() != nil:
			return errors.Join(err, ctx.Err())
		case err == nil:
			o.note(nil)
			return nil
		case unreachable(err):
			o.note(err)
			refused = time.Time{}
		case !starting(err):
			return err
		case refused.IsZero():
			refused = time.Now()
		case time.Since(refused) > outageRefused:
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(pause/2 + rand.N(pause)):
		}
	}
}

// unreachable reports whether nobody answered.
func unreachable(err error) bool {
	var transport *url.Error
	return errors.As(err, &transport)
}

// starting reports whether an API server may answer so because it is not ready yet.
func starting(err error) bool {
	switch apierrors.ReasonForError(err) {
	case metav1.StatusReasonUnauthorized, metav1.StatusReasonForbidden, metav1.StatusReasonServiceUnavailable,
		metav1.StatusReasonInternalError, metav1.StatusReasonTooManyRequests:
		return true
	}
	return false
}

// note logs once that the API server is away, and that it is back.
func (o *outage) note(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case err != nil && !o.away:
		o.log.Warn("cannot read from the API server: what is in effect stays", "error", err)
	case err == nil && o.away:
		o.log.Info("the API server can be read again")
	}
	o.away = err != nil
}
