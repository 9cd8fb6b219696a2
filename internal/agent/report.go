package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/process"
)

// Report is the state of a running agent.
type Report struct {
	Node string
	// Ranges is how many ranges of sites and devices are led to a gateway.
	Ranges int
	// Waiting says, per object ("gateway vpn/edge"), what is not in effect and why.
	Waiting map[string]string
	// Errors are what could not be applied, by step.
	Errors   map[string]string
	Problems int
	Dropped  map[string]uint64 // packets, by reason
	// Encryption is nil without a NodeEncryption.
	Encryption *EncryptionReport
}

// essential are the steps without which an agent does not do its work.
var essential = []string{"objects", "guard", "firewall", "wireguard", "links", "routes"}

// publish keeps what was done for others to read, and logs what is new.
func (a *Agent) publish(ctx context.Context, n node, result plan.NodeResult) {
	for _, name := range slices.Sorted(maps.Keys(result.Waiting)) {
		if a.said[name] != result.Waiting[name] {
			a.log.Warn("not in effect", "object", name, "reason", result.Waiting[name])
		}
	}
	a.said = result.Waiting
	r := Report{Node: a.opts.Node, Waiting: result.Waiting, Errors: maps.Clone(a.failed), Problems: len(n.problems)}
	for _, x := range result.State.Routes {
		if x.Kind == netstate.RouteUnicast {
			r.Ranges++
		}
	}
	if o, err := a.nft.Observe(ctx); err == nil {
		r.Dropped = o.Dropped
	}
	r.Encryption = a.encryption.report(result.Encryption)
	var ready error
	for _, step := range essential {
		if msg := r.Errors[step]; msg != "" && ready == nil {
			ready = fmt.Errorf("%s: %s", step, msg)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.report, a.ready = r, ready
}

// stuckAfter is when a loop that ought to turn every ten seconds is taken for hung.
const stuckAfter = 2 * time.Minute

// listen serves health and metrics.
func (a *Agent) listen(group *process.Group) error {
	if a.opts.HTTP == "" {
		return nil
	}
	health := process.NewHealth()
	health.AddReady("applied", func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.ready
	})
	health.AddLive("loop", func() error {
		if since := time.Since(time.Unix(a.beat.Load(), 0)); since > stuckAfter {
			return errors.New("the loop has not turned for " + since.Round(time.Second).String())
		}
		return nil
	})
	registry := process.NewRegistry()
	registry.MustRegister(collector{a})
	return process.ServeTCP(group, a.opts.HTTP, process.Mux(health, registry, a.opts.PProf))
}

var (
	rangeCount   = prometheus.NewDesc("culvert_node_ranges", "Ranges of sites and devices that this node leads to a gateway.", nil, nil)
	waitingCount = prometheus.NewDesc("culvert_node_waiting", "Gateways and nodes of which something is not in effect on this node.", nil, nil)
	problemCount = prometheus.NewDesc("culvert_problems", "Objects, or parts of objects, that are not in effect.", nil, nil)
	stepFailed   = prometheus.NewDesc("culvert_apply_failed", "1 for every step of the configuration that could not be applied.", []string{"step"}, nil)
	dropCount    = prometheus.NewDesc("culvert_dropped_packets_total", "Packets that were dropped, by reason.", []string{"reason"}, nil)
)

// collector turns the last report into metrics.
type collector struct{ a *Agent }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{rangeCount, waitingCount, problemCount, stepFailed, dropCount, nodePeers, nodeConnected, nodeStrict, nodeHandshake, nodePlain} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	c.a.mu.Lock()
	r := c.a.report
	c.a.mu.Unlock()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(rangeCount, float64(r.Ranges))
	gauge(waitingCount, float64(len(r.Waiting)))
	gauge(problemCount, float64(r.Problems))
	for step := range r.Errors {
		gauge(stepFailed, 1, step)
	}
	if x := r.Encryption; x != nil {
		x.collect(ch)
	}
	for reason, n := range r.Dropped {
		ch <- prometheus.MustNewConstMetric(dropCount, prometheus.CounterValue, float64(n), reason)
	}
}
