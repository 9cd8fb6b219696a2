package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-vpn/culvert/internal/plan"
)

// EncryptionReport is what is known of the encryption between nodes.
type EncryptionReport struct {
	Strict     bool
	Nodes      int                  // other nodes
	Peers      int                  // those of them that have a key
	Connected  int                  // those that have answered lately
	Handshakes map[string]time.Time // by node; zero: never
	Plain      map[string]uint64    // packets in the clear, dropped or, unless Strict, seen; by kind
}

func (e *encryption) report(r *plan.EncryptionResult) *EncryptionReport {
	if r == nil {
		return nil
	}
	silent, last := e.silent(r)
	delete(last, "") // a key that is not in use
	return &EncryptionReport{
		Strict: r.Strict, Nodes: r.Nodes, Peers: len(r.Peers), Connected: len(r.Peers) - len(silent),
		Handshakes: last, Plain: e.counted(),
	}
}

func (e *encryption) counted() map[string]uint64 {
	if !e.plain.Present {
		return nil
	}
	return e.plain.Dropped
}

var (
	nodePeers     = prometheus.NewDesc("culvert_node_peers", "Other nodes of the cluster, by whether they have a key.", []string{"key"}, nil)
	nodeConnected = prometheus.NewDesc("culvert_node_connected_peers", "Other nodes that have answered within three minutes.", nil, nil)
	nodeStrict    = prometheus.NewDesc("culvert_node_encryption_strict", "1 when plain packets between nodes are dropped, 0 when they are counted only.", nil, nil)
	nodeHandshake = prometheus.NewDesc("culvert_node_handshake_age_seconds", "Time since the last handshake with a node; absent before the first.", []string{"node"}, nil)
	nodePlain     = prometheus.NewDesc("culvert_node_plain_packets_total", "Packets in the clear between nodes that were dropped, or in mode Permissive seen, by kind.", []string{"kind"}, nil)
)

func (r *EncryptionReport) collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(nodePeers, float64(r.Peers), "yes")
	gauge(nodePeers, float64(r.Nodes-r.Peers), "no")
	gauge(nodeConnected, float64(r.Connected))
	strict := 0.0
	if r.Strict {
		strict = 1
	}
	gauge(nodeStrict, strict)
	for node, at := range r.Handshakes {
		if !at.IsZero() {
			gauge(nodeHandshake, time.Since(at).Seconds(), node)
		}
	}
	for kind, n := range r.Plain {
		ch <- prometheus.MustNewConstMetric(nodePlain, prometheus.CounterValue, float64(n), kind)
	}
}
