package front

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the front's own. Labels come from the table and from lists in this package,
// never from a client.
type metrics struct {
	open     *prometheus.GaugeVec
	total    *prometheus.CounterVec
	refused  *prometheus.CounterVec
	ended    *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	failures *prometheus.CounterVec
	dials    prometheus.Histogram
	routes   prometheus.Gauge
	changes  prometheus.Counter
	refusedT prometheus.Gauge
	draining prometheus.Gauge
	pending  prometheus.GaugeFunc
}

// tenantMetrics are those that are needed for every byte.
type tenantMetrics struct {
	open                 prometheus.Gauge
	fromClient, toClient prometheus.Counter
}

func newMetrics(pending func() float64) *metrics {
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	return &metrics{
		open:     prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "culvert_front_connections", Help: "Connections that are relayed now."}, []string{"tenant"}),
		total:    counters("culvert_front_connections_total", "Connections that were relayed, by how they said where to.", "tenant", "protocol"),
		refused:  counters("culvert_front_refused_total", "Connections that were not relayed, by reason; without a tenant when that was not known.", "tenant", "reason"),
		ended:    counters("culvert_front_ended_total", "Connections that were relayed and have ended, by reason.", "tenant", "reason"),
		bytes:    counters("culvert_front_bytes_total", "Bytes relayed from clients (in) and to clients (out).", "tenant", "direction"),
		failures: counters("culvert_front_dial_failures_total", "Backends that could not be connected to; the next one was tried.", "tenant"),
		dials: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "culvert_front_dial_seconds", Help: "How long it took to connect to a backend, failures included.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5},
		}),
		routes:   gauge("culvert_front_routes", "Server names in the routing table."),
		changes:  prometheus.NewCounter(prometheus.CounterOpts{Name: "culvert_front_table_changes_total", Help: "Changes of the routing table that took effect."}),
		refusedT: gauge("culvert_front_table_refused", "1 while the routing table's file is not in effect, because it is wrong or unreadable."),
		draining: gauge("culvert_front_draining", "1 after the front was told to stop."),
		pending: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_front_pending_connections", Help: "Connections that have not said yet where to.",
		}, pending),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.all() {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.all() {
		c.Collect(ch)
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{
		m.open, m.total, m.refused, m.ended, m.bytes, m.failures,
		m.dials, m.routes, m.changes, m.refusedT, m.draining, m.pending,
	}
}

func (m *metrics) tenant(name string) tenantMetrics {
	return tenantMetrics{
		open:       m.open.WithLabelValues(name),
		fromClient: m.bytes.WithLabelValues(name, "in"),
		toClient:   m.bytes.WithLabelValues(name, "out"),
	}
}

// forget drops what is counted for a tenant that is no more.
func (m *metrics) forget(name string) {
	tenant := prometheus.Labels{"tenant": name}
	m.open.DeletePartialMatch(tenant)
	for _, v := range []*prometheus.CounterVec{m.total, m.refused, m.ended, m.bytes, m.failures} {
		v.DeletePartialMatch(tenant)
	}
}
