package operator

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Prefix lengths that a service range is taken to have when the cluster has no ServiceCIDR
// objects: those that are most common with the usual installers.
const (
	fallbackBits4 = 16
	fallbackBits6 = 112
)

// fallbackRanges are worked out seldom: the kubernetes Service's address never changes.
type fallbackRanges struct {
	at       time.Time
	prefixes []netip.Prefix
}

const fallbackFor = 10 * time.Minute

// ranges finds the cluster's ranges: pods from Node.spec.podCIDRs, services from
// ServiceCIDR objects, nodes from their InternalIPs.
func (o *Operator) ranges(ctx context.Context, s *snapshot) (model.ClusterRanges, error) {
	var found model.ClusterRanges
	for i := range s.nodes {
		n := model.ParseNode(&s.nodes[i])
		found.Pods = append(found.Pods, n.PodCIDRs...)
		for _, a := range n.Addresses {
			found.Nodes = append(found.Nodes, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	for _, c := range s.serviceCIDRs {
		if !c.DeletionTimestamp.IsZero() {
			continue
		}
		for _, text := range c.Spec.CIDRs {
			if p, err := netip.ParsePrefix(text); err == nil {
				found.Services = append(found.Services, p.Masked())
			}
		}
	}
	if len(found.Services) == 0 {
		var err error
		if found.Services, err = o.serviceRangesOf(ctx); err != nil {
			return found, err
		}
	}
	found.Pods, found.Services, found.Nodes = joined(found.Pods), joined(found.Services), joined(found.Nodes)
	return found, nil
}

// serviceRangesOf takes the ranges around the addresses of the kubernetes Service, which
// is the first of its range.
func (o *Operator) serviceRangesOf(ctx context.Context) ([]netip.Prefix, error) {
	if f := &o.fallback; len(f.prefixes) > 0 && o.Now().Sub(f.at) < fallbackFor {
		return f.prefixes, nil
	}
	var s corev1.Service
	if err := o.Live.Get(ctx, types.NamespacedName{Namespace: metav1.NamespaceDefault, Name: "kubernetes"}, &s); err != nil {
		return nil, fmt.Errorf("find the range of services: %w", err)
	}
	var out []netip.Prefix
	for _, text := range s.Spec.ClusterIPs {
		a, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		bits := fallbackBits4
		if a.Is6() {
			bits = fallbackBits6
		}
		if p, err := a.Prefix(bits); err == nil {
			out = append(out, p)
		}
	}
	o.fallback = fallbackRanges{o.Now(), out}
	return out, nil
}

// joined sorts ranges, leaves out those within others, and joins two halves to one: the
// result covers exactly the same addresses.
func joined(list []netip.Prefix) []netip.Prefix {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var out []netip.Prefix
	for _, p := range list {
		if n := len(out); n > 0 && out[n-1].Overlaps(p) {
			continue
		}
		out = append(out, p)
		for n := len(out); n > 1; n = len(out) {
			a, b := out[n-2], out[n-1]
			if a.Bits() != b.Bits() || a.Bits() == 0 || a.Addr().Is4() != b.Addr().Is4() {
				break
			}
			both := netip.PrefixFrom(a.Addr(), a.Bits()-1)
			if both.Masked() != both || !both.Contains(b.Addr()) {
				break
			}
			out = append(out[:n-2], both)
		}
	}
	slices.SortFunc(out, netstate.ComparePrefixes)
	return out
}

// dialAddress finds where the far sides reach a gateway.
func (r *round) dialAddress(g *gatewayState, o *v1alpha1.VPNGateway) {
	g.address, g.port = g.Address, g.WireGuardPort
	s := r.seen.services[model.ID{Namespace: g.Namespace, Name: serviceName(g.Gateway)}]
	switch v1alpha1.ExposeType(g.Expose.Type) {
	case v1alpha1.ExposeLoadBalancer:
		if g.address == "" && s != nil {
			for _, in := range s.Status.LoadBalancer.Ingress {
				if g.address = in.IP; g.address == "" {
					g.address = in.Hostname
				}
				if g.address != "" {
					break
				}
			}
		}
	case v1alpha1.ExposeNodePort:
		g.port = nodePort(s)
		if g.address == "" {
			g.address = r.nodeAddress(o.Status.Address, nil)
		}
	case v1alpha1.ExposeHostPort:
		if g.address == "" {
			g.address = r.nodeAddress("", activeNode(o))
		}
	}
}

// activeNode names the nodes that a gateway's pods run on, active ones first; never nil.
func activeNode(o *v1alpha1.VPNGateway) []string {
	names := []string{}
	for _, active := range []bool{true, false} {
		for _, e := range o.Status.Endpoints {
			if e.Active == active {
				names = append(names, e.Node)
			}
		}
	}
	return names
}

// nodeAddress is an address of a node that can be dialled: external rather than internal,
// IPv4 rather than IPv6, the one in use rather than another one. Nil names: any node, in
// the order of their names.
func (r *round) nodeAddress(inUse string, names []string) string {
	nodes := slices.Clone(r.seen.nodes)
	slices.SortFunc(nodes, func(a, b corev1.Node) int { return compareStrings(a.Name, b.Name) })
	var candidates []string
	for _, kind := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for i := range nodes {
			for _, a := range nodes[i].Status.Addresses {
				if a.Type == kind && (names == nil || slices.Contains(names[:min(1, len(names))], nodes[i].Name)) {
					candidates = append(candidates, a.Address)
				}
			}
		}
		if len(candidates) > 0 {
			break
		}
	}
	if slices.Contains(candidates, inUse) {
		return inUse
	}
	for _, c := range candidates {
		if a, err := netip.ParseAddr(c); err == nil && a.Is4() {
			return c
		}
	}
	if len(candidates) > 0 {
		return candidates[0]
	}
	return ""
}
