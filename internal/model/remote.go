package model

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

const (
	defaultHubReplicas    = 2
	defaultEncryptionPort = 51821
)

func (p *parser) remoteCluster(e entry) {
	o := e.Object.(*v1alpha1.RemoteCluster)
	s := &o.Spec
	r := p.report(e)
	switch o.Annotations[ReversedTunnelAnnotation] {
	case "", "true", "false":
	default:
		r.refuse("metadata.annotations["+ReversedTunnelAnnotation+"]", ReasonInvalidSpec, "%s is neither true nor false: write one of them, or take the annotation away", quote(o.Annotations[ReversedTunnelAnnotation]))
	}
	c := &RemoteCluster{ID: e.ref.ID, Generation: o.Generation, UID: p.identity(r, o), Replicas: defaultHubReplicas}
	if len(s.Targets) == 0 {
		r.refuse("spec.targets", ReasonInvalidSpec, "is empty: name what may be dialled in the remote cluster")
	}
	atMost(r, "spec.targets", len(s.Targets), 64)
	for i := range s.Targets {
		c.Targets = append(c.Targets, remoteTarget(r, "spec.targets["+strconv.Itoa(i)+"]", &s.Targets[i]))
	}
	atMost(r, "spec.exports", len(s.Exports), 32)
	for i := range s.Exports {
		c.Exports = append(c.Exports, remoteExport(r, "spec.exports["+strconv.Itoa(i)+"]", &s.Exports[i], c.Exports))
	}
	if n := s.Hub.Replicas; n != nil {
		c.Replicas = int(bounded(r, "spec.hub.replicas", *n, 1, 8, ""))
	}
	if a := s.Front.Address; a != "" {
		if _, problem := splitHostPort(string(a), false); problem != "" {
			r.refuse("spec.front.address", ReasonInvalidSpec, "%s", problem)
		}
		c.FrontHost = string(a)
	}
	if n := s.Front.ServerName; n != "" {
		if !isHostName(n) || strings.ToLower(n) != n || len(n) > 200 {
			r.refuse("spec.front.serverName", ReasonInvalidSpec, "%s is not a DNS name in lower case of at most 200 bytes: write one such as vpn.example.com", quote(n))
		}
		c.FrontName = n
	}
	if r.ok() {
		p.out.RemoteClusters = append(p.out.RemoteClusters, c)
	}
}

// IdentityAnnotation gives a RemoteCluster the UID of an earlier one, of which it is the
// successor: its authority was restored from a backup, and the remote side shall not notice.
const IdentityAnnotation = "culvert.dev/identity"

// ReversedTunnelAnnotation on a RemoteCluster says whether it has hubs: "true" or "false",
// whatever the feature gate of that name says.
const ReversedTunnelAnnotation = "culvert.dev/reversed-tunnel"

// longestIdentity leaves room for "h0-" in a label of a DNS name.
const longestIdentity = 60

// identity is the UID that certificates and server names hold. Nobody takes another one's:
// what an API server gave an object is its own, and else first come stays.
func (p *parser) identity(r *report, o *v1alpha1.RemoteCluster) string {
	const field = "metadata.annotations[" + IdentityAnnotation + "]"
	uid, asked := o.Annotations[IdentityAnnotation]
	if !asked || uid == string(o.UID) {
		return string(o.UID)
	}
	if !isDNSLabel(uid) || len(uid) > longestIdentity {
		r.refuse(field, ReasonInvalidSpec, "%s is not the UID of an object: write that of the RemoteCluster whose authority was restored", quote(uid))
	}
	for _, e := range p.remoteClusters {
		x := e.Object.(*v1alpha1.RemoteCluster)
		if x == o {
			break
		}
		if x.Annotations[IdentityAnnotation] == uid {
			r.refuse(field, ReasonDuplicate, "%s is the identity of %s already, which came first: every RemoteCluster needs one of its own", quote(uid), e.ref)
			return uid
		}
	}
	for _, e := range p.remoteClusters {
		if x := e.Object.(*v1alpha1.RemoteCluster); x != o && string(x.UID) == uid {
			r.refuse(field, ReasonDuplicate, "%s is the UID of %s: every RemoteCluster needs an identity of its own", quote(uid), e.ref)
			break
		}
	}
	return uid
}

