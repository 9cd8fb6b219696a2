package gateway

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// resolver keeps the addresses of DNS names fresh in the background, so that a slow DNS
// server never holds up the loop and an endpoint whose address changes is followed. A
// name that fails to resolve keeps its last address.
type resolver struct {
	changed chan struct{} // an address came or changed
	wake    chan struct{}

	mu    sync.Mutex
	names []string
	addrs map[string]netip.Addr
}

// resolved tells which names matter from now on, and returns the addresses known so far.
func (r *resolver) resolved(names []string) map[string]netip.Addr {
	slices.Sort(names)
	names = slices.Compact(names)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(names, r.names) {
		r.names = names
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
	return maps.Clone(r.addrs)
}

func (r *resolver) start(ctx context.Context) {
	r.changed = make(chan struct{}, 1)
	r.wake = make(chan struct{}, 1)
	r.addrs = map[string]netip.Addr{}
	go func() {
		ticker := time.NewTicker(resolveEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-r.wake:
			case <-ticker.C:
			}
			r.refresh(ctx)
		}
	}()
}

func (r *resolver) refresh(ctx context.Context) {
	r.mu.Lock()
	names := r.names
	r.mu.Unlock()
	for _, name := range names {
		addr, ok := lookup(ctx, name)
		r.mu.Lock()
		changed := ok && r.addrs[name] != addr
		if changed {
			r.addrs[name] = addr
		}
		r.mu.Unlock()
		if changed {
			select {
			case r.changed <- struct{}{}:
			default:
			}
		}
	}
}

// lookup resolves one name; of several addresses the smallest, so that the order of the
// answer does not matter.
func lookup(ctx context.Context, name string) (netip.Addr, bool) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil || len(addrs) == 0 {
		return netip.Addr{}, false
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return slices.MinFunc(addrs, netip.Addr.Compare), true
}
