package model

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Reasons of problems; they are the reasons of conditions, too.
const (
	ReasonInvalidManifest   = "InvalidManifest"   // the text is not a manifest
	ReasonUnknownField      = "UnknownField"      // a field that the kind does not have
	ReasonInvalidSpec       = "InvalidSpec"       // a value that can never work
	ReasonWeakAlgorithm     = "WeakAlgorithm"     // not listed in allowWeak
	ReasonReservedRange     = "ReservedRange"     // a range that nobody may have
	ReasonOverlap           = "Overlap"           // a range or address that somebody has
	ReasonDuplicate         = "Duplicate"         // a name, key or identity that somebody has
	ReasonNotAllowed        = "NotAllowed"        // the gateway's owner does not allow it
	ReasonMissingReference  = "MissingReference"  // a VPNGateway that is not there
	ReasonGatewayNotInForce = "GatewayNotInForce" // a VPNGateway that is refused itself
	ReasonSecretNotFound    = "SecretNotFound"    // a Secret, or a key of one, that is not there
	ReasonInvalidSecret     = "InvalidSecret"     // a Secret whose content cannot be used
	ReasonIgnored           = "Ignored"           // an object of a kind that is not ours: no error
	ReasonHandedBack        = "HandedBack"        // said by the operator for a while, and now for a gateway's pods to say
)

// ParseOptions is what Parse must know beyond the objects. The zero value is right for a
// standalone gateway.
type ParseOptions struct {
	// NodeName and Zone are where the traffic comes out: endpoints of services with
	// internalTrafficPolicy: Local and topology hints are chosen by them. Empty: unknown;
	// then hints are not followed, and Local services have no endpoint.
	NodeName, Zone string
	// APIServers are addresses that no site or device may have.
	APIServers []netip.Addr
	// Found are the cluster's ranges, for gateways whose spec leaves them out.
	Found ClusterRanges
	// InEffect names objects that are in effect just as they stand in the snapshot. They
	// came before every other one, so that a changed object never takes away what another
	// one has.
	InEffect map[Ref]bool
	// Memory, unless nil, is of the Parse before, and is left for the next one.
	Memory *Memory
	// SecretsElsewhere says that the snapshot has no Secrets and that references to them
	// are taken as good: the operator reads none. What is accepted then lacks its key
	// material.
	SecretsElsewhere bool
	// Complete says that a reference to what is not in the snapshot is an error for good,
	// instead of Pending.
	Complete bool
}

// ClusterRanges are the ranges of a cluster.
type ClusterRanges struct{ Pods, Services, Nodes []netip.Prefix }

// Parse reads a snapshot. It never fails: what cannot be used is left out of the model and
// named in its Problems. Objects are not changed, and the model shares no memory with them
// that anybody may change.
//
// Where objects contradict each other the first one stays and the later one is refused:
// ParseOptions.InEffect decides, then creationTimestamp, then the order in the snapshot
// (objects with an origin) or the name.
func Parse(objects Objects, opts ParseOptions) *Model {
	if m := opts.Memory.Changed(objects, opts); m != nil {
		return m
	}
	p := &parser{opts: opts, out: &Model{}}
	p.index(objects)
	for _, g := range p.gateways {
		p.gateway(g)
	}
	for _, s := range p.sites {
		p.site(s)
	}
	for _, d := range p.devices {
		p.device(d)
	}
	for _, r := range p.remoteClusters {
		p.remoteCluster(r)
	}
	p.nodeEncryption()
	p.nodes()
	p.services()
	p.finish()
	opts.Memory.note(objects, opts, p.out)
	opts.Memory.attach(p)
	return p.out
}

// parser carries what the parts of one Parse share.
type parser struct {
	opts ParseOptions
	out  *Model

	// Objects by kind, first come first.
	gateways, sites, devices, remoteClusters []entry
	nodeEncryptions, nodeTunnels             []entry
	serviceEntries, sliceEntries             []entry
	nodeEntries                              []entry
	secrets                                  map[ID]*corev1.Secret

	attachments map[ID]*attachments // by accepted gateway
	refused     map[ID]bool         // refused gateways
	problems    []located
}

// entry is one object of ours and its place in the snapshot.
type entry struct {
	Decoded
	ref      Ref
	position int
	inEffect bool
}

// located is a problem and the place of its object.
type located struct {
	Problem
	position int
}

// attachments is what the sites and devices of one gateway must not share.
type attachments struct {
	gateway    *Gateway
	spec       *v1alpha1.VPNGatewaySpec
	ranges     rangeSet
	addresses  map[netip.Addr]string   // devices' wishes
	keys       map[netstate.Key]string // WireGuard public keys
	identities map[string]string       // of IPsec peers
}

func (p *parser) index(objects Objects) {
	p.attachments, p.refused = map[ID]*attachments{}, map[ID]bool{}
	p.secrets = map[ID]*corev1.Secret{}
	first := make(map[Ref]int, len(objects.list))
	for i, d := range objects.list {
		ref := d.Ref()
		e := entry{Decoded: d, ref: ref, position: i, inEffect: p.opts.InEffect[ref]}
		if j, dup := first[e.ref]; dup {
			r := p.report(e)
			r.refuse("metadata.name", ReasonDuplicate, "there are two objects of this name%s: rename one of them, or remove it", at(objects.list[j].Origin))
			continue
		}
		first[e.ref] = i
		if o, ok := d.Object.(*corev1.Secret); ok {
			p.secrets[e.ref.ID] = o
			continue
		}
		if !p.named(e) {
			if e.ref.Kind == KindGateway {
				p.refused[e.ref.ID] = true
			}
			continue
		}
		switch e.ref.Kind {
		case KindGateway:
			p.gateways = append(p.gateways, e)
		case KindSite:
			p.sites = append(p.sites, e)
		case KindDevice:
			p.devices = append(p.devices, e)
		case KindRemoteCluster:
			p.remoteClusters = append(p.remoteClusters, e)
		case KindNodeEncryption:
			p.nodeEncryptions = append(p.nodeEncryptions, e)
		case KindNodeTunnel:
			p.nodeTunnels = append(p.nodeTunnels, e)
		case KindService:
			p.serviceEntries = append(p.serviceEntries, e)
		case KindEndpointSlice:
			p.sliceEntries = append(p.sliceEntries, e)
		case KindNode:
			p.nodeEntries = append(p.nodeEntries, e)
		}
	}
	for _, list := range [][]entry{p.gateways, p.sites, p.devices, p.remoteClusters, p.nodeEncryptions, p.nodeTunnels} {
		slices.SortStableFunc(list, p.compare)
	}
}

