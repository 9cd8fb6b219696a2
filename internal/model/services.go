package model

import (
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// defaultAffinity is Kubernetes' default of sessionAffinityConfig.clientIP.timeoutSeconds.
const defaultAffinity = 10800

// serviceParser turns Services and EndpointSlices into ports of service addresses, with
// the endpoints that kube-proxy would choose on the node.
type serviceParser struct {
	p      *parser
	slices map[ID][]entry // EndpointSlices by Service
	ports  []netstate.ServicePort
	owners map[portKey]Ref

	scratch []candidate // reused
	next    map[*corev1.Service]remembered
}

// portKey is what one port of a service is known by in the network.
type portKey struct {
	address  netip.Addr
	protocol netstate.Protocol
	port     uint16
}

// candidate is an endpoint that may be chosen.
type candidate struct {
	at                   netip.AddrPort
	ready, lastResort    bool // lastResort: terminating, but still serving
	local                bool
	zoneHint, nodeHint   bool // it has hints at all
	forMyZone, forMyNode bool
}

func (p *parser) services() {
	if len(p.serviceEntries) == 0 {
		return
	}
	s := &serviceParser{
		p:      p,
		slices: make(map[ID][]entry, len(p.serviceEntries)),
		owners: make(map[portKey]Ref, 2*len(p.serviceEntries)),
	}
	for _, e := range p.sliceEntries {
		if name := e.Object.GetLabels()[discoveryv1.LabelServiceName]; name != "" {
			id := ID{e.ref.ID.Namespace, name}
			s.slices[id] = append(s.slices[id], e)
		}
	}
	if p.opts.Memory != nil {
		s.next = make(map[*corev1.Service]remembered, len(p.serviceEntries))
	}
	for _, e := range p.serviceEntries {
		o := e.Object.(*corev1.Service)
		if s.recall(e, o) {
			continue
		}
		ports, problems := len(s.ports), len(p.problems)
		s.service(e, o)
		if p.opts.Memory != nil && len(p.problems) == problems {
			s.keep(e, o, s.ports[ports:])
		}
	}
	if m := p.opts.Memory; m != nil {
		m.services = s.next
	}
	if !slices.IsSortedFunc(s.ports, netstate.CompareServicePorts) {
		slices.SortFunc(s.ports, netstate.CompareServicePorts)
	}
	for _, g := range p.out.Gateways {
		g.Ports = portsIn(s.ports, g.ServiceRanges)
	}
}

// portsIn are the ports whose address is in one of the ranges.
func portsIn(ports []netstate.ServicePort, ranges []netip.Prefix) []netstate.ServicePort {
	in := func(x netstate.ServicePort) bool {
		return slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(x.Address) })
	}
	var out []netstate.ServicePort
	for _, x := range ports {
		if in(x) {
			out = append(out, x)
		}
	}
	return out
}

func (s *serviceParser) service(e entry, o *corev1.Service) {
	if o.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	addresses, field := o.Spec.ClusterIPs, "spec.clusterIPs"
	if len(addresses) == 0 && o.Spec.ClusterIP != "" {
		addresses = []string{o.Spec.ClusterIP}
	}
	if len(addresses) == 0 || addresses[0] == corev1.ClusterIPNone {
		return
	}
	r := s.p.report(e)
	for i, text := range addresses {
		addr, problem := parseAddr(text)
		if problem != "" {
			r.refuse(field+"["+strconv.Itoa(i)+"]", ReasonInvalidSpec, "%s", problem)
			continue
		}
		if !s.inRange(addr) {
			r.refuse(field+"["+strconv.Itoa(i)+"]", ReasonInvalidSpec, "%s is in no range for services%s: add its range to spec.cluster.serviceCIDRs of the VPNGateway", addr, s.p.knownGateways())
			continue
		}
		for j := range o.Spec.Ports {
			s.port(r, e, o, addr, j)
		}
	}
}

// inRange reports whether any gateway serves an address; without gateways that are in
// effect nobody can tell.
func (s *serviceParser) inRange(a netip.Addr) bool {
	if len(s.p.out.Gateways) == 0 || len(s.p.refused) > 0 {
		return true
	}
	return slices.ContainsFunc(s.p.out.Gateways, func(g *Gateway) bool {
		return slices.ContainsFunc(g.ServiceRanges, func(r netip.Prefix) bool { return r.Contains(a) })
	})
}

func (s *serviceParser) port(r *report, e entry, o *corev1.Service, addr netip.Addr, j int) {
	x := &o.Spec.Ports[j]
	field := func(name string) string { return "spec.ports[" + strconv.Itoa(j) + "]." + name }
	protocol, ok := protocolOf(x.Protocol)
	if !ok {
		r.refuse(field("protocol"), ReasonInvalidSpec, "%s is not known: write TCP, UDP or SCTP", quote(string(x.Protocol)))
		return
	}
	if x.Name != "" && !isDNSLabel(x.Name) {
		r.refuse(field("name"), ReasonInvalidSpec, "%s is not the name of a port: use lower-case letters, digits and '-', at most 63", quote(x.Name))
		return
	}
	if x.Port < 1 || x.Port > 65535 {
		r.refuse(field("port"), ReasonInvalidSpec, "%d is not a port: write a number from 1 to 65535", x.Port)
		return
	}
	key := portKey{addr, protocol, uint16(x.Port)}
	if owner, dup := s.owners[key]; dup {
		r.refuse(field("port"), ReasonDuplicate, "%s of %s is taken by %s: give the service an address of its own", netip.AddrPortFrom(addr, key.port), protocol, owner)
		return
	}
	s.owners[key] = e.ref
	out := netstate.ServicePort{Name: e.ref.ID.String(), Address: addr, Protocol: protocol, Port: key.port}
	if x.Name != "" {
		out.Name += ":" + x.Name
	}
	if o.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		out.AffinitySeconds = defaultAffinity
		if c := o.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			out.AffinitySeconds = int(bounded(r, "spec.sessionAffinityConfig.clientIP.timeoutSeconds", *c.ClientIP.TimeoutSeconds, 1, 86400, "seconds"))
		}
	}
	s.candidates(e, o, x, addr)
	local := o.Spec.InternalTrafficPolicy != nil && *o.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	out.Endpoints = choose(s.scratch, local)
	s.ports = append(s.ports, out)
}

