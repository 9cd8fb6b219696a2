package gateway

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-vpn/culvert/internal/probe"
)

// Metrics of a gateway. The wireguard_* names and their labels are those of the widely
// used prometheus_wireguard_exporter, so that its dashboards work.
var (
	wgLabels   = []string{"interface", "public_key", "allowed_ips", "friendly_name"}
	peerLabels = []string{"kind", "name", "type"}
	pathLabels = []string{"name", "interface"}

	wgSent      = prometheus.NewDesc("wireguard_sent_bytes_total", "Bytes sent to the peer.", wgLabels, nil)
	wgReceived  = prometheus.NewDesc("wireguard_received_bytes_total", "Bytes received from the peer.", wgLabels, nil)
	wgHandshake = prometheus.NewDesc("wireguard_latest_handshake_seconds", "Unix time of the last handshake; 0: never.", wgLabels, nil)

	peerUp       = prometheus.NewDesc("culvert_peer_up", "1 when the site or device is connected, else 0.", peerLabels, nil)
	peerSent     = prometheus.NewDesc("culvert_peer_sent_bytes_total", "Bytes sent to the site or device.", peerLabels, nil)
	peerReceived = prometheus.NewDesc("culvert_peer_received_bytes_total", "Bytes received from the site or device.", peerLabels, nil)
	peerSince    = prometheus.NewDesc("culvert_peer_established_seconds", "Unix time of the last handshake or of the SA; 0: never.", peerLabels, nil)

	pathUp     = prometheus.NewDesc("culvert_path_up", "1 when probes through the tunnel are answered, else 0.", pathLabels, nil)
	pathActive = prometheus.NewDesc("culvert_path_active", "1 when what is opened towards the site goes through the tunnel, else 0.", pathLabels, nil)
	pathRTT    = prometheus.NewDesc("culvert_path_rtt_seconds", "Round trip of the last probe that was answered; 0: none yet.", pathLabels, nil)
	pathLost   = prometheus.NewDesc("culvert_path_lost_probes_total", "Probes through the tunnel that were not answered (yet).", pathLabels, nil)

	works        = prometheus.NewDesc("culvert_gateway_active", "1 when this pod works, 0 when it stands by for another one.", nil, nil)
	problemCount = prometheus.NewDesc("culvert_problems", "Objects, or parts of objects, that are not in effect.", nil, nil)
	stepFailed   = prometheus.NewDesc("culvert_apply_failed", "1 for every step of the configuration that could not be applied.", []string{"step"}, nil)
	dropCount    = prometheus.NewDesc("culvert_dropped_packets_total", "Packets that the gateway dropped, by reason.", []string{"reason"}, nil)
	portCount    = prometheus.NewDesc("culvert_service_ports", "Service ports that tunnels can reach.", []string{"mode"}, nil)
)

// collector turns the last report into metrics.
type collector struct{ g *Gateway }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{works, wgSent, wgReceived, wgHandshake, peerUp, peerSent, peerReceived, peerSince, pathUp, pathActive, pathRTT, pathLost, problemCount, stepFailed, dropCount, portCount} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	r := c.g.Report()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, p := range r.Sites {
		collectPeer(ch, "site", p)
	}
	for _, p := range r.Devices {
		collectPeer(ch, "device", p)
	}
	active := 0.0
	if r.Active {
		active = 1
	}
	gauge(works, active)
	gauge(problemCount, float64(len(r.Problems)))
	for step := range r.Errors {
		gauge(stepFailed, 1, step)
	}
	for reason, n := range r.Dropped {
		ch <- prometheus.MustNewConstMetric(dropCount, prometheus.CounterValue, float64(n), reason)
	}
	if r.Services.Mode != "" {
		gauge(portCount, float64(r.Services.Ports), r.Services.Mode)
	}
}

// is makes a number of a fact.
func is(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func collectPeer(ch chan<- prometheus.Metric, kind string, p PeerReport) {
	labels := []string{kind, p.Name, p.Type}
	since, up := 0.0, is(p.Connected)
	if !p.Since.IsZero() {
		since = float64(p.Since.Unix())
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	ch <- prometheus.MustNewConstMetric(peerUp, prometheus.GaugeValue, up, labels...)
	ch <- prometheus.MustNewConstMetric(peerSince, prometheus.GaugeValue, since, labels...)
	for _, x := range p.Paths {
		gauge := func(d *prometheus.Desc, v float64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, p.Name, x.Link)
		}
		gauge(pathUp, is(x.Health == probe.Up.String()))
		gauge(pathActive, is(x.Active))
		gauge(pathRTT, x.RTT.Seconds())
		counter(pathLost, x.Lost, p.Name, x.Link)
	}
	counter(peerSent, p.SentBytes, labels...)
	counter(peerReceived, p.ReceivedBytes, labels...)
	if p.Type != "wireguard" || p.Link == "" {
		return
	}
	ips := make([]string, len(p.Addresses))
	for i, a := range p.Addresses {
		ips[i] = a.String()
	}
	wg := []string{p.Link, p.Key, strings.Join(ips, ","), kind + " " + p.Name}
	counter(wgSent, p.SentBytes, wg...)
	counter(wgReceived, p.ReceivedBytes, wg...)
	ch <- prometheus.MustNewConstMetric(wgHandshake, prometheus.GaugeValue, since, wg...)
}