func remoteTarget(r *report, field string, t *v1alpha1.RemoteTarget) Target {
	var out Target
	if len(t.CIDRs) == 0 && len(t.Names) == 0 {
		r.refuse(field, ReasonInvalidSpec, "has neither cidrs nor names: say what may be dialled")
	}
	atMost(r, field+".cidrs", len(t.CIDRs), 64)
	out.CIDRs = prefixes(r, field+".cidrs", t.CIDRs, false)
	atMost(r, field+".names", len(t.Names), 64)
	for i, n := range t.Names {
		at := field + ".names[" + strconv.Itoa(i) + "]"
		name := strings.ToLower(string(n))
		switch {
		case !isHostName(strings.TrimPrefix(name, "*.")):
			r.refuse(at, ReasonInvalidSpec, "%s is not a DNS name: write one such as api.example.com or *.example.com; addresses go into cidrs", quote(string(n)))
		case slices.Contains(out.Names, name):
			r.refuse(at, ReasonInvalidSpec, "%s is listed twice: leave one out", quote(string(n)))
		default:
			out.Names = append(out.Names, name)
		}
	}
	if len(t.Ports) == 0 {
		r.refuse(field+".ports", ReasonInvalidSpec, "is empty: name the TCP ports that may be dialled")
	}
	atMost(r, field+".ports", len(t.Ports), 64)
	for i, x := range t.Ports {
		at := field + ".ports[" + strconv.Itoa(i) + "]"
		pr := PortRange{First: port(r, at+".port", x.Port)}
		pr.Last = pr.First
		if x.EndPort != nil {
			pr.Last = port(r, at+".endPort", *x.EndPort)
			if *x.EndPort < x.Port {
				r.refuse(at+".endPort", ReasonInvalidSpec, "%d is less than port (%d): swap them", *x.EndPort, x.Port)
			}
		}
		out.Ports = append(out.Ports, pr)
	}
	return out
}

func remoteExport(r *report, field string, x *v1alpha1.RemoteExport, before []Export) Export {
	out := Export{Name: x.Name}
	if !isDNSLabel(x.Name) {
		r.refuse(field+".name", ReasonInvalidSpec, "%s is not a name: use lower-case letters, digits and '-', at most 63", quote(x.Name))
	}
	if slices.ContainsFunc(before, func(b Export) bool { return b.Name == x.Name }) {
		r.refuse(field+".name", ReasonDuplicate, "%s is the name of another export, too: rename one", quote(x.Name))
	}
	listen, problem := splitHostPort(string(x.Listen), true)
	addr, err := netip.ParseAddr(listen.Host)
	if problem == "" && err != nil {
		problem = quote(string(x.Listen)) + " has a DNS name: write the address to listen on, such as 127.0.0.1:8443"
	}
	if problem != "" {
		r.refuse(field+".listen", ReasonInvalidSpec, "%s", problem)
	}
	out.Listen = netip.AddrPortFrom(addr, listen.Port)
	if i := slices.IndexFunc(before, func(b Export) bool { return b.Listen == out.Listen }); i >= 0 && problem == "" {
		r.refuse(field+".listen", ReasonDuplicate, "%s is where export %s listens already: choose another port", out.Listen, quote(before[i].Name))
	}
	if _, problem := splitHostPort(string(x.Target), false); problem != "" {
		r.refuse(field+".target", ReasonInvalidSpec, "%s", problem)
	}
	out.Target = string(x.Target)
	return out
}

// ConditionEnforced is the condition of a NodeEncryption by which nodes know that plain
// packets are dropped in the cluster.
const ConditionEnforced = "Enforced"

