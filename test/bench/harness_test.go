// Package bench measures Culvert side by side with what people would use in its place: on
// one topology, in one run, taking turns in random order, with medians and ratios. Figures move by 30 % and
// more from run to run: compare candidates of one run, and ratios only.
//
// "make bench" runs all of it (TestBench); TestSmoke, a part of "make test", checks that
// every candidate which hack/setup.sh installs runs and moves bytes.
package bench

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// Metric is what is measured of all candidates of a suite.
type metric struct {
	name, unit string
	// less: smaller is better.
	less bool
	// of is the figure that it is made of; empty: that of its name.
	of string
	// show makes one value of all samples; nil: the median.
	show func([]float64) float64
}

// figure is the name of the figure that a metric is made of.
func (m metric) figure() string {
	if m.of != "" {
		return m.of
	}
	return m.name
}

// unitName is name and unit as one, for benchstat.
func (m metric) unitName() string { return strings.TrimSuffix(m.figure()+"-"+m.unit, "-") }

// figures are what one candidate gave in one round, by the metric's name.
type figures map[string]float64

// candidate is one way to do what a suite is about. It is up when it is made.
type candidate interface {
	// measure measures once, and fails unless bytes took the way that is measured.
	measure(t *testing.T) figures
}

// glancing is a candidate of which some figures take milliseconds. They are measured in many
// short turns of all candidates, in random order: whatever else the machine does meanwhile
// then hits all of them alike.
type glancing interface {
	candidate
	glance(t *testing.T) figures
}

// contender makes a candidate; absent says why it cannot take part on this machine.
type contender struct {
	name   string
	ours   bool
	absent func() string
	start  func(t *testing.T, l *labtest.Lab) candidate
}

// suite is a table of candidates and metrics. Against is the row that others are divided by.
type suite struct {
	name, title, against string
	metrics              []metric
	contenders           []contender
	turns                int  // measurements in a round; 0: one
	glances              int  // short turns in a round, of candidates that are glancing
	once                 bool // in one round only: it takes minutes
}

// result is one suite's outcome.
type result struct {
	Suite   string                          `json:"suite"`
	Title   string                          `json:"title"`
	Against string                          `json:"against"`
	Rounds  int                             `json:"rounds"`
	Absent  map[string]string               `json:"absent,omitempty"`
	Order   []string                        `json:"order"`
	Samples map[string]map[string][]float64 `json:"samples"` // candidate, metric
	metrics []metric
}

// result of a suite that has not been run.
func (s *suite) result(rounds int) *result {
	if s.once {
		rounds = 1
	}
	return &result{Suite: s.name, Title: s.title, Against: s.against, Rounds: rounds, Absent: map[string]string{}, Samples: map[string]map[string][]float64{}, metrics: s.metrics}
}

// run starts all candidates and lets them take turns. What was measured before one of them
// fails the test is in the result.
func (s *suite) run(t *testing.T, r *result) {
	t.Helper()
	running := map[string]candidate{}
	lab := labtest.New(t) // one for all: it is known by the test's name
	lab.Congestion = congestion
	for _, c := range s.contenders {
		if c.absent != nil {
			if why := c.absent(); why != "" {
				r.Absent[c.name] = why
				t.Logf("%s: %s takes no part: %s", s.name, c.name, why)
				continue
			}
		}
		begin := time.Now()
		running[c.name] = c.start(t, lab)
		r.Order = append(r.Order, c.name)
		r.Samples[c.name] = map[string][]float64{}
		t.Logf("%s: %s is up after %s", s.name, c.name, time.Since(begin).Round(time.Millisecond))
	}
	for i := range r.Rounds {
		for range s.glances {
			for _, name := range shuffled(r.Order) {
				if g, ok := running[name].(glancing); ok {
					r.add(name, g.glance(t))
				}
			}
		}
		for range max(1, s.turns) {
			for _, name := range shuffled(r.Order) {
				got := running[name].measure(t)
				r.add(name, got)
				t.Logf("%s: round %d: %s: %s", s.name, i+1, name, s.line(got))
			}
		}
	}
}

// shuffled are the names in random order: who is first, or behind whom, is no advantage.
func shuffled(names []string) []string {
	names = slices.Clone(names)
	rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names
}

func (r *result) add(candidate string, f figures) {
	for m, v := range f {
		r.Samples[candidate][m] = append(r.Samples[candidate][m], v)
	}
}

func (s *suite) line(f figures) string {
	var parts []string
	for _, m := range s.metrics {
		if v, ok := f[m.figure()]; ok && m.show == nil {
			parts = append(parts, fmt.Sprintf("%s %s %s", m.figure(), number(v), m.unit))
		}
	}
	return strings.Join(parts, ", ")
}

// median is the middle one, or the mean of the two in the middle; NaN of nothing.
func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Clone(v)
	slices.Sort(v)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// number has three digits that say something.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// value is what a candidate has for a metric; NaN: nothing was measured.
func (r *result) value(candidate string, m metric) float64 {
	samples := r.Samples[candidate][m.figure()]
	if len(samples) == 0 || m.show == nil {
		return median(samples)
	}
	return m.show(samples)
}

// ratio is what a candidate has of what another has: the median of the ratios within a turn, in
// which the machine was the same for both. A metric that is made of all samples has one ratio.
// NaN: one of the two was not measured.
func (r *result) ratio(candidate, per string, m metric) float64 {
	a, b := r.Samples[candidate][m.figure()], r.Samples[per][m.figure()]
	if m.show != nil || len(a) != len(b) {
		return r.value(candidate, m) / r.value(per, m)
	}
	var within []float64
	for i := range a {
		within = append(within, a[i]/b[i])
	}
	return median(within)
}

// table is the result in Markdown: medians, and in parentheses the ratios to the row that the
// others are compared with.
func (r *result) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "### %s\n\n", r.Title)
	b.WriteString("| |")
	for _, m := range r.metrics {
		if m.unit == "" {
			fmt.Fprintf(&b, " %s |", m.name)
			continue
		}
		fmt.Fprintf(&b, " %s (%s) |", m.name, m.unit)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(r.metrics)) + "\n")
	for _, name := range r.Order {
		fmt.Fprintf(&b, "| %s |", name)
		for _, m := range r.metrics {
			v, ratio := r.value(name, m), r.ratio(name, r.Against, m)
			if math.IsNaN(ratio) || math.IsInf(ratio, 0) || name == r.Against || m.unit == "" {
				fmt.Fprintf(&b, " %s |", number(v))
				continue
			}
			fmt.Fprintf(&b, " %s (%.2f×) |", number(v), ratio)
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "\nMedians, %d rounds; in parentheses the ratio to %s, the median of those within a turn.", r.Rounds, r.Against)
	for _, name := range slices.Sorted(keys(r.Absent)) {
		fmt.Fprintf(&b, " Not taking part: %s (%s).", name, r.Absent[name])
	}
	b.WriteString("\n")
	return b.String()
}

func keys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}
