package model

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Bounds of the tunnels' MTU: RFC 8200, section 5, and what jumbo frames carry.
const (
	minimumMTU = 1280
	maximumMTU = 9000
)

// Defaults of the fields, the same as in the CRDs.
const (
	defaultWireGuardPort = 51820
	defaultReplicas      = 1
)

func (p *parser) gateway(e entry) {
	o := e.Object.(*v1alpha1.VPNGateway)
	s := &o.Spec
	r := p.report(e)
	g := &Gateway{ID: e.ref.ID, Generation: o.Generation}
	p.gatewayRanges(r, g, s)
	allowedSites(r, s.AllowedSites)
	namespaces(r, "spec.allowedDevices.namespaces", s.AllowedDevices.Namespaces)
	gatewayExpose(r, g, s)

	g.WireGuardPort = defaultWireGuardPort
	if n := s.WireGuard.Port; n != 0 {
		g.WireGuardPort = port(r, "spec.wireguard.port", n)
		if n == 500 || n == 4500 {
			r.refuse("spec.wireguard.port", ReasonInvalidSpec, "%d is taken by IKE: choose another one; 51820 is WireGuard's usual one", n)
		}
	}
	identity(r, "spec.ipsec.localID", string(s.IPsec.LocalID))
	gatewayTraffic(r, g, s)
	g.NodeLink = linkInUse(o, g.AskedLink)
	if s.MTU != nil {
		g.MTU = int(bounded(r, "spec.mtu", *s.MTU, minimumMTU, maximumMTU, "bytes"))
	}
	g.Replicas = defaultReplicas
	if s.Replicas != nil {
		g.Replicas = int(bounded(r, "spec.replicas", *s.Replicas, 1, 32, ""))
	}
	atMost(r, "spec.dns", len(s.DNS), 4)
	for i, a := range s.DNS {
		field := "spec.dns[" + strconv.Itoa(i) + "]"
		addr, problem := parseAddr(string(a))
		if problem == "" && unusableHost(addr) != "" {
			problem = quote(string(a)) + " " + unusableHost(addr) + ": write the address of a name server"
		}
		if problem == "" && slices.Contains(g.DNS, addr) {
			problem = quote(string(a)) + " is listed twice: leave one out"
		}
		if problem != "" {
			r.refuse(field, ReasonInvalidSpec, "%s", problem)
			continue
		}
		g.DNS = append(g.DNS, addr)
	}
	p.keepIncumbents(r, g)
	if !r.ok() {
		p.refused[g.ID] = true
		return
	}
	p.out.Gateways = append(p.out.Gateways, g)
	p.attachments[g.ID] = &attachments{
		gateway: g, spec: s,
		addresses:  map[netip.Addr]string{},
		keys:       map[netstate.Key]string{},
		identities: map[string]string{},
	}
}

// gatewayRanges reads the ranges behind the gateway and those of its devices.
func (p *parser) gatewayRanges(r *report, g *Gateway, s *v1alpha1.VPNGatewaySpec) {
	for _, l := range []struct {
		field string
		list  []v1alpha1.RoutedCIDR
		found []netip.Prefix
		most  int
		out   *[]netip.Prefix
	}{
		{"spec.cluster.podCIDRs", s.Cluster.PodCIDRs, p.opts.Found.Pods, 64, &g.Pods},
		{"spec.cluster.serviceCIDRs", s.Cluster.ServiceCIDRs, p.opts.Found.Services, 16, &g.ServiceRanges},
		{"spec.cluster.nodeCIDRs", s.Cluster.NodeCIDRs, p.opts.Found.Nodes, 64, &g.Nodes},
	} {
		atMost(r, l.field, len(l.list), l.most)
		*l.out = prefixes(r, l.field, l.list, true)
		if len(l.list) == 0 {
			*l.out = slices.SortedFunc(slices.Values(l.found), netstate.ComparePrefixes)
		}
	}
	for _, svc := range g.ServiceRanges {
		if i := slices.IndexFunc(g.Pods, svc.Overlaps); i >= 0 {
			r.refuse("spec.cluster.serviceCIDRs", ReasonOverlap, "%s overlaps %s of podCIDRs, so that pods could not be told from services: correct one of them", svc, g.Pods[i])
		}
	}
	atMost(r, "spec.deviceCIDRs", len(s.DeviceCIDRs), 16)
	devices := prefixes(r, "spec.deviceCIDRs", s.DeviceCIDRs, true)
	for _, d := range devices {
		field := "spec.deviceCIDRs[" + strconv.Itoa(slices.Index(s.DeviceCIDRs, v1alpha1.RoutedCIDR(d.String()))) + "]"
		if most := d.Addr().BitLen() - 2; d.Bits() > most {
			r.refuse(field, ReasonInvalidSpec, "%s has no room for a gateway and a device: take a range with a prefix length of at most %d", d, most)
		}
		if why := p.refuseRange(g, d); why != "" {
			r.refuse(field, ReasonOverlap, "%s overlaps %s: take a range that nobody uses", d, why)
		}
	}
	g.DeviceRanges = devices
}

