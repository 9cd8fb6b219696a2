package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/source"
)

// syncPatience is how long the first complete snapshot may take without a word.
const syncPatience = 5 * time.Second

// gather reads the objects and returns the gateway's model; nil when there is none. It is
// not known before the objects have been read once.
func (g *Gateway) gather() (gw *model.Gateway, known bool) {
	objects, problems, err := g.backing.Read()
	if errors.Is(err, source.ErrNotSynced) && time.Since(g.started) < syncPatience {
		return nil, false
	}
	if g.check(g.backing.Name(), err); err != nil {
		// What was in effect stays.
		return g.model, !errors.Is(err, source.ErrNotSynced)
	}
	m, refused, kept := g.good.Parse(objects, g.backing.ParseOptions(objects))
	stale := g.backing.Stale()
	for _, refs := range stale {
		for _, ref := range refs {
			kept[ref] = true
		}
	}
	g.account.problems, g.account.kept = g.backing.Review(append(problems, refused...)), kept
	g.problems = problemReports(g.account.problems, kept, stale)
	g.facts.Nodes = m.Nodes
	next, err := Choose(m.Gateways, g.opts.Name)
	if err != nil {
		g.problems = append(g.problems, ProblemReport{Object: "VPNGateway", Reason: "NotChosen", Message: err.Error()})
	}
	if next == nil && g.model != nil {
		// Another gateway beside the running one is no reason to stop that.
		next, _ = Choose(m.Gateways, g.model.ID.String())
	}
	g.model = next
	return g.model, true
}

// Choose picks the one gateway that is meant by name ("name" or "namespace/name"; empty:
// the only one).
func Choose(gateways []*model.Gateway, name string) (*model.Gateway, error) {
	var found []*model.Gateway
	for _, gw := range gateways {
		if name == "" || name == gw.Name || name == gw.ID.String() {
			found = append(found, gw)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fmt.Errorf("%d VPNGateways match: choose one with --name NAMESPACE/NAME", len(found))
	case name != "":
		return nil, fmt.Errorf("no VPNGateway %q in the manifests", name)
	}
	return nil, errors.New("no VPNGateway in the manifests: add one, see 'culvert gateway --help'")
}

// plan completes the facts, keeps what must be kept, and plans.
func (g *Gateway) plan(ctx context.Context, gw *model.Gateway) (plan.Result, error) {
	if err := g.identify(ctx, gw); err != nil {
		return plan.Result{}, err
	}
	problems, err := g.backing.Devices(gw, &g.facts)
	for _, p := range problems {
		g.problems = append(g.problems, problemReport(p))
	}
	g.account.problems = append(g.account.problems, problems...)
	if err != nil {
		return plan.Result{}, err
	}
	g.facts.Now = time.Now()
	g.facts.UnderlayMTU = g.underlayMTU(ctx, gw)
	g.facts.Resolved = g.names.resolved(endpointNames(gw))
	var settled time.Time
	g.facts.Paths, settled = g.paths.choose(gw, g.facts.Now)
	out := plan.Gateway(gw, g.facts)
	if !settled.IsZero() {
		out.NextChange = earliest(out.NextChange, settled)
	}
	return out, nil
}

// underlayMTU is the smallest MTU on the ways to the peers: of the default route, and of
// the routes to the peers whose address is known.
func (g *Gateway) underlayMTU(ctx context.Context, gw *model.Gateway) int {
	mtu := 0
	consider := func(remote netip.Addr) {
		u, err := g.route.Underlay(ctx, remote)
		if err == nil && (mtu == 0 || u.MTU < mtu) {
			mtu = u.MTU
		}
	}
	consider(netip.Addr{})
	for _, s := range gw.Sites {
		for _, host := range hostsOf(s) {
			if a, err := netip.ParseAddr(host); err == nil {
				consider(a)
			}
		}
	}
	return mtu
}

// essential are the steps without which the gateway does not do its work. The others
// (ipsec, relay, what is observed) may fail for one site or one service: that is told in
// the report and in culvert_apply_failed, and is no reason to take all others away.
var essential = []string{"manifests", "objects", "plan", "firewall", "sysctls", "wireguard", "routes", "services"}

// notReady says why the gateway is not ready; nil when it is.
func notReady(r Report) error {
	if r.Gateway == "" {
		return errors.New("no VPNGateway is in effect")
	}
	for _, step := range essential {
		if msg := r.Errors[step]; msg != "" {
			return fmt.Errorf("%s: %s", step, msg)
		}
	}
	return nil
}

// endpointNames lists the DNS names among the sites' endpoints.
func endpointNames(gw *model.Gateway) []string {
	var names []string
	for _, s := range gw.Sites {
		if s.WireGuard == nil {
			continue
		}
		for _, host := range hostsOf(s) {
			if _, err := netip.ParseAddr(host); err != nil && host != "" {
				names = append(names, host)
			}
		}
	}
	return names
}

// hostsOf are the addresses and names of a site's far ends; empty ones dial in.
func hostsOf(s *model.Site) []string {
	if s.IPsec != nil {
		return []string{s.IPsec.Address}
	}
	var out []string
	for _, path := range s.WireGuard.Paths() {
		out = append(out, path.Endpoint.Host)
	}
	return out
}
