package gateway

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/probe"
)

// How paths are probed: one that breaks is down after 1.2 to 1.5 s, and up again after six
// answers in a row.
const (
	probeEvery  = 300 * time.Millisecond
	probeLosses = 4
)

// settleTime is how long a preferred path must have been up until it is used again, so
// that one that comes and goes is left alone.
const settleTime = 10 * time.Second

// paths finds out which paths carry packets, and chooses among them. It belongs to the
// loop.
type paths struct {
	prober  *probe.Prober // nil: nobody has asked for probes
	changed chan struct{} // a path went up or down
	active  map[model.ID]int
	running sync.WaitGroup
}

// set probes the paths of the gateway's sites, and no others, until ctx ends; a gateway that
// stands by has none.
func (p *paths) set(ctx context.Context, gw *model.Gateway, active bool) error {
	var want []probe.Target
	if gw != nil && active {
		for _, s := range gw.Sites {
			if s.WireGuard == nil || s.WireGuard.Probe.IsZero() {
				continue
			}
			for i, path := range s.WireGuard.Paths() {
				t := probe.Target{Name: plan.ProbeName(s.ID, i), Address: path.Probe.Address, Link: plan.PathLink(i)}
				if t.Address.Is4() {
					t.Source = path.Probe.Local
				}
				want = append(want, t)
			}
		}
	}
	if p.prober == nil {
		if len(want) == 0 {
			return nil
		}
		prober, err := probe.New(probe.Options{Interval: probeEvery, Losses: probeLosses, Changed: func(probe.Status) {
			select {
			case p.changed <- struct{}{}:
			default:
			}
		}})
		if err != nil {
			return err
		}
		p.prober = prober
		p.running.Go(func() { _ = prober.Run(ctx) })
	}
	_, err := p.prober.Set(ctx, want)
	return err
}

// statuses are what is known of all paths, by plan.ProbeName.
func (p *paths) statuses() map[string]probe.Status {
	out := map[string]probe.Status{}
	if p.prober != nil {
		for _, s := range p.prober.Observe() {
			out[s.Target.Name] = s
		}
	}
	return out
}

// choose says which path each site with several uses, and when that may change by itself;
// zero: never.
func (p *paths) choose(gw *model.Gateway, now time.Time) (facts map[model.ID]plan.PathFacts, again time.Time) {
	facts = map[model.ID]plan.PathFacts{}
	known := p.statuses()
	for _, s := range gw.Sites {
		if s.WireGuard == nil || len(s.WireGuard.Alternatives) == 0 {
			continue
		}
		list := make([]probe.Status, 1+len(s.WireGuard.Alternatives))
		down := make([]bool, len(list))
		for i := range list {
			list[i] = known[plan.ProbeName(s.ID, i)]
			down[i] = list[i].Health == probe.Down
		}
		was, ok := p.active[s.ID]
		if !ok {
			was = s.WireGuard.Preferred
		}
		active, at := choosePath(list, was, s.WireGuard.Preferred, now)
		facts[s.ID] = plan.PathFacts{Active: active, Down: down}
		if !at.IsZero() {
			again = earliest(again, at)
		}
	}
	p.active = map[model.ID]int{}
	for id, f := range facts {
		p.active[id] = f.Active
	}
	return facts, again
}

// choosePath is the index of the path to use; negative: none. One that works is left for
// the preferred one only when that has been up for settleTime: again says when.
func choosePath(list []probe.Status, was, preferred int, now time.Time) (active int, again time.Time) {
	if was < 0 || was >= len(list) || list[was].Health == probe.Down {
		return firstPath(list, preferred), time.Time{}
	}
	if p := list[preferred]; was != preferred && p.Health == probe.Up {
		if settled := p.Since.Add(settleTime); now.Before(settled) {
			return was, settled
		}
		return preferred, time.Time{}
	}
	return was, time.Time{}
}

// firstPath is the first path that is up, beginning with the preferred one, or else the
// first that nobody has heard of yet.
func firstPath(list []probe.Status, preferred int) int {
	for _, want := range []probe.Health{probe.Up, probe.Unknown} {
		for i := range list {
			if k := (preferred + i) % len(list); list[k].Health == want {
				return k
			}
		}
	}
	return -1
}

// PathReport is one of several tunnels to a site.
type PathReport struct {
	Link     string        `json:"link"`
	Key      string        `json:"publicKey"`
	Endpoint string        `json:"endpoint,omitempty"`
	Health   string        `json:"health"` // of the probes: unknown, up, down
	Active   bool          `json:"active"` // what is opened towards the site goes through it
	RTT      time.Duration `json:"rttNanoseconds,omitempty"`
	Since    time.Time     `json:"since,omitzero"` // of health
	Lost     uint64        `json:"lostProbes"`     // of all that were sent
}

// fromPaths tells of a site's paths; it is connected while one of them is.
func (p *PeerReport) fromPaths(g *Gateway, s *model.Site, seen observed, now time.Time) {
	known := g.paths.statuses()
	active, chosen := g.paths.active[s.ID]
	var first PeerReport
	for i, path := range s.WireGuard.Paths() {
		one := PeerReport{Name: p.Name, Addresses: p.Addresses, Access: p.Access}
		one.fromWireGuard(path.PublicKey, seen.wireguard, now)
		status := known[plan.ProbeName(s.ID, i)]
		if status.Health == probe.Down && one.Connected {
			one.Connected, one.Reason, one.Message = false, "NoAnswer", "probes to "+path.Probe.Address.String()+" are not answered through this tunnel: see whether it carries packets, and whether that address answers ping"
		}
		p.Paths = append(p.Paths, PathReport{
			Link: plan.PathLink(i), Key: one.Key, Endpoint: one.Endpoint, Health: status.Health.String(),
			Active: !chosen || active == i, RTT: status.RTT, Since: status.Since, Lost: status.Sent - status.Received,
		})
		if i == 0 || chosen && i == active {
			first = one
			first.Link = plan.PathLink(i)
		}
	}
	first.Paths = p.Paths
	*p = first
}

// pathsMessage tells of several paths in one line, or "".
func pathsMessage(list []PathReport) string {
	if len(list) < 2 {
		return ""
	}
	var parts []string
	for _, p := range list {
		what := p.Link + " " + p.Health
		if p.Active {
			what += " (in use)"
		}
		parts = append(parts, what)
	}
	return "paths: " + strings.Join(parts, ", ")
}
