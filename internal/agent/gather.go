package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// node is what is known of the cluster, as seen from this node.
type node struct {
	model    *model.Model
	problems []model.Problem
	facts    plan.NodeFacts
	local    []plan.GatewayPod // the gateway pods on this node
	// linkAddresses are the further addresses that this node sends to gateway pods from.
	linkAddresses []netip.Addr

	// Of the encryption between nodes.
	encryption   *v1alpha1.NodeEncryption // nil: off
	tunnels      map[string]*v1alpha1.NodeTunnel
	uid          types.UID // of the own Node
	controlPlane []netip.Addr
}

// gather reads the objects and looks around on the node.
func (a *Agent) gather(ctx context.Context) (node, error) {
	objects, _, err := a.opts.Cluster.Read()
	if err != nil {
		return node{}, err
	}
	n := node{facts: plan.NodeFacts{Pods: map[model.ID][]plan.GatewayPod{}, Links: map[netip.Addr]string{}, LinkLocals: map[netip.Addr]netip.Addr{}, OnLink: map[netip.Addr]bool{}}}
	var found model.ClusterRanges
	for _, d := range objects.All() {
		gw, ok := d.Object.(*v1alpha1.VPNGateway)
		if !ok {
			continue
		}
		c := gw.Status.Cluster
		found.Pods = append(found.Pods, parsed(c.PodCIDRs)...)
		found.Services = append(found.Services, parsed(c.ServiceCIDRs)...)
		found.Nodes = append(found.Nodes, parsed(c.NodeCIDRs)...)
		n.facts.Pods[d.Ref().ID] = gatewayPods(gw.Status.Endpoints)
	}
	m, problems, kept := a.good.Parse(objects, model.ParseOptions{
		SecretsElsewhere: true, InEffect: model.InEffect(objects), Found: unique(found),
	})
	n.model, n.problems = judged(m, objects, kept), problems
	i := slices.IndexFunc(n.model.Nodes, func(o model.Node) bool { return o.Name == a.opts.Node })
	if i < 0 {
		return node{}, fmt.Errorf("there is no Node %s: give the name of this node with --node", a.opts.Node)
	}
	n.facts.Node = n.model.Nodes[i]
	a.look(ctx, &n)
	return n, a.encryption.gather(ctx, &n, objects, unique(found).Pods)
}

// judged leaves out the gateways and sites that the operator has not accepted: it knows more
// than a node does (the API servers' addresses, for one), and a range that is led to a
// gateway by mistake may cut the node off. What is kept in its last good version was accepted, and
// so was the link of a gateway that is refused for another one.
func judged(m *model.Model, objects model.Objects, kept map[model.Ref]bool) *model.Model {
	accepted := map[model.Ref]bool{}
	for _, d := range objects.All() {
		switch o := d.Object.(type) {
		case *v1alpha1.VPNGateway:
			accepted[d.Ref()] = meta.IsStatusConditionTrue(o.Status.Conditions, v1alpha1.ConditionAccepted) || keepsLink(o)
		case *v1alpha1.Site:
			accepted[d.Ref()] = meta.IsStatusConditionTrue(o.Status.Conditions, v1alpha1.ConditionAccepted)
		}
	}
	ok := func(kind string, id model.ID) bool {
		ref := model.Ref{Kind: kind, ID: id}
		return accepted[ref] || kept[ref]
	}
	out := *m // shared with the next Parse, so copied
	out.Gateways = nil
	for _, gw := range m.Gateways {
		if !ok(model.KindGateway, gw.ID) {
			continue
		}
		g := *gw
		g.Sites = slices.DeleteFunc(slices.Clone(gw.Sites), func(s *model.Site) bool { return !ok(model.KindSite, s.ID) })
		out.Gateways = append(out.Gateways, &g)
	}
	return &out
}

// keepsLink tells whether a gateway goes on with the link that it had before one that the network
// plugin cannot carry.
func keepsLink(o *v1alpha1.VPNGateway) bool {
	c := meta.FindStatusCondition(o.Status.Conditions, v1alpha1.ConditionAccepted)
	return c != nil && c.Reason == model.ReasonNetworkPlugin && o.Status.NodeLink != ""
}

func unique(r model.ClusterRanges) model.ClusterRanges {
	for _, l := range []*[]netip.Prefix{&r.Pods, &r.Services, &r.Nodes} {
		slices.SortFunc(*l, func(a, b netip.Prefix) int { return a.Compare(b) })
		*l = slices.Compact(*l)
	}
	return r
}

func parsed(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// gatewayPods reads what the pods of a gateway say of themselves.
func gatewayPods(list []v1alpha1.GatewayEndpoint) []plan.GatewayPod {
	var out []plan.GatewayPod
	for _, e := range list {
		out = append(out, plan.GatewayPod{Name: e.Pod, Node: e.Node, PodIPs: addresses(e.PodIPs), HostIPs: addresses(e.HostIPs), Active: e.Active})
	}
	return out
}

func addresses(list []v1alpha1.IP) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		if a, err := netip.ParseAddr(string(s)); err == nil {
			out = append(out, a.Unmap().WithZone(""))
		}
	}
	return out
}

// look finds out how the gateway pods are reached from here.
func (a *Agent) look(ctx context.Context, n *node) {
	sources := map[netip.Addr]bool{}
	consider := func(to netip.Addr) (mtu int) {
		u, err := a.route.Underlay(ctx, to)
		if err != nil {
			return 0
		}
		if u.Source.IsValid() && !slices.Contains(n.facts.Node.Addresses, u.Source) {
			sources[u.Source] = true
		}
		return u.MTU
	}
	for _, gw := range n.model.Gateways {
		for _, pod := range n.facts.Pods[gw.ID] {
			for _, ip := range pod.PodIPs {
				if mtu := consider(ip); mtu != 0 && (n.facts.UnderlayMTU == 0 || mtu < n.facts.UnderlayMTU) {
					n.facts.UnderlayMTU = mtu
				}
			}
			for _, ip := range pod.HostIPs {
				u, err := a.route.Underlay(ctx, ip)
				n.facts.OnLink[ip] = err == nil && !u.Gateway.IsValid()
			}
			if pod.Node == a.opts.Node {
				n.local = append(n.local, pod)
			}
		}
	}
	if len(n.model.Gateways) == 0 {
		return // and there is nobody to tell
	}
	// Where a gateway may come to be: its first packets must not wait for the news.
	for _, c := range n.facts.Node.PodCIDRs {
		consider(c.Addr().Next().Next())
	}
	for s := range sources {
		n.linkAddresses = append(n.linkAddresses, s)
	}
	slices.SortFunc(n.linkAddresses, netip.Addr.Compare)
	if slices.ContainsFunc(n.model.Gateways, func(gw *model.Gateway) bool { return len(plan.BehindGateway(gw)) > 0 }) {
		n.facts.CiliumHost = ciliumHost()
	}
	a.pods.find(n.local)
	for _, pod := range n.local {
		for _, ip := range pod.PodIPs {
			if link := a.pods.link(ip); link != "" {
				n.facts.Links[ip] = link
				n.facts.LinkLocals[ip] = a.pods.found[ip].local
			}
		}
	}
}
