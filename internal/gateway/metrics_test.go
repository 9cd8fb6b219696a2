package gateway

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

var update = flag.Bool("update", false, "write docs/reference/metrics.md anew")

// full is a report in which everything is set, so that every metric comes out.
func full() *Gateway {
	return &Gateway{report: Report{
		Gateway: "default/edge", Active: true,
		Errors:  map[string]string{"ipsec": "x"},
		Dropped: map[string]uint64{"spoofed": 3},
		Sites: []PeerReport{{Name: "default/berlin", Type: "ipsec", Connected: true, Since: time.Unix(1000, 0), ReceivedBytes: 5, SentBytes: 6,
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")},
			Paths:     []PathReport{{Link: "cvtwg0", Health: "down", Lost: 9}, {Link: "cvtwg1", Health: "up", Active: true, RTT: 2 * time.Second}}}},
		Devices: []PeerReport{{Name: "default/phone", Type: "wireguard", Link: "cvtwg0", Key: "key", ReceivedBytes: 7, SentBytes: 8,
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.99.0.2/32"), netip.MustParsePrefix("fd00:99::2/128")}}},
		Problems: []ProblemReport{{}},
		Services: ServicesReport{Mode: "Translate", Ports: 4},
	}}
}

func gathered(t *testing.T) []*dto.MetricFamily {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(collector{full()}); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

func TestMetricValues(t *testing.T) {
	got := map[string]float64{}
	for _, f := range gathered(t) {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			got[f.GetName()+"{"+strings.Join(labels, ",")+"}"] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	wg := "{allowed_ips=10.99.0.2/32,fd00:99::2/128,friendly_name=device default/phone,interface=cvtwg0,public_key=key}"
	for name, want := range map[string]float64{
		"wireguard_sent_bytes_total" + wg:                                              8,
		"wireguard_received_bytes_total" + wg:                                          7,
		"wireguard_latest_handshake_seconds" + wg:                                      0,
		"culvert_peer_up{kind=site,name=default/berlin,type=ipsec}":                    1,
		"culvert_peer_up{kind=device,name=default/phone,type=wireguard}":               0,
		"culvert_peer_established_seconds{kind=site,name=default/berlin,type=ipsec}":   1000,
		"culvert_peer_received_bytes_total{kind=site,name=default/berlin,type=ipsec}":  5,
		"culvert_peer_sent_bytes_total{kind=device,name=default/phone,type=wireguard}": 8,
		"culvert_dropped_packets_total{reason=spoofed}":                                3,
		"culvert_path_up{interface=cvtwg0,name=default/berlin}":                        0,
		"culvert_path_up{interface=cvtwg1,name=default/berlin}":                        1,
		"culvert_path_active{interface=cvtwg0,name=default/berlin}":                    0,
		"culvert_path_active{interface=cvtwg1,name=default/berlin}":                    1,
		"culvert_path_rtt_seconds{interface=cvtwg1,name=default/berlin}":               2,
		"culvert_path_lost_probes_total{interface=cvtwg0,name=default/berlin}":         9,
		"culvert_problems{}":                    1,
		"culvert_gateway_active{}":              1,
		"culvert_apply_failed{step=ipsec}":      1,
		"culvert_service_ports{mode=Translate}": 4,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s = %v (there: %v), want %v", name, v, ok, want)
		}
	}
}

// The metrics reference is generated from the metrics themselves.
func TestMetricsReferenceIsCurrent(t *testing.T) {
	var b strings.Builder
	b.WriteString("# Metrics\n\nServed by `culvert gateway --http ADDRESS` at `/metrics`, beside those of the Go runtime and the\nprocess. Generated from the metrics themselves (`go test ./internal/gateway -update`).\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, f := range gathered(t) {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, "`"+l.GetName()+"`")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
	}
	b.WriteString("\nHandshakes are Unix times: `time() - wireguard_latest_handshake_seconds > 180` finds peers without a\nfresh session.\n")
	const path = "../../docs/reference/metrics.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != b.String() {
		t.Errorf("docs/reference/metrics.md is not current: go test ./internal/gateway -update (%v)", err)
	}
}