// ConditionPodsHeld is the condition of a NodeTunnel that says whether pods wait for the guard
// when the node boots.
const ConditionPodsHeld = "PodsHeld"

const (
	defaultKeyLifetime  = 720 * time.Hour
	maxKeyLifetimeHours = 87600
)

func (p *parser) nodeEncryption() {
	for _, e := range p.nodeEncryptions {
		o := e.Object.(*v1alpha1.NodeEncryption)
		s := &o.Spec
		r := p.report(e)
		n := &NodeEncryption{ID: e.ref.ID, Generation: o.Generation, Port: defaultEncryptionPort, KeyLifetime: defaultKeyLifetime}
		if o.Name != v1alpha1.NodeEncryptionName {
			r.refuse("metadata.name", ReasonInvalidSpec, "%s: there is one NodeEncryption per cluster, and its name must be %q", quote(o.Name), v1alpha1.NodeEncryptionName)
		}
		n.AllTraffic = oneOf(r, "spec.scope", s.Scope, v1alpha1.ScopePods, v1alpha1.ScopePods, v1alpha1.ScopeAll) == v1alpha1.ScopeAll
		if s.Enforcement == "" {
			r.refuse("spec.enforcement", ReasonInvalidSpec, "is missing: write Permissive for the time of the roll-out, then Strict")
		}
		n.Strict = oneOf(r, "spec.enforcement", s.Enforcement, v1alpha1.EnforcementStrict, v1alpha1.EnforcementPermissive, v1alpha1.EnforcementStrict) == v1alpha1.EnforcementStrict
		if s.Port != 0 {
			n.Port = port(r, "spec.port", s.Port)
		}
		if h := s.KeyLifetimeHours; h != nil {
			if *h < 0 || *h > maxKeyLifetimeHours {
				r.refuse("spec.keyLifetimeHours", ReasonInvalidSpec, "%d: write 1 to %d, or 0 for keys that change only when asked to", *h, maxKeyLifetimeHours)
			}
			n.KeyLifetime = time.Duration(*h) * time.Hour
		}
		n.Enforced = meta.IsStatusConditionTrue(o.Status.Conditions, ConditionEnforced)
		if r.ok() {
			p.out.NodeEncryption = n
		}
	}
	keys := map[v1alpha1.Key]Ref{}
	for _, e := range p.nodeTunnels {
		o := e.Object.(*v1alpha1.NodeTunnel)
		r := p.report(e)
		k := wireGuardKey(r, "spec.publicKey", o.Spec.PublicKey)
		var next netstate.Key
		if o.Spec.NextPublicKey != "" {
			next = wireGuardKey(r, "spec.nextPublicKey", o.Spec.NextPublicKey)
			if other, ok := keys[o.Spec.NextPublicKey]; ok {
				r.refuse("spec.nextPublicKey", ReasonDuplicate, "%s is the public key of %s already, which came first: every node needs a key pair of its own", next, other)
			}
		}
		if other, ok := keys[o.Spec.PublicKey]; ok {
			r.refuse("spec.publicKey", ReasonDuplicate, "%s is the public key of %s already, which came first: every node needs a key pair of its own", k, other)
		}
		if !r.ok() {
			continue
		}
		keys[o.Spec.PublicKey] = e.ref
		if !next.IsZero() {
			keys[o.Spec.NextPublicKey] = e.ref
		}
		if p.out.NodeEncryption != nil {
			p.out.NodeEncryption.Nodes = append(p.out.NodeEncryption.Nodes, NodeTunnel{
				Name: o.Name, PublicKey: k, NextPublicKey: next, Ready: meta.IsStatusConditionTrue(o.Status.Conditions, "Ready"),
			})
		}
	}
	if n := p.out.NodeEncryption; n != nil {
		slices.SortFunc(n.Nodes, func(a, b NodeTunnel) int { return strings.Compare(a.Name, b.Name) })
	}
}
