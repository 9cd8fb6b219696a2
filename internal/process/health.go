package process

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
)

// Health holds the checks behind /healthz (should this process be restarted?) and
// /readyz (can it do its work?). A process without checks is healthy and ready. Make it
// with NewHealth.
type Health struct {
	mu          sync.Mutex
	live, ready []check
}

type check struct {
	name string
	run  func() error
}

// NewHealth makes a Health without checks.
func NewHealth() *Health { return &Health{} }

// AddLive adds a check to /healthz: nil for well, else one line that says what is wrong.
// Checks are called with every request, from several goroutines; they must be quick, so
// they report what is known rather than find out.
func (h *Health) AddLive(name string, run func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.live = append(h.live, check{name, run})
}

// AddReady adds a check to /readyz, see AddLive.
func (h *Health) AddReady(name string, run func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ready = append(h.ready, check{name, run})
}

func (h *Health) serveLive(w http.ResponseWriter, _ *http.Request)  { h.serve(w, false) }
func (h *Health) serveReady(w http.ResponseWriter, _ *http.Request) { h.serve(w, true) }

// serve answers 200 or 503, with a line per check.
func (h *Health) serve(w http.ResponseWriter, ready bool) {
	h.mu.Lock()
	checks := h.live
	if ready {
		checks = h.ready
	}
	h.mu.Unlock()
	status := http.StatusOK
	var body strings.Builder
	for _, c := range checks {
		if err := c.run(); err != nil {
			status = http.StatusServiceUnavailable
			fmt.Fprintf(&body, "%s: %s\n", c.name, strings.ReplaceAll(err.Error(), "\n", "; "))
			continue
		}
		fmt.Fprintf(&body, "%s: ok\n", c.name)
	}
	if body.Len() == 0 {
		body.WriteString("ok\n")
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(body.String()))
}
