package bench

import (
	"fmt"
	"math"
	"strings"
)

// goal is a target that the project has set itself, and where a figure of a run shows it.
type goal struct {
	what string // in the words of the target
	// suite, candidate and metric are the figure; per is the candidate that it is divided by,
	// empty: none.
	suite, candidate, metric, per string
	bound                         float64
	atLeast                       bool   // else at most
	unit                          string // of the bound: "×" for ratios
}

// goals are the targets that a run of all suites can show. docs/performance.md names the tests
// of the others.
var goals = []goal{
	{"one TCP stream, of upstream's wireguard-go", "tunnels", "Culvert, WireGuard", "TCP", "wireguard-go (upstream)", 0.95, true, "×"},
	{"one TCP stream, of the library's own program", "tunnels", "Culvert, WireGuard", "TCP", "wireguard-go (Tailscale's)", 0.95, true, "×"},
	{"round trip, of the library's own program", "tunnels", "Culvert, WireGuard", "RTT", "wireguard-go (Tailscale's)", 1.1, false, "×"},
	{"1,000 devices: ready after the start", "scale", "1000 devices", "start", "", 0.3, false, "s"},
	{"10,000 devices: ready after the start", "scale", "10000 devices", "start", "", 3, false, "s"},
	{"one device added to 1,000", "scale", "1000 devices", "one more device", "", 100, false, "ms"},
	{"one device added to 10,000", "scale", "10000 devices", "one more device", "", 100, false, "ms"},
	{"memory with 1,000 silent devices", "scale", "1000 devices", "memory", "", 80 * 1.048576, false, "MB"},
	{"memory with 10,000 silent devices", "scale", "10000 devices", "memory", "", 350 * 1.048576, false, "MB"},
	{"1,000 devices speak at once after a restart: 99 % have traffic", "scale", "1000 devices", "all speak after a restart", "", 10, false, "s"},
	{"first byte with 10,000 services, of that with 10", "services", "Translate, 10,000 services", "first byte", "Translate, 10 services", 1.1, false, "×"},
	{"one endpoint of 10,000 services changes", "services", "Translate, 10,000 services", "an endpoint changes", "", 50, false, "ms"},
	{"transparent proxy: one stream, of HAProxy's", "relay", "Culvert", "one stream", "HAProxy, splice on", 1, true, "×"},
	{"gateway killed: first packet", "failover", "gateway, WireGuard", "worst", "", 5000, false, "ms"},
	{"strongSwan killed: first packet", "failover", "strongSwan under a gateway", "worst", "", 10000, false, "ms"},
	{"reversed tunnel: 100 connections at once, p99", "reverse", "Culvert", "100 at once, p99", "", 50, false, "ms"},
	{"one stream through hub and spoke, of direct TLS between the same ends: the slowest way", "streams", "Culvert", "slowest", "", 0.4, true, "×"},
	{"the same: processor time per GB, the dearest way", "streams", "Culvert", "most CPU", "", 2.5, false, "×"},
	{"front, hub and spoke as processes: one stream of a client that speaks TLS to the hub, of direct TLS", "reverse", "Culvert, by the hub's own listener", "one stream", "direct TLS 1.3", 0.4, true, "×"},
	{"front, hub, spoke and egress as processes: one stream, of direct TLS", "reverse", "Culvert", "one stream", "direct TLS 1.3", 0.4, true, "×"},
	{"1,000 Devices made at once: all done", "operator", "1000 Devices", "all done", "", 60, false, "s"},
	{"the operator's memory with 1,000 Devices", "operator", "1000 Devices", "memory", "", 150 * 1.048576, false, "MB"},
	{"one of 250 nodes joins: an agent's work", "agents", "250 nodes", "one more node", "", 100, false, "ms"},
}

// figure is what a run has for a goal; NaN: it did not measure it.
func (g goal) figure(results []*result) float64 {
	for _, r := range results {
		if r.Suite != g.suite {
			continue
		}
		for _, m := range r.metrics {
			if m.name != g.metric {
				continue
			}
			if g.per != "" {
				return r.ratio(g.candidate, g.per, m)
			}
			return r.value(g.candidate, m)
		}
	}
	return math.NaN()
}

// reached tells whether a figure is what was aimed at.
func (g goal) reached(v float64) bool { return g.atLeast && v >= g.bound || !g.atLeast && v <= g.bound }

// judgement is a goal with what became of it, in bench.json.
type judgement struct {
	Goal    string   `json:"goal"`
	Suite   string   `json:"suite"`
	Bound   float64  `json:"bound"`
	AtLeast bool     `json:"atLeast,omitempty"`
	Unit    string   `json:"unit"`
	Figure  *float64 `json:"figure"` // null: not measured in this run
	Reached bool     `json:"reached"`
}

func judge(results []*result) []judgement {
	var out []judgement
	for _, g := range goals {
		j := judgement{Goal: g.what, Suite: g.suite, Bound: g.bound, AtLeast: g.atLeast, Unit: g.unit}
		if v := g.figure(results); !math.IsNaN(v) {
			j.Figure, j.Reached = &v, g.reached(v)
		}
		out = append(out, j)
	}
	return out
}

// goalTable is the goals that a run has figures for, in Markdown.
func goalTable(judgements []judgement) string {
	var b strings.Builder
	b.WriteString("### Goals\n\n| goal | bound | this run | |\n|---|---|---|---|\n")
	for _, j := range judgements {
		if j.Figure == nil {
			continue
		}
		sign, outcome := "≤", "**no**"
		if j.AtLeast {
			sign = "≥"
		}
		if j.Reached {
			outcome = "reached"
		}
		unit := " " + j.Unit
		if j.Unit == "×" {
			unit = "×"
		}
		fmt.Fprintf(&b, "| %s | %s %s%s | %s%s | %s |\n", j.Goal, sign, number(j.Bound), unit, number(*j.Figure), unit, outcome)
	}
	return b.String()
}