func protocolOf(p corev1.Protocol) (netstate.Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return netstate.TCP, true
	case corev1.ProtocolUDP:
		return netstate.UDP, true
	case corev1.ProtocolSCTP:
		return netstate.SCTP, true
	}
	return 0, false
}

// candidates collects the endpoints of a port into s.scratch.
func (s *serviceParser) candidates(e entry, o *corev1.Service, x *corev1.ServicePort, addr netip.Addr) {
	s.scratch = s.scratch[:0]
	family := discoveryv1.AddressTypeIPv4
	if addr.Is6() {
		family = discoveryv1.AddressTypeIPv6
	}
	for _, se := range s.slices[e.ref.ID] {
		slice := se.Object.(*discoveryv1.EndpointSlice)
		if slice.AddressType != family {
			continue
		}
		port, ok := slicePort(slice.Ports, x)
		if !ok {
			continue
		}
		for i := range slice.Endpoints {
			ep := &slice.Endpoints[i]
			if len(ep.Addresses) == 0 {
				continue
			}
			a, why := endpointAddress(ep.Addresses[0], addr.Is4())
			if why != "" {
				r := s.p.report(se)
				r.refuse("endpoints["+strconv.Itoa(i)+"].addresses[0]", ReasonInvalidSpec, "%s", why)
				continue
			}
			c := s.candidate(ep, o.Spec.PublishNotReadyAddresses)
			c.at = netip.AddrPortFrom(a, port)
			s.scratch = append(s.scratch, c)
		}
	}
}

// slicePort is the number that a slice has for a port of its service: the names are equal.
func slicePort(ports []discoveryv1.EndpointPort, x *corev1.ServicePort) (uint16, bool) {
	want, _ := protocolOf(x.Protocol)
	for i := range ports {
		p := &ports[i]
		name, protocol := "", corev1.ProtocolTCP
		if p.Name != nil {
			name = *p.Name
		}
		if p.Protocol != nil {
			protocol = *p.Protocol
		}
		have, ok := protocolOf(protocol)
		if ok && name == x.Name && have == want && p.Port != nil && *p.Port >= 1 && *p.Port <= 65535 {
			return uint16(*p.Port), true
		}
	}
	return 0, false
}

// endpointAddress refuses what would lead back into the gateway, as an API server does.
func endpointAddress(s string, v4 bool) (netip.Addr, string) {
	a, problem := parseAddr(s)
	switch {
	case problem != "":
		return a, problem
	case a.Is4() != v4:
		return a, quote(s) + " is not of the slice's addressType: put it into a slice of its family"
	case a.IsLoopback(), a.IsUnspecified(), a.IsMulticast(), a.IsLinkLocalUnicast():
		return a, quote(s) + " is loopback, link-local, multicast or unspecified, which no endpoint can have: write the pod's address"
	}
	return a, ""
}

func (s *serviceParser) candidate(ep *discoveryv1.Endpoint, publishNotReady bool) candidate {
	var c candidate
	cond := &ep.Conditions
	c.ready = cond.Ready == nil || *cond.Ready || publishNotReady
	serving := c.ready
	if cond.Serving != nil {
		serving = *cond.Serving
	}
	c.lastResort = serving && cond.Terminating != nil && *cond.Terminating
	c.local = ep.NodeName != nil && *ep.NodeName == s.p.opts.NodeName && s.p.opts.NodeName != ""
	if h := ep.Hints; h != nil {
		c.zoneHint, c.nodeHint = len(h.ForZones) > 0, len(h.ForNodes) > 0
		for _, z := range h.ForZones {
			c.forMyZone = c.forMyZone || z.Name == s.p.opts.Zone && s.p.opts.Zone != ""
		}
		for _, n := range h.ForNodes {
			c.forMyNode = c.forMyNode || n.Name == s.p.opts.NodeName && s.p.opts.NodeName != ""
		}
	}
	return c
}

// choose picks endpoints as kube-proxy does: the ready ones, by topology hints when all of
// them have some and any is meant for us; when none is ready, those that still serve while
// they terminate.
func choose(all []candidate, local bool) []netip.AddrPort {
	ready, zoneHints, nodeHints, myZone, myNode := 0, true, true, false, false
	for i := range all {
		c := &all[i]
		if !c.ready || local && !c.local {
			continue
		}
		ready++
		zoneHints, nodeHints = zoneHints && c.zoneHint, nodeHints && c.nodeHint
		myZone, myNode = myZone || c.forMyZone, myNode || c.forMyNode
	}
	byNode := !local && nodeHints && myNode
	byZone := !local && !byNode && zoneHints && myZone
	out := make([]netip.AddrPort, 0, len(all))
	for i := range all {
		c := &all[i]
		switch {
		case local && !c.local, ready > 0 && !c.ready, ready == 0 && !c.lastResort,
			ready > 0 && byNode && !c.forMyNode, ready > 0 && byZone && !c.forMyZone:
			continue
		}
		out = append(out, c.at)
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}
