package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// elsewhere is a test of another package that measures, and says what in the form of a Go
// benchmark (labtest.Report).
type elsewhere struct {
	name, program, dir, run string
	env                     []string
	metrics                 []metric
}

// operator is the operator as a process, at a real etcd and kube-apiserver.
func operator(brief bool) *suite {
	s := &suite{
		name: "operator", title: "Scale: the operator, at a real API server without nodes", against: "1000 Devices",
		metrics: []metric{{name: "made", unit: "s", less: true}, {name: "all done", unit: "s", less: true}, {name: "one more", unit: "ms", less: true}, {name: "started anew", unit: "s", less: true}, {name: "memory", unit: "MB", less: true}},
		once:    true,
	}
	if brief { // test/cluster/operator is a layer of its own
		return s
	}
	for _, n := range []string{"1000", "5000"} {
		s.contenders = append(s.contenders, s.elsewhere(n+" Devices", "test/cluster/operator", "TestFigures", "CULVERT_DEVICES="+n))
	}
	return s
}

// agents is what an agent does among 250 nodes: plan, and all that it applies on a node.
func agents(brief bool) *suite {
	s := &suite{
		name: "agents", title: "Scale: a node's agent", against: "250 nodes",
		metrics: []metric{{name: "all nodes at once", unit: "ms", less: true}, {name: "one more node", unit: "ms", less: true}},
	}
	if !brief { // test/encryption runs it by itself
		s.contenders = append(s.contenders, s.elsewhere("250 nodes", "test/encryption", "TestOneMoreNode"))
	}
	return s
}

// streams is one stream through hub and spoke alone, beside a direct TLS connection between the same ends, all in one
// process: what the tunnel itself costs.
func streams(brief bool) *suite {
	s := &suite{
		name: "streams", title: "Reversed tunnel: one stream through hub and spoke alone, of a direct TLS 1.3 connection between the same ends", against: "Culvert",
		metrics: []metric{
			{name: "hub, down", unit: "×"}, {name: "hub, up", unit: "×"}, {name: "egress, down", unit: "×"}, {name: "egress, up", unit: "×"}, {name: "slowest", unit: "×"},
			{name: "hub, down: CPU", unit: "×", less: true}, {name: "hub, up: CPU", unit: "×", less: true}, {name: "egress, down: CPU", unit: "×", less: true}, {name: "egress, up: CPU", unit: "×", less: true}, {name: "most CPU", unit: "×", less: true},
		},
	}
	if !brief { // test/reverse runs it by itself
		s.contenders = append(s.contenders, s.elsewhere("Culvert", "test/reverse", "TestStreamSpeed"))
	}
	return s
}

func (s *suite) elsewhere(name, dir, run string, env ...string) contender {
	return contender{name: name, ours: true, start: func(t *testing.T, _ *labtest.Lab) candidate {
		e := &elsewhere{name: name, program: filepath.Join(t.TempDir(), "test"), dir: filepath.Join("../..", dir), run: "^" + run + "$", env: env, metrics: s.metrics}
		if out, err := exec.Command("go", "test", "-c", "-o", e.program, "./"+e.dir).CombinedOutput(); err != nil {
			t.Fatalf("build the test of %s: %v: %s", dir, err, out)
		}
		return e
	}}
}

func (e *elsewhere) measure(t *testing.T) figures {
	t.Helper()
	cmd := exec.Command(e.program, "-test.run", e.run, "-test.v", "-test.timeout=20m")
	cmd.Dir, cmd.Env = e.dir, append(os.Environ(), e.env...)
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v:\n%s", e.name, err, text)
	}
	out := figures{}
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "Benchmark") {
			continue
		}
		fields := strings.Fields(line)
		for i := 2; i+1 < len(fields); i += 2 {
			v, err := strconv.ParseFloat(fields[i], 64)
			for _, m := range e.metrics {
				if err == nil && labtest.Word(m.unitName()) == fields[i+1] {
					out[m.name] = v
				}
			}
		}
	}
	if len(out) != len(e.metrics) {
		t.Fatalf("%s measured only %v:\n%s", e.name, out, text)
	}
	return out
}
