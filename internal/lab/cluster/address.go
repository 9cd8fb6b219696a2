package cluster

import (
	"fmt"
	"net/netip"
)

// The address plan. Both families everywhere; IPv4 first.
var (
	// PodCIDRs hold the pods of all nodes, ServiceCIDRs the services, DNS the service
	// addresses of CoreDNS.
	PodCIDRs     = prefixes("10.244.0.0/16", "fd00:244::/32")
	ServiceCIDRs = prefixes("10.96.0.0/16", "fd00:96::/112")
	DNS          = addresses("10.96.0.10", "fd00:96::a")
	// OutsideCIDRs are those of the networks outside (RFC 2544 and RFC 5180, for
	// benchmarks). The router and the public addresses of the nodes are in 198.18.0.0/24
	// and 2001:2::/112; the rest is for tests.
	OutsideCIDRs = prefixes("198.18.0.0/15", "2001:2::/48")
	// RouterOutside are the router's addresses outside, which what is no node shares.
	RouterOutside = addresses("198.18.0.1", "2001:2::1")
)

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

func addresses(texts ...string) []netip.Addr {
	var out []netip.Addr
	for _, t := range texts {
		out = append(out, netip.MustParseAddr(t))
	}
	return out
}

// machine is a place on the fabric.
type machine struct {
	name     string
	subnet   int
	ips      []netip.Addr
	spare    []netip.Addr   // of nodes: see Node.Move
	podCIDRs []netip.Prefix // of nodes
	external []netip.Addr   // of nodes
}

// plan is who has which address.
type plan struct {
	subnets int
	control machine
	nodes   []machine
}

func newPlan(o Options) plan {
	p := plan{subnets: 1, control: machine{name: "control", ips: inSubnet(0, 10)}}
	if o.TwoSubnets {
		p.subnets = 2
	}
	for i := 1; i <= o.Nodes; i++ {
		subnet := (i - 1) % p.subnets
		p.nodes = append(p.nodes, machine{
			name:     fmt.Sprintf("node%d", i),
			subnet:   subnet,
			ips:      inSubnet(subnet, 10+i),
			spare:    inSubnet(subnet, 110+i),
			podCIDRs: prefixes(fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:244:%d::/64", i)),
			external: addresses(fmt.Sprintf("198.18.0.%d", 10+i), fmt.Sprintf("2001:2::%d", 10+i)),
		})
	}
	return p
}

// inSubnet returns the addresses of host n (the digits of its IPv6 address read the
// same) in a subnet of the fabric.
func inSubnet(subnet, n int) []netip.Addr {
	return addresses(fmt.Sprintf("172.30.%d.%d", subnet, n), fmt.Sprintf("fd00:30:0:%d::%d", subnet, n))
}

// subnetBits are the lengths of the fabric's subnets.
var subnetBits = []int{24, 64}
