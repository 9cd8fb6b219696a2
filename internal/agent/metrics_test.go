package agent

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var update = flag.Bool("update", false, "write docs/reference/agent-metrics.md anew")

// The metrics reference is generated from the metrics themselves.
func TestMetricsReferenceIsCurrent(t *testing.T) {
	a := &Agent{report: Report{
		Node: "n1", Ranges: 2, Waiting: map[string]string{"gateway vpn/edge": "x"}, Errors: map[string]string{"routes": "x"}, Dropped: map[string]uint64{"foreign": 3},
		Encryption: &EncryptionReport{Strict: true, Nodes: 3, Peers: 2, Connected: 1, Handshakes: map[string]time.Time{"n2": time.Unix(1000, 0)}, Plain: map[string]uint64{"pods": 4}},
	}}
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(collector{a}); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	described := make(chan *prometheus.Desc, 100)
	collector{a}.Describe(described)
	if len(families) != len(described) {
		t.Errorf("%d metrics, %d are described", len(families), len(described))
	}
	var b strings.Builder
	b.WriteString("# Metrics of the nodes' agents\n\nServed by `culvert agent --http ADDRESS` at `/metrics`, beside those of the Go runtime and the\nprocess. Generated from the metrics themselves (`go test ./internal/agent -update`).\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, f := range families {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, "`"+l.GetName()+"`")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
	}
	b.WriteString("\nThose of peers, handshakes, strictness and plain packets are there only with a NodeEncryption.\n")
	const path = "../../docs/reference/agent-metrics.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != b.String() {
		t.Errorf("docs/reference/agent-metrics.md is not current: go test ./internal/agent -update (%v)", err)
	}
}
