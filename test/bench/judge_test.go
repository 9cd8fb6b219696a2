package bench

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// Every goal names a figure that a full run has, and no two suites or rows share a name.
func TestGoalsAreMeasured(t *testing.T) {
	rows, columns := map[string]bool{}, map[string]bool{}
	for _, s := range suites(false) {
		for _, c := range s.contenders {
			if rows[s.name+"/"+c.name] {
				t.Errorf("%s has two rows %q", s.name, c.name)
			}
			rows[s.name+"/"+c.name] = true
		}
		for _, m := range s.metrics {
			columns[s.name+"/"+m.name] = true
		}
		if !rows[s.name+"/"+s.against] {
			t.Errorf("%s compares with %q, which it has not", s.name, s.against)
		}
	}
	for _, g := range goals {
		if !rows[g.suite+"/"+g.candidate] || !columns[g.suite+"/"+g.metric] || g.per != "" && !rows[g.suite+"/"+g.per] {
			t.Errorf("%q: no %s of %s (%s) in suite %s", g.what, g.metric, g.candidate, g.per, g.suite)
		}
	}
}

func TestJudge(t *testing.T) {
	s := scale(false)
	r := s.result(3)
	r.Order = []string{"1000 devices"}
	r.Samples["1000 devices"] = map[string][]float64{"start": {0.2, 0.9, 0.25}, "one more device": {150, 90, 120}}
	got := goalTable(judge([]*result{r}))
	for _, want := range []string{"| ≤ 0.30 s | 0.25 s | reached |", "| ≤ 100 ms | 120 ms | **no** |"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if n := strings.Count(got, "\n"); n != 6 {
		t.Errorf("%d lines, but two goals were measured:\n%s", n, got)
	}
}

// A machine that is slow during a turn is slow for both; ratios of medians of all turns would say
// here that the two are alike.
func TestRatiosWithinTurns(t *testing.T) {
	s := relays(false)
	r := s.result(1)
	r.Order = []string{"Culvert", "HAProxy"}
	r.Samples["Culvert"] = map[string][]float64{"one stream": {10, 20, 40}}
	r.Samples["HAProxy"] = map[string][]float64{"one stream": {8, 20, 32}}
	if v := r.ratio("HAProxy", "Culvert", s.metrics[0]); v != 0.8 {
		t.Errorf("%v, want 0.8", v)
	}
	if !strings.Contains(r.table(), "| HAProxy | 20.0 (0.80×) |") {
		t.Errorf("another ratio in\n%s", r.table())
	}
	if v := r.ratio("HAProxy", "Culvert", s.metrics[1]); !math.IsNaN(v) {
		t.Errorf("%v of nothing", v)
	}
}

// What benchstat reads: a line for each sample, and which way is better where more is.
func TestBenchmarks(t *testing.T) {
	s := failover(false)
	r := s.result(1)
	r.Order = []string{"the only hub"}
	r.Samples["the only hub"] = map[string][]float64{"back": {10, 30, 20}}
	want := "BenchmarkFailover/the_only_hub\t1\t10 back-ms\nBenchmarkFailover/the_only_hub\t1\t30 back-ms\nBenchmarkFailover/the_only_hub\t1\t20 back-ms\n"
	if got := benchmarks([]*result{r}); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	var row string
	for line := range strings.Lines(r.table()) {
		if strings.HasPrefix(line, "| the only hub") {
			row = line
		}
	}
	if row != "| the only hub | 20.0 | 30.0 | 3.00 |\n" {
		t.Errorf("median, worst, count: %q", row)
	}
	if !slices.Contains(strings.Split(benchmarks([]*result{tunnels(false).result(1)}), "\n"), "Unit TCP-Gbit/s better=higher") {
		t.Error("benchstat takes less for better")
	}
	if got := labtest.Line("a b, c", labtest.Figure{Value: 1.5, Unit: "x y-s"}); got != "BenchmarkA_b_c\t1\t1.5 x_y-s\n" {
		t.Errorf("%q", got)
	}
}