// refuseRange says which range or address that belongs to the gateway p overlaps, or "".
func (p *parser) refuseRange(g *Gateway, r netip.Prefix) string {
	if why := g.RefuseRange(r); why != "" {
		return why
	}
	for _, a := range p.opts.APIServers {
		if r.Contains(a.Unmap().WithZone("")) {
			return a.String() + ", the API server's address"
		}
	}
	return ""
}

// keepIncumbents refuses a changed gateway whose new ranges would take away those of a
// site that is in effect.
func (p *parser) keepIncumbents(r *report, g *Gateway) {
	if p.opts.InEffect[r.e.ref] {
		return
	}
	for _, e := range p.sites {
		s := e.Object.(*v1alpha1.Site)
		if !p.opts.InEffect[e.ref] || gatewayID(e, s.Spec.GatewayRef) != g.ID {
			continue
		}
		for _, c := range s.Spec.CIDRs {
			prefix, problem := parsePrefix(string(c))
			if problem != "" {
				continue
			}
			if why := g.RefuseRange(prefix); why != "" {
				r.refuse("spec", ReasonOverlap, "%s overlaps %s of %s, which came first: change the range, or remove the site", why, prefix, e.ref)
			}
		}
	}
}

func gatewayExpose(r *report, g *Gateway, s *v1alpha1.VPNGatewaySpec) {
	x := &s.Expose
	t := oneOf(r, "spec.expose.type", x.Type, v1alpha1.ExposeLoadBalancer,
		v1alpha1.ExposeLoadBalancer, v1alpha1.ExposeNodePort, v1alpha1.ExposeHostPort, v1alpha1.ExposeNone)
	if x.Address != "" {
		host, problem := parseHost(string(x.Address))
		if problem != "" {
			r.refuse("spec.expose.address", ReasonInvalidSpec, "%s", problem)
		}
		g.Address = host
	}
	if len(x.Annotations) > 0 && t != v1alpha1.ExposeLoadBalancer && t != v1alpha1.ExposeNodePort {
		r.refuse("spec.expose.annotations", ReasonInvalidSpec, "annotations are put on the Service, and type %s has none: leave them out, or use LoadBalancer or NodePort", t)
	}
	atMost(r, "spec.expose.annotations", len(x.Annotations), 64)
	if x.LoadBalancerClass != "" && t != v1alpha1.ExposeLoadBalancer {
		r.refuse("spec.expose.loadBalancerClass", ReasonInvalidSpec, "a class needs type LoadBalancer, not %s: leave one of them out", t)
	}
	if len(x.LoadBalancerClass) > 253 || hasControl(x.LoadBalancerClass) {
		r.refuse("spec.expose.loadBalancerClass", ReasonInvalidSpec, "%s is not a class: use the name that the load balancer's documentation gives", quote(x.LoadBalancerClass))
	}
	g.Expose = Expose{Type: string(t), Annotations: maps.Clone(x.Annotations), LoadBalancerClass: x.LoadBalancerClass}
}

