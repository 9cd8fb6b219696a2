// Package meter counts what goes through the reversed tunnel, for Prometheus.
package meter

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Meter counts for one part (hub, spoke or egress) of one RemoteCluster. A nil Meter
// counts nothing.
type Meter struct {
	refused  *prometheus.CounterVec
	opened   *prometheus.CounterVec
	open     prometheus.Gauge
	dial     prometheus.Histogram
	total    prometheus.Histogram
	bytes    *prometheus.CounterVec
	sessions *prometheus.GaugeVec
	lost     prometheus.Counter
	cut      *prometheus.CounterVec
	expires  prometheus.Gauge
}

// latencies: from a local dial to the limit of 9 s.
var latencies = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// New makes a Meter and registers it.
func New(r prometheus.Registerer, part, remoteCluster string) *Meter {
	labels := prometheus.Labels{"part": part, "remote_cluster": remoteCluster}
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Name: "culvert_tunnel_" + name, Help: help, ConstLabels: labels}
	}
	histogram := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: "culvert_tunnel_" + name, Help: help, ConstLabels: labels, Buckets: latencies})
	}
	m := &Meter{
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts(opts("refused_total", "Streams that were not opened, by reason.")), []string{"reason"}),
		opened:   prometheus.NewCounterVec(prometheus.CounterOpts(opts("streams_total", "Streams that were opened; kind: target or export.")), []string{"kind"}),
		open:     prometheus.NewGauge(prometheus.GaugeOpts(opts("streams", "Streams that are open."))),
		dial:     histogram("dial_seconds", "How long the last dial of a stream took, at the end that dials."),
		total:    histogram("open_seconds", "How long it took to open a stream, with the way to the other end and back."),
		bytes:    prometheus.NewCounterVec(prometheus.CounterOpts(opts("bytes_total", "Bytes of streams; direction: to or from the target.")), []string{"direction"}),
		sessions: prometheus.NewGaugeVec(prometheus.GaugeOpts(opts("connections", "Connections to the other end; peer: its name.")), []string{"peer"}),
		lost:     prometheus.NewCounter(prometheus.CounterOpts(opts("connections_lost_total", "Connections to the other end that ended without having been asked to."))),
		cut:      prometheus.NewCounterVec(prometheus.CounterOpts(opts("streams_cut_total", "Streams that were open and were cut instead of ended, by reason: lost, a connection between hub, spoke and egress; cut, that of the client or the target.")), []string{"reason"}),
		expires:  prometheus.NewGauge(prometheus.GaugeOpts(opts("certificate_expiration_seconds", "Unix time at which the own certificate expires."))),
	}
	r.MustRegister(m.refused, m.opened, m.open, m.dial, m.total, m.bytes, m.sessions, m.lost, m.cut, m.expires)
	return m
}

// Refused counts a stream that was not opened.
func (m *Meter) Refused(r wire.Reason) {
	if m != nil {
		m.refused.WithLabelValues(string(r)).Inc()
	}
}

// Opened counts a stream that was opened: kind is "target" or "export", dial how long the
// dial itself took, total how long everything took; zero: not known here.
func (m *Meter) Opened(kind string, dial, total time.Duration) {
	if m == nil {
		return
	}
	m.opened.WithLabelValues(kind).Inc()
	m.open.Inc()
	if dial > 0 {
		m.dial.Observe(dial.Seconds())
	}
	if total > 0 {
		m.total.Observe(total.Seconds())
	}
}

// Closed counts the end of a stream that was opened; cut is why it was cut, nil: it ended.
func (m *Meter) Closed(to, from int64, cut *wire.Refusal) {
	if m == nil {
		return
	}
	if cut != nil {
		m.cut.WithLabelValues(string(cut.Reason)).Inc()
	}
	m.open.Dec()
	m.bytes.WithLabelValues("to").Add(float64(to))
	m.bytes.WithLabelValues("from").Add(float64(from))
}

// LogCut logs that a stream was cut, if it was: one that went with a connection between
// hub, spoke and egress for everybody to see, since a client on a Unix socket may take it
// for an end; others in detail logs only.
func LogCut(l *slog.Logger, target string, cut *wire.Refusal) {
	if cut == nil || l == nil {
		return
	}
	level := slog.LevelDebug
	if cut.Reason == wire.ReasonLost {
		level = slog.LevelInfo
	}
	l.Log(context.Background(), level, "stream cut", "target", wire.Line(target), "reason", string(cut.Reason), "error", cut)
}

// Sessions sets the number of connections to a peer; zero forgets the peer.
func (m *Meter) Sessions(peer string, n int) {
	switch {
	case m == nil:
	case n == 0:
		m.sessions.DeleteLabelValues(peer)
	default:
		m.sessions.WithLabelValues(peer).Set(float64(n))
	}
}

// Lost counts a connection that ended without having been asked to.
func (m *Meter) Lost() {
	if m != nil {
		m.lost.Inc()
	}
}

// Expires sets when the own certificate expires.
func (m *Meter) Expires(t time.Time) {
	if m != nil {
		m.expires.Set(float64(t.Unix()))
	}
}