// compare puts first what came first.
func (p *parser) compare(a, b entry) int {
	ca, cb := a.Object.GetCreationTimestamp(), b.Object.GetCreationTimestamp()
	if c := boolCompare(b.inEffect, a.inEffect); c != 0 {
		return c
	}
	if c := boolCompare(ca.IsZero(), cb.IsZero()); c != 0 { // without a time: new
		return c
	}
	if c := ca.Compare(cb.Time); c != 0 {
		return c
	}
	if c := boolCompare(a.Origin != "", b.Origin != ""); c != 0 {
		return c
	}
	if a.Origin != "" {
		return cmp.Compare(a.position, b.position)
	}
	return compareIDs(a.ref.ID, b.ref.ID)
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func compareIDs(a, b ID) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// named checks the name, which goes into names of links, files and connections.
func (p *parser) named(e entry) bool {
	if isDNSName(e.ref.ID.Name) && isDNSLabel(e.ref.ID.Namespace) {
		return true
	}
	r := p.report(e)
	if name := e.Object.GetName(); !isDNSName(name) {
		r.refuse("metadata.name", ReasonInvalidSpec, "%s is not a name: use lower-case letters, digits, '-' and '.', at most 253", quote(name))
	}
	if ns := e.Object.GetNamespace(); e.ref.ID.Namespace == "" && ns != "" {
		r.refuse("metadata.namespace", ReasonInvalidSpec, "a %s belongs to no namespace: leave the field out", e.ref.Kind)
	} else if ns != "" && !isDNSLabel(ns) {
		r.refuse("metadata.namespace", ReasonInvalidSpec, "%s is not the name of a namespace: use lower-case letters, digits and '-', at most 63", quote(ns))
	}
	return r.ok()
}

// finish sorts the results.
func (p *parser) finish() {
	slices.SortFunc(p.out.Gateways, func(a, b *Gateway) int { return compareIDs(a.ID, b.ID) })
	for _, g := range p.out.Gateways {
		slices.SortFunc(g.Sites, func(a, b *Site) int { return compareIDs(a.ID, b.ID) })
		slices.SortFunc(g.Devices, func(a, b *Device) int { return compareIDs(a.ID, b.ID) })
	}
	slices.SortFunc(p.out.RemoteClusters, func(a, b *RemoteCluster) int { return compareIDs(a.ID, b.ID) })
	slices.SortStableFunc(p.problems, func(a, b located) int { return cmp.Compare(a.position, b.position) })
	for _, l := range p.problems {
		p.out.Problems = append(p.out.Problems, l.Problem)
	}
}

// report collects the problems of one object.
type report struct {
	p      *parser
	e      entry
	failed bool
}

func (p *parser) report(e entry) *report { return &report{p: p, e: e} }

// ok reports whether nothing was refused so far.
func (r *report) ok() bool { return !r.failed }

// refuse says that the object cannot be used: the message says in one line what is wrong,
// why, and what to do.
func (r *report) refuse(field, reason, format string, args ...any) {
	r.add(field, reason, false, format, args...)
}

// await is refuse for what ends by itself when something else comes.
func (r *report) await(field, reason, format string, args ...any) {
	r.add(field, reason, !r.p.opts.Complete, format, args...)
}

func (r *report) add(field, reason string, pending bool, format string, args ...any) {
	r.failed = true
	r.p.problems = append(r.p.problems, located{Problem{
		Kind: r.e.ref.Kind, Object: ID{oneLine(r.e.ref.ID.Namespace), oneLine(r.e.ref.ID.Name)}, Origin: r.e.Origin,
		Field: field, Reason: reason, Message: oneLine(fmt.Sprintf(format, args...)), Pending: pending,
	}, r.e.position})
}

// prefixes reads a list of ranges that must be routable and not contain each other.
func prefixes[T ~string](r *report, field string, list []T, routed bool) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(list))
	for i, s := range list {
		at := field + "[" + strconv.Itoa(i) + "]"
		p, problem := parsePrefix(string(s))
		if problem != "" {
			r.refuse(at, ReasonInvalidSpec, "%s", problem)
			continue
		}
		if why := RefuseRange(p); routed && why != "" {
			r.refuse(at, ReasonReservedRange, "%s %s, which is never routed through a gateway: name the ranges that really are there", p, why)
			continue
		}
		if j := slices.IndexFunc(out, p.Overlaps); j >= 0 {
			r.refuse(at, ReasonOverlap, "%s %s %s of the same list: leave one of them out", p, relation(p, out[j]), out[j])
			continue
		}
		out = append(out, p)
	}
	slices.SortFunc(out, netstate.ComparePrefixes)
	return out
}

// at is " (at site.yaml:12)", or nothing for objects from an API server.
func at(origin string) string {
	if origin == "" {
		return ""
	}
	return " (the other one is at " + origin + ")"
}