func gatewayTraffic(r *report, g *Gateway, s *v1alpha1.VPNGatewaySpec) {
	t := &s.ClusterTraffic
	services := oneOf(r, "spec.clusterTraffic.services", t.Services, v1alpha1.ServicesTranslate,
		v1alpha1.ServicesTranslate, v1alpha1.ServicesProxy, v1alpha1.ServicesRoute)
	source := oneOf(r, "spec.clusterTraffic.source", t.Source, v1alpha1.SourcePreserve,
		v1alpha1.SourcePreserve, v1alpha1.SourceMasquerade)
	link := oneOf(r, "spec.clusterTraffic.nodeLink", t.NodeLink, v1alpha1.NodeLinkEncapsulated,
		v1alpha1.NodeLinkEncapsulated, v1alpha1.NodeLinkDirect, v1alpha1.NodeLinkCiliumEndpoint)
	if services == v1alpha1.ServicesRoute && source == v1alpha1.SourcePreserve {
		r.refuse("spec.clusterTraffic", ReasonInvalidSpec,
			"services: Route cannot work with source: Preserve, because the node's replies would not come back through the gateway: use services: Translate, or source: Masquerade")
	}
	g.ServicesMode = netstate.ServicesMode(services)
	g.Masquerade = source == v1alpha1.SourceMasquerade
	g.AskedLink = string(link)
}

// linkInUse is the node link that a gateway has in effect. What the network plugin can carry is
// known to the operator: until it has accepted a link, the last good one stays, which it has
// written into the status.
func linkInUse(o *v1alpha1.VPNGateway, asked string) string {
	c := meta.FindStatusCondition(o.Status.Conditions, v1alpha1.ConditionAccepted)
	if o.Status.NodeLink == "" || c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == o.Generation {
		return asked
	}
	return string(o.Status.NodeLink)
}

func allowedSites(r *report, list []v1alpha1.AllowedSites) {
	atMost(r, "spec.allowedSites", len(list), 64)
	for i, a := range list {
		field := "spec.allowedSites[" + strconv.Itoa(i) + "]"
		namespaces(r, field+".namespaces", a.Namespaces)
		atMost(r, field+".cidrs", len(a.CIDRs), 64)
		prefixes(r, field+".cidrs", a.CIDRs, false)
	}
}

func namespaces(r *report, field string, list []v1alpha1.Namespace) {
	atMost(r, field, len(list), 64)
	for i, n := range list {
		if n != "*" && !isDNSLabel(string(n)) {
			r.refuse(field+"["+strconv.Itoa(i)+"]", ReasonInvalidSpec, "%s is not the name of a namespace: write one, or \"*\" for all", quote(string(n)))
		}
		if slices.Contains(list[:i], n) {
			r.refuse(field+"["+strconv.Itoa(i)+"]", ReasonInvalidSpec, "%s is listed twice: leave one out", quote(string(n)))
		}
	}
}

// allowsNamespace reports whether a list of the gateway's owner names a namespace; an
// empty list names the gateway's own.
func allowsNamespace(list []v1alpha1.Namespace, gateway, ns string) bool {
	if len(list) == 0 {
		return ns == gateway
	}
	return slices.Contains(list, "*") || slices.Contains(list, v1alpha1.Namespace(ns))
}

// allowsSite says why the gateway's owner does not let a namespace attach a range, or "".
func (a *attachments) allowsSite(ns string, c netip.Prefix) string {
	if len(a.spec.AllowedSites) == 0 {
		if ns != a.gateway.Namespace {
			return "sites of namespace " + ns
		}
		return ""
	}
	why := "sites of namespace " + ns
	for _, x := range a.spec.AllowedSites {
		if !allowsNamespace(x.Namespaces, a.gateway.Namespace, ns) {
			continue
		}
		why = "the range " + c.String() + " to sites of namespace " + ns
		if len(x.CIDRs) == 0 {
			return ""
		}
		for _, s := range x.CIDRs {
			if in, err := netip.ParsePrefix(string(s)); err == nil && in.Bits() <= c.Bits() && in.Contains(c.Addr()) {
				return ""
			}
		}
	}
	return why
}
