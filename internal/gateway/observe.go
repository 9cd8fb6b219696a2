package gateway

import (
	"context"
	"maps"
	"net/netip"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

// staleAfter is when a WireGuard session is over without a new handshake: Reject-After-
// Time of https://www.wireguard.com/protocol/.
const staleAfter = 180 * time.Second

// saveEvery is how often endpoints that changed are written to disk.
const saveEvery = 5 * time.Second

// publish makes the report of what reconcile has just planned, and of the state, all or part
// of that, which it has applied.
func (g *Gateway) publish(gw *model.Gateway, result plan.Result, state netstate.State) {
	g.planned = result
	r := Report{
		Version:  process.Version(),
		Started:  g.started,
		Applied:  time.Now(),
		Datapath: map[string]string{"wireguard": string(g.wireguard.Datapath())},
		MTU:      map[string]int{},
		Errors:   maps.Clone(g.failed),
		Problems: g.problems,
		Active:   g.active,
		Key:      g.facts.PublicKey.String(),
		Services: ServicesReport{Mode: string(result.State.Services.Mode), Ports: len(result.State.Services.Ports)},
	}
	if gw != nil {
		r.Gateway = gw.ID.String()
	}
	if result.State.IPsec != nil {
		r.Datapath["ipsec"] = string(result.State.IPsec.Datapath)
	}
	for _, l := range result.State.Links {
		r.MTU[l.Name] = l.MTU
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	r.Sites, r.Devices, r.Dropped = g.report.Sites, g.report.Devices, g.report.Dropped
	g.report, g.applied, g.behind = r, state, g.facts
	g.ready = notReady(r)
}

// observed is what the appliers see of the peers.
type observed struct {
	wireguard map[netstate.Key]wireguard.Peer
	ipsec     map[string]ipsec.Connection
}

// observe looks at the peers: for the report, and to remember where they are.
func (g *Gateway) observe(ctx context.Context) {
	seen := observed{wireguard: map[netstate.Key]wireguard.Peer{}, ipsec: map[string]ipsec.Connection{}}
	devices, err := g.wireguard.Observe(ctx)
	g.check("observe wireguard", err)
	for _, d := range devices {
		for _, p := range d.Peers {
			seen.wireguard[p.PublicKey] = p
		}
	}
	connections, err := g.ipsec.Observe(ctx)
	g.check("observe ipsec", err)
	for _, c := range connections {
		seen.ipsec[c.Name] = c
	}
	g.remember(seen.wireguard)
	firewall, err := g.nft.Observe(ctx)
	g.check("observe firewall", err)
	sites, peers := g.peerReports(seen, time.Now())
	g.mu.Lock()
	g.report.Sites, g.report.Devices, g.report.Dropped = sites, peers, firewall.Dropped
	g.account.report = g.report
	g.mu.Unlock()
	g.account.active = g.active
	g.account.gateway, g.account.waiting = g.model, g.planned.Waiting
	g.backing.Tell(g.account)
}

// remember keeps the endpoints of peers that shook hands, for the next start.
func (g *Gateway) remember(peers map[netstate.Key]wireguard.Peer) {
	if g.lastEndpoints == nil { // what was seen before is not known yet
		return
	}
	for k, p := range peers {
		if p.Endpoint.IsValid() && !p.LastHandshake.IsZero() && g.lastEndpoints[k] != p.Endpoint {
			g.lastEndpoints[k] = p.Endpoint
			g.endpointsDirty = true
		}
	}
	for k := range g.lastEndpoints {
		if _, ok := peers[k]; !ok && len(peers) > 0 {
			delete(g.lastEndpoints, k)
			g.endpointsDirty = true
		}
	}
	if !g.endpointsDirty || time.Since(g.endpointsSaved) < saveEvery {
		return
	}
	g.endpointsSaved = time.Now()
	err := g.backing.SaveEndpoints(g.lastEndpoints)
	g.check("endpoints", err)
	g.endpointsDirty = err != nil
}

// peerReports joins what is planned with what is seen.
func (g *Gateway) peerReports(seen observed, now time.Time) (sites, devices []PeerReport) {
	sites, devices = []PeerReport{}, []PeerReport{}
	if g.model == nil {
		return sites, devices
	}
	for _, s := range g.model.Sites {
		p := PeerReport{Name: s.ID.String(), Addresses: s.CIDRs, Access: s.Access.String()}
		switch {
		case s.WireGuard == nil:
			p.fromIPsec(seen.ipsec[plan.ConnectionName(s.ID)])
		case !s.WireGuard.Probe.IsZero():
			p.fromPaths(g, s, seen, now)
		default:
			p.fromWireGuard(s.WireGuard.PublicKey, seen.wireguard, now)
		}
		p.waits(g.planned.Waiting[plan.SiteName(s.ID)])
		sites = append(sites, p)
	}
	for _, d := range g.model.Devices {
		p := PeerReport{Name: d.ID.String(), Access: d.Access.String()}
		for _, a := range g.facts.Addresses[d.ID] {
			p.Addresses = append(p.Addresses, netip.PrefixFrom(a, a.BitLen()))
		}
		key := d.PublicKey
		if key.IsZero() {
			key = g.facts.DeviceKeys[d.ID]
		}
		p.fromWireGuard(key, seen.wireguard, now)
		p.waits(g.planned.Waiting[plan.DeviceName(d.ID)])
		devices = append(devices, p)
	}
	return sites, devices
}

func (p *PeerReport) waits(why string) {
	if why != "" {
		p.Connected, p.Reason, p.Message = false, "Waiting", why
	}
}

func (p *PeerReport) fromWireGuard(key netstate.Key, peers map[netstate.Key]wireguard.Peer, now time.Time) {
	p.Type = "wireguard"
	p.Key = key.String()
	peer, ok := peers[key]
	if !ok {
		p.Reason, p.Message = "NotConfigured", "not a peer (yet)"
		return
	}
	if peer.Endpoint.IsValid() {
		p.Endpoint = peer.Endpoint.String()
	}
	p.Link = plan.WireGuardLink
	p.Since, p.ReceivedBytes, p.SentBytes = peer.LastHandshake, peer.ReceivedBytes, peer.SentBytes
	switch {
	case peer.LastHandshake.IsZero():
		p.Reason, p.Message = "NoHandshake", "no handshake yet: the peer has not dialled in, or its key or the gateway's is not what the other side expects"
	case now.Sub(peer.LastHandshake) > staleAfter:
		p.Reason, p.Message = "Stale", "the last handshake is too old to carry traffic: the peer is silent or cannot be reached"
	default:
		p.Connected = true
	}
}

func (p *PeerReport) fromIPsec(c ipsec.Connection) {
	p.Type = "ipsec"
	p.Connected, p.Since = c.Established, c.Since
	if c.Remote.IsValid() {
		p.Endpoint = c.Remote.String()
	}
	for _, child := range c.Children {
		p.ReceivedBytes += child.BytesIn
		p.SentBytes += child.BytesOut
	}
	if !c.Established {
		p.Reason, p.Message = "NotEstablished", "no SA yet"
		if c.LastFailure != nil {
			p.Reason, p.Message = string(c.LastFailure.Reason), c.LastFailure.Message
		}
	}
}

// problemReports prepares refused objects for the report. Kept names the objects of which
// an earlier version stays in effect; stale does so by file, for what is wrong with a file
// as a whole.
func problemReports(problems []model.Problem, kept map[model.Ref]bool, stale map[string][]model.Ref) []ProblemReport {
	sortProblems(problems)
	out := make([]ProblemReport, 0, len(problems))
	for _, p := range problems {
		if p.Reason == model.ReasonIgnored { // not ours: other programs read it
			continue
		}
		r := problemReport(p)
		r.Kept = kept[model.Ref{Kind: p.Kind, ID: p.Object}]
		if p.Kind == "" {
			file, _, _ := strings.Cut(p.Origin, ":")
			r.Kept = len(stale[file]) > 0
		}
		out = append(out, r)
	}
	return out
}

func problemReport(p model.Problem) ProblemReport {
	return ProblemReport{Object: strings.TrimSpace(p.Kind + " " + p.Object.String()), Origin: p.Origin, Field: p.Field, Reason: p.Reason, Message: p.Message}
}
