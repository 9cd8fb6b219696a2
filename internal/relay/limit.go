package relay

import (
	"net/netip"
	"sync"
)

// limiter counts what is open, in total and per source address. A negative limit means
// none.
type limiter struct {
	max, perSource int

	mu       sync.Mutex
	total    int
	bySource map[netip.Addr]int
}

func newLimiter(limit, perSource int) limiter {
	return limiter{max: limit, perSource: perSource, bySource: map[netip.Addr]int{}}
}

// acquire counts one more, or says which limit stands against it.
func (l *limiter) acquire(source netip.Addr) (Reason, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.max >= 0 && l.total >= l.max {
		return RefusedLimit, false
	}
	if l.perSource >= 0 && l.bySource[source] >= l.perSource {
		return RefusedSourceLimit, false
	}
	l.total++
	l.bySource[source]++
	return "", true
}

func (l *limiter) release(source netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.bySource[source]--; l.bySource[source] == 0 {
		delete(l.bySource, source)
	}
}

func (l *limiter) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}
