package model

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// LinkAddressesAnnotation is the annotation of a Node in which its agent lists, separated by
// commas, the addresses for Node.LinkAddresses.
const LinkAddressesAnnotation = "culvert.dev/node-link-addresses"

// RotateAnnotation asks the agent of a NodeTunnel's node for a new key, whenever its value
// changes.
const RotateAnnotation = "culvert.dev/rotate-key"

// nodes reads the Nodes of the snapshot. An API server has checked them: what cannot be
// read is left out, without a word.
func (p *parser) nodes() {
	for _, e := range p.nodeEntries {
		p.out.Nodes = append(p.out.Nodes, ParseNode(e.Object.(*corev1.Node)))
	}
	slices.SortFunc(p.out.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
}

// ParseNode reads what matters of one Node.
func ParseNode(o *corev1.Node) Node {
	n := Node{Name: o.Name, Zone: o.Labels[corev1.LabelTopologyZone]}
	for _, a := range o.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if addr, err := netip.ParseAddr(a.Address); err == nil {
			n.Addresses = append(n.Addresses, addr.Unmap().WithZone(""))
		}
	}
	slices.SortFunc(n.Addresses, netip.Addr.Compare)
	n.Addresses = slices.Compact(n.Addresses)
	for _, a := range strings.Split(o.Annotations[LinkAddressesAnnotation], ",") {
		if addr, err := netip.ParseAddr(a); err == nil {
			n.LinkAddresses = append(n.LinkAddresses, addr.Unmap().WithZone(""))
		}
	}
	slices.SortFunc(n.LinkAddresses, netip.Addr.Compare)
	ranges := o.Spec.PodCIDRs
	if len(ranges) == 0 && o.Spec.PodCIDR != "" {
		ranges = []string{o.Spec.PodCIDR}
	}
	for _, r := range ranges {
		if c, err := netip.ParsePrefix(r); err == nil {
			n.PodCIDRs = append(n.PodCIDRs, c.Masked())
		}
	}
	slices.SortFunc(n.PodCIDRs, netstate.ComparePrefixes)
	return n
}
