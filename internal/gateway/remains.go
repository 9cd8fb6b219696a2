package gateway

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/store"
)

// remains keeps what a restarted container needs while there is no API server.
type remains struct {
	store *store.Store // nil: nothing is kept

	mu     sync.Mutex
	latest store.Snapshot
	dirty  bool
	seen   []model.Decoded // the objects of latest
}

// How often what changed is kept, and how long the API server may take before what was kept
// is used.
const (
	remainEvery    = 5 * time.Second
	remainPatience = 2 * time.Second
)

// note takes in the objects that were read.
func (r *remains) note(objects model.Objects) {
	var few []model.Decoded
	for _, d := range objects.All() {
		if k := d.Kind(); k != model.KindService && k != model.KindEndpointSlice {
			few = append(few, d)
		}
	}
	same := func(a, b model.Decoded) bool { return a.Object == b.Object }
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.EqualFunc(few, r.seen, same) {
		return
	}
	r.latest.Objects = model.Objects{}
	for _, d := range few {
		r.latest.Objects.Add(d)
	}
	r.seen, r.dirty = few, true
}

// identified takes in who the gateway is.
func (r *remains) identified(id identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.latest.PrivateKey, r.latest.PublicKey, r.dirty = id.private, id.public, true
	r.latest.Endpoints = maps.Clone(id.endpoints)
}

// moved takes in where the peers are.
func (r *remains) moved(m map[netstate.Key]netip.AddrPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.latest.Endpoints, r.dirty = maps.Clone(m), true
}

// run keeps what changed until ctx ends, and then once more.
func (r *remains) run(ctx context.Context, failed func(error)) {
	if r.store == nil {
		return
	}
	t := time.NewTicker(remainEvery)
	defer t.Stop()
	for ended := false; !ended; {
		select {
		case <-ctx.Done():
			ended = true
		case <-t.C:
		}
		r.mu.Lock()
		v, due := r.latest, r.dirty && !r.latest.PrivateKey.IsZero()
		r.dirty = r.dirty && !due
		r.mu.Unlock()
		if due {
			if err := r.store.SaveSnapshot(v); err != nil {
				failed(err)
			}
		}
	}
}

// readKept reads the objects as an earlier process of this pod has left them, when the API
// server does not come forward. The error is that of the API server when there are none.
func (c *cluster) readKept(cause error) (model.Objects, error) {
	if c.remains.store == nil || !errors.Is(cause, source.ErrNotSynced) || time.Since(c.began) < remainPatience {
		return model.Objects{}, cause
	}
	if c.kept == nil {
		v, err := c.remains.store.Snapshot()
		if err != nil || v == nil {
			return model.Objects{}, errors.Join(cause, err)
		}
		c.log.Warn("there is no API server: using the objects as they were before this process", "error", cause)
		c.kept = v
	}
	return c.kept.Objects, nil
}
