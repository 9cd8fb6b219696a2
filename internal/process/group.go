// Package process is what every long-running command of Culvert has in common: a group
// of parts that live and end together, health and metrics over HTTP, sockets, logs.
//
// It knows nothing of VPNs. Signals are the mains' business: they end the context.
package process

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Group runs the parts of a process. The first part to end, with or without an error,
// ends all others; Wait waits for all of them. Make it with NewGroup.
type Group struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu   sync.Mutex
	errs []error
}

// NewGroup makes a group whose parts end when ctx does.
func NewGroup(ctx context.Context) *Group {
	g := &Group{}
	g.ctx, g.cancel = context.WithCancel(ctx)
	return g
}

// Go starts a part. It has to return soon after its context ends. Its error is reported
// under its name, except that of the context.
func (g *Group) Go(name string, part func(context.Context) error) {
	g.wg.Go(func() {
		defer g.cancel()
		err := part(g.ctx)
		if err == nil || g.ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		g.errs = append(g.errs, fmt.Errorf("%s: %w", name, err))
	})
}

// Stop ends all parts. It may be called more than once.
func (g *Group) Stop() { g.cancel() }

// Wait returns when all parts have ended, with their errors in the order in which they
// came: the first is the cause. It is nil when everything ended as it should. A group
// without parts waits for nothing.
func (g *Group) Wait() error {
	g.wg.Wait()
	g.cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	return errors.Join(g.errs...)
}
