package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// gather reads the objects and returns the gateway's model; nil when there is none.
func (g *Gateway) gather() *model.Gateway {
	objects, problems, err := g.files.Read()
	if g.check("manifests", err); err != nil {
		return g.model // the directory is unreadable: what was in effect stays
	}
	if stamp(objects, &g.known, time.Now()) {
		g.unsaved = true
	}
	m, refused, kept := g.good.Parse(objects, model.ParseOptions{})
	stale := g.files.Stale()
	for _, refs := range stale {
		for _, ref := range refs {
			kept[ref] = true
		}
	}
	g.problems = problemReports(append(problems, refused...), kept, stale)
	next, err := Choose(m.Gateways, g.opts.Name)
	if err != nil {
		g.problems = append(g.problems, ProblemReport{Object: "VPNGateway", Reason: "NotChosen", Message: err.Error()})
	}
	if next == nil && g.model != nil {
		// Another gateway beside the running one is no reason to stop that.
		next, _ = Choose(m.Gateways, g.model.ID.String())
	}
	g.model = next
	return g.model
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
	addresses, changed, problems := plan.Addresses(gw, g.known.Addresses)
	for _, p := range problems {
		g.problems = append(g.problems, problemReport(p))
	}
	if changed {
		g.known.Addresses = plan.AddressBook(addresses)
		g.unsaved = true
	}
	g.facts.Addresses = addresses
	g.facts.DeviceKeys = map[model.ID]netstate.Key{}
	for _, d := range gw.Devices {
		if d.PublicKey.IsZero() {
			_, pub, err := g.store.DeviceKey(d.ID)
			if err != nil {
				return plan.Result{}, err
			}
			g.facts.DeviceKeys[d.ID] = pub
		}
	}
	g.facts.Now = time.Now()
	g.facts.UnderlayMTU = g.underlayMTU(ctx, gw)
	g.facts.Resolved = g.names.resolved(endpointNames(gw))
	return plan.Gateway(gw, g.facts), nil
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
		var host string
		if s.WireGuard != nil {
			host = s.WireGuard.Endpoint.Host
		} else {
			host = s.IPsec.Address
		}
		if a, err := netip.ParseAddr(host); err == nil {
			consider(a)
		}
	}
	return mtu
}

// essential are the steps without which the gateway does not do its work. The others
// (ipsec, relay, what is observed) may fail for one site or one service: that is told in
// the report and in culvert_apply_failed, and is no reason to take all others away.
var essential = []string{"manifests", "plan", "firewall", "sysctls", "wireguard", "routes", "services"}

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
		if s.WireGuard == nil || s.WireGuard.Endpoint.IsZero() {
			continue
		}
		if _, err := netip.ParseAddr(s.WireGuard.Endpoint.Host); err != nil {
			names = append(names, s.WireGuard.Endpoint.Host)
		}
	}
	return names
}
