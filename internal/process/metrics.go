package process

import (
	"net/http"
	"net/http/pprof"
	"runtime"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// version is set at build time: -ldflags "-X …/internal/process.version=v1.2.3".
var version string

// Version is the version of this program: as given at build time, else the module's as
// the Go tool knows it, else "devel".
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}

// revision is the commit that this program was built from; empty: unknown.
func revision() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return ""
}

// NewRegistry makes a registry with the metrics of the Go runtime and the process, and
// culvert_build_info.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "culvert_build_info",
		Help:        "Always 1; the labels say what this program is.",
		ConstLabels: prometheus.Labels{"version": Version(), "revision": revision(), "goversion": runtime.Version()},
	})
	build.Set(1)
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Mux serves /healthz, /readyz and /metrics, and /debug/pprof only when asked for: it
// lets callers read the program's memory and spend its time.
func Mux(h *Health, r *prometheus.Registry, withPProf bool) *http.ServeMux {
	m := http.NewServeMux()
	m.HandleFunc("GET /healthz", h.serveLive)
	m.HandleFunc("GET /readyz", h.serveReady)
	// A collector that fails costs its own metrics, not all others.
	m.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{Registry: r, ErrorHandling: promhttp.ContinueOnError}))
	if withPProf {
		m.HandleFunc("GET /debug/pprof/", pprof.Index)
		m.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		m.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		m.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		m.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return m
}
