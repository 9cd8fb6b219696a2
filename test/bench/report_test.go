package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// machine is where a run took place.
type machine struct {
	Processors int    `json:"processors"`
	Model      string `json:"model"`
	Memory     string `json:"memory"`
	Kernel     string `json:"kernel"`
	Congestion string `json:"congestion"` // control of TCP, in the namespaces
	Go         string `json:"go"`
	// Load is the average of the last minute before the run, and after it.
	Load     [2]string         `json:"load"`
	Versions map[string]string `json:"versions"`
	Begun    time.Time         `json:"begun"`
	Took     string            `json:"took"`
}

func thisMachine() machine {
	m := machine{Processors: runtime.NumCPU(), Go: runtime.Version(), Versions: versions(), Begun: time.Now().UTC().Truncate(time.Second)}
	m.Model = fieldOf("/proc/cpuinfo", "model name")
	m.Memory = fieldOf("/proc/meminfo", "MemTotal")
	b, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	m.Kernel = strings.TrimSpace(string(b))
	m.Load[0] = load()
	return m
}

func load() string {
	b, _ := os.ReadFile("/proc/loadavg")
	one, _, _ := strings.Cut(string(b), " ")
	return one
}

func fieldOf(file, name string) string {
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

func (m machine) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d × %s, %s, Linux %s, TCP with %s, %s; load average before %s, after %s; took %s.\n\n", m.Processors, m.Model, m.Memory, m.Kernel, m.Congestion, m.Go, m.Load[0], m.Load[1], m.Took)
	for _, k := range slices.Sorted(keys(m.Versions)) {
		fmt.Fprintf(&b, "- %s: %s\n", k, m.Versions[k])
	}
	return b.String()
}

// congestion is the TCP congestion control of all hosts: what Linux has by itself, or else what can be set in
// any namespace and is as cheap. A machine's own may be BBR, which takes a timer for each burst of each
// connection, and so the more of the processors the more connections follow on each other.
var congestion = []string{"cubic", "reno"}

// congestionOf says which one that is here.
func congestionOf(t *testing.T) string {
	t.Helper()
	lab := labtest.New(t)
	lab.Congestion = congestion
	return lab.Host("tcp").Congestion()
}

// report writes bench.json, bench.txt and table.md, and prints the latter.
func report(t *testing.T, m machine, results []*result) {
	t.Helper()
	m.Load[1], m.Took = load(), time.Since(m.Begun).Round(time.Second).String()
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", m)
	judgements := judge(results)
	b.WriteString(goalTable(judgements) + "\n")
	for _, r := range results {
		b.WriteString(r.table() + "\n")
	}
	dir := os.Getenv("BENCH_DIR")
	if dir == "" {
		dir = filepath.Join("..", "..", ".cache", "bench")
	}
	data, err := json.MarshalIndent(map[string]any{"machine": m, "goals": judgements, "results": results}, "", "  ")
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "bench.json"), append(data, '\n'), 0o644)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "bench.txt"), []byte(benchmarks(results)), 0o644)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "table.md"), []byte(b.String()), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\n%s", b.String())
}

// benchmarks is every sample as a Go benchmark's line, for benchstat.
func benchmarks(results []*result) string {
	var b strings.Builder
	for _, r := range results {
		for _, m := range r.metrics {
			if !m.less && m.show == nil {
				fmt.Fprintf(&b, "Unit %s better=higher\n", labtest.Word(m.unitName()))
			}
		}
	}
	for _, r := range results {
		for _, name := range r.Order {
			for _, m := range r.metrics {
				if m.show != nil {
					continue // another view of samples that are there
				}
				for _, v := range r.Samples[name][m.figure()] {
					b.WriteString(labtest.Line(r.Suite+"/"+name, labtest.Figure{Value: v, Unit: m.unitName()}))
				}
			}
		}
	}
	return b.String()
}
