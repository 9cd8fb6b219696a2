package front

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

var update = flag.Bool("update", false, "write docs/reference/front-metrics.md anew")

// The metrics reference is generated from the metrics themselves, after something of
// everything has happened.
func TestMetricsReferenceIsCurrent(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	f := start(t, Options{}, routeTo("a.example.com", a), Route{ServerName: "dead.example.com", Backends: []Backend{{Address: freePort(t)}}})
	for _, name := range []string{"a.example.com", "dead.example.com", "other.example.com"} {
		if conn, _, err := ca.try(f.address, name); err == nil {
			_ = conn.Close()
		}
	}
	f.record(reasonIs(NoBackend))
	f.record(reasonIs(UnknownName))
	f.record(func(r map[string]any) bool { return r["verdict"] == "relayed" })
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(f.Metrics())
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString("# Metrics of the front\n\nServed by `culvert front --http ADDRESS` at `/metrics`, beside those of the Go runtime and the\nprocess. Generated from the metrics themselves (`go test ./internal/reverse/front -update`).\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n")
	values := map[string]float64{}
	for _, f := range families {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, "`"+l.GetName()+"`")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
		for _, m := range f.Metric {
			key := f.GetName()
			for _, l := range m.Label {
				key += " " + l.GetValue()
			}
			values[key] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	for key, want := range map[string]float64{
		"culvert_front_connections a.example.com":                 0,
		"culvert_front_connections_total tls a.example.com":       1,
		"culvert_front_refused_total no-backend dead.example.com": 1,
		"culvert_front_refused_total unknown-name ":               1,
		"culvert_front_dial_failures_total dead.example.com":      1,
		"culvert_front_routes":                                    2,
		"culvert_front_table_changes_total":                       1,
	} {
		if got, found := values[key]; !found || got != want {
			t.Errorf("%s = %v (there: %v), want %v", key, got, found, want)
		}
	}
	if values["culvert_front_bytes_total in a.example.com"] < 500 || values["culvert_front_bytes_total out a.example.com"] < 500 {
		t.Errorf("bytes: %v", values)
	}
	const path = "../../../docs/reference/front-metrics.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != b.String() {
		t.Errorf("docs/reference/front-metrics.md is not current: go test ./internal/reverse/front -update (%v)", err)
	}
}

// Every routing table in the documentation is one that a front accepts, and every reason
// is documented.
func TestDocumentation(t *testing.T) {
	page, err := os.ReadFile("../../../docs/front.md")
	if err != nil {
		t.Fatal(err)
	}
	tables := regexp.MustCompile("(?s)```yaml routes\n(.*?)```").FindAllSubmatch(page, -1)
	if len(tables) == 0 {
		t.Error("no table")
	}
	for _, m := range tables {
		if _, err := ParseTable(m[1]); err != nil {
			t.Errorf("%v in\n%s", err, m[1])
		}
	}
	source, err := os.ReadFile("reason.go")
	if err != nil {
		t.Fatal(err)
	}
	more, err := os.ReadFile("preamble/preamble.go")
	if err != nil {
		t.Fatal(err)
	}
	reasons := regexp.MustCompile(`Reason = "([a-z-]+)"`).FindAllSubmatch(append(source, more...), -1)
	if len(reasons) < 20 {
		t.Errorf("found only %d reasons", len(reasons))
	}
	for _, m := range reasons {
		if !strings.Contains(string(page), "`"+string(m[1])+"`") {
			t.Errorf("docs/front.md does not tell of the reason %s", m[1])
		}
	}
}
