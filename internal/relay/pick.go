package relay

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// candidates lists up to n different endpoints in the order in which to try them for the
// client: the one it is bound to by affinity, then the others from a random place on;
// those that failed lately come last.
func (r *Relay) candidates(s *service, client netip.Addr, n int) []netip.AddrPort {
	if len(s.endpoints) == 0 {
		return nil
	}
	n = min(n, len(s.endpoints))
	now := time.Now()
	out := make([]netip.AddrPort, 0, n)
	if s.affinity > 0 {
		e, ok := r.affinity.get(affinityKey{s.key, client}, now)
		if ok && s.has(e) && !r.failures.has(e, now) {
			out = append(out, e)
		}
	}
	start := rand.IntN(len(s.endpoints))
	for _, failed := range []bool{false, true} {
		for i := 0; i < len(s.endpoints) && len(out) < n; i++ {
			e := s.endpoints[(start+i)%len(s.endpoints)]
			if r.failures.has(e, now) == failed && !slices.Contains(out, e) {
				out = append(out, e)
			}
		}
	}
	return out
}

// chosen binds the client to the endpoint when the service asks for it.
func (r *Relay) chosen(s *service, client netip.Addr, endpoint netip.AddrPort) {
	if s.affinity > 0 {
		r.affinity.set(affinityKey{s.key, client}, endpoint, time.Now().Add(s.affinity))
	}
}

// maxAffinity bounds the clients that are remembered; further ones get no affinity.
const maxAffinity = 1 << 17

type affinityKey struct {
	service serviceKey
	client  netip.Addr
}

type affinityEntry struct {
	endpoint netip.AddrPort
	until    time.Time
}

// affinity remembers which endpoint a client was given last.
type affinity struct {
	mu      sync.Mutex
	entries map[affinityKey]affinityEntry
}

func (a *affinity) init() { a.entries = map[affinityKey]affinityEntry{} }

func (a *affinity) get(k affinityKey, now time.Time) (netip.AddrPort, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e, ok := a.entries[k]
	return e.endpoint, ok && now.Before(e.until)
}

func (a *affinity) set(k affinityKey, endpoint netip.AddrPort, until time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.entries[k]; known || len(a.entries) < maxAffinity {
		a.entries[k] = affinityEntry{endpoint, until}
	}
}

func (a *affinity) expire(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for k, e := range a.entries {
		if !now.Before(e.until) {
			delete(a.entries, k)
		}
	}
}

// avoidance is how long an endpoint that failed is asked last. Linux sends an ICMP
// message about a closed UDP port once a second at most, so one failure must do for a
// while.
const avoidance = 10 * time.Second

// failures remembers which endpoints failed lately.
type failures struct {
	mu    sync.RWMutex
	until map[netip.AddrPort]time.Time
}

func (f *failures) init() { f.until = map[netip.AddrPort]time.Time{} }

func (f *failures) has(e netip.AddrPort, now time.Time) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return now.Before(f.until[e])
}

func (f *failures) add(e netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.until[e] = time.Now().Add(avoidance)
}

func (f *failures) remove(e netip.AddrPort) {
	f.mu.RLock()
	_, there := f.until[e]
	f.mu.RUnlock()
	if !there {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.until, e)
}

func (f *failures) expire(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for e, until := range f.until {
		if !now.Before(until) {
			delete(f.until, e)
		}
	}
}
