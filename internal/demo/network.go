package demo

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// The demo's addresses. "Public" ones are from the documentation ranges (RFC 5737).
const (
	gatewayPublic = "203.0.113.10" // where everybody dials
	osloPublic    = "198.51.100.22"
	berlinOutside = "198.51.100.10" // of the NAT router in front of Berlin
	berlinInside  = "192.168.50.2"  // of Berlin's strongSwan behind it

	web1, web2     = "10.244.1.10", "10.244.2.10"
	web1v6, web2v6 = "fd00:10:244:1::10", "fd00:10:244:2::10"
	node           = "172.20.0.5"
	berlinPC       = "10.10.0.5"
	osloPC         = "10.20.0.5"
	osloPCv6       = "fd00:20::5"
	phone          = "10.99.0.2"
	phoneV6        = "fd00:99::2"
	laptop         = "10.99.0.3"
	webService     = "10.96.0.80"
	webServiceV6   = "fd00:10:96::80"
	emptyService   = "10.96.0.99"
)

// network is the demo's hosts.
//
//	phone ───┐                                             ┌── web-1
//	laptop ──┤                                             │
//	berlin ── NAT ── internet ── gateway ── cluster fabric ─┼── web-2
//	oslo ────┘                                             └── node
type network struct {
	lab *lab.Lab

	internet, gateway, fabric, web1, web2, node *lab.Host
	berlinNAT, berlin, berlinPC, oslo, osloPC   *lab.Host
	phone, laptop                               *lab.Host
}

// build makes the hosts and plain connectivity: no tunnel yet.
func build(l *lab.Lab) (*network, error) {
	n := &network{lab: l}
	for name, h := range map[string]**lab.Host{
		"internet": &n.internet, "gateway": &n.gateway, "fabric": &n.fabric, "web-1": &n.web1, "web-2": &n.web2, "node": &n.node,
		"berlin-nat": &n.berlinNAT, "berlin": &n.berlin, "berlin-pc": &n.berlinPC, "oslo": &n.oslo, "oslo-pc": &n.osloPC,
		"phone": &n.phone, "laptop": &n.laptop,
	} {
		var err error
		if *h, err = l.Host(name); err != nil {
			return nil, err
		}
	}
	for _, f := range []func() error{n.forwarding, n.wires, n.routes, n.nat} {
		if err := f(); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *network) forwarding() error {
	for _, h := range []*lab.Host{n.internet, n.fabric, n.berlinNAT, n.berlin, n.oslo} {
		for _, path := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
			if err := h.Sysctl(path, "1"); err != nil {
				return err
			}
		}
	}
	return nil
}

// wire is one cable.
type wire struct {
	a            *lab.Host
	linkA, addrA string
	b            *lab.Host
	linkB, addrB string
}

func (n *network) wires() error {
	for _, w := range []wire{
		{n.internet, "gateway", "203.0.113.1/24", n.gateway, "public", gatewayPublic + "/24"},
		{n.internet, "berlin", "198.51.100.9/30", n.berlinNAT, "public", berlinOutside + "/30"},
		{n.internet, "oslo", "198.51.100.21/30", n.oslo, "public", osloPublic + "/30"},
		{n.internet, "phone", "198.51.100.29/30", n.phone, "eth0", "198.51.100.30/30"},
		{n.internet, "laptop", "198.51.100.33/30", n.laptop, "eth0", "198.51.100.34/30"},
		{n.berlinNAT, "lan", "192.168.50.1/24", n.berlin, "public", berlinInside + "/24"},
		{n.berlin, "lan", "10.10.0.1/24", n.berlinPC, "eth0", berlinPC + "/24"},
		{n.oslo, "lan", "10.20.0.1/24 fd00:20::1/64", n.osloPC, "eth0", osloPC + "/24 " + osloPCv6 + "/64"},
		{n.fabric, "gateway", "10.244.0.1/24 fd00:10:244::1/64", n.gateway, "eth0", "10.244.0.10/24 fd00:10:244::10/64"},
		{n.fabric, "web-1", "10.244.1.1/24 fd00:10:244:1::1/64", n.web1, "eth0", web1 + "/24 " + web1v6 + "/64"},
		{n.fabric, "web-2", "10.244.2.1/24 fd00:10:244:2::1/64", n.web2, "eth0", web2 + "/24 " + web2v6 + "/64"},
		{n.fabric, "node", "172.20.0.1/24", n.node, "eth0", node + "/24"},
	} {
		if err := n.lab.Connect(w.a, w.linkA, w.addrA, w.b, w.linkB, w.addrB); err != nil {
			return err
		}
	}
	return nil
}

// routes: everybody outside has the internet as default route; the cluster's fabric sends
// the ranges of sites and devices to the gateway, which is what culvert's agent does on
// the nodes of a real cluster.
func (n *network) routes() error {
	for _, r := range []struct {
		host *lab.Host
		args []string
	}{
		{n.gateway, []string{"route", "add", "default", "via", "203.0.113.1"}},
		{n.gateway, []string{"route", "add", "10.244.0.0/16", "via", "10.244.0.1"}},
		{n.gateway, []string{"route", "add", "172.20.0.0/24", "via", "10.244.0.1"}},
		{n.gateway, []string{"-6", "route", "add", "fd00:10:244::/48", "via", "fd00:10:244::1"}},
		{n.berlinNAT, []string{"route", "add", "default", "via", "198.51.100.9"}},
		{n.berlin, []string{"route", "add", "default", "via", "192.168.50.1"}},
		{n.berlinPC, []string{"route", "add", "default", "via", "10.10.0.1"}},
		{n.oslo, []string{"route", "add", "default", "via", "198.51.100.21"}},
		{n.osloPC, []string{"route", "add", "default", "via", "10.20.0.1"}},
		{n.osloPC, []string{"-6", "route", "add", "default", "via", "fd00:20::1"}},
		{n.phone, []string{"route", "add", "default", "via", "198.51.100.29"}},
		{n.laptop, []string{"route", "add", "default", "via", "198.51.100.33"}},
		{n.web1, []string{"route", "add", "default", "via", "10.244.1.1"}},
		{n.web1, []string{"-6", "route", "add", "default", "via", "fd00:10:244:1::1"}},
		{n.web2, []string{"route", "add", "default", "via", "10.244.2.1"}},
		{n.web2, []string{"-6", "route", "add", "default", "via", "fd00:10:244:2::1"}},
		{n.node, []string{"route", "add", "default", "via", "172.20.0.1"}},
		{n.fabric, []string{"route", "add", "10.10.0.0/24", "via", "10.244.0.10"}},
		{n.fabric, []string{"route", "add", "10.20.0.0/24", "via", "10.244.0.10"}},
		{n.fabric, []string{"route", "add", "10.99.0.0/24", "via", "10.244.0.10"}},
		{n.fabric, []string{"-6", "route", "add", "fd00:20::/64", "via", "fd00:10:244::10"}},
		{n.fabric, []string{"-6", "route", "add", "fd00:99::/64", "via", "fd00:10:244::10"}},
	} {
		if err := r.host.IP(r.args...); err != nil {
			return err
		}
	}
	return nil
}

// nat hides Berlin behind its router's address.
func (n *network) nat() error {
	_, err := n.berlinNAT.Output(context.Background(), "nft", `table ip nat {
		chain postrouting { type nat hook postrouting priority srcnat; oifname "public" masquerade; }
	}`)
	if err != nil {
		return fmt.Errorf("NAT router: %w", err)
	}
	return nil
}

// probes is the matrix: every direction that the jobs promise, and what must not exist.
func (n *network) probes() []probe {
	a := netip.MustParseAddr
	var none netip.Addr
	tcp := func(from *lab.Host, to, addr string, port uint16, seen netip.Addr) probe {
		return probe{From: from, FromName: from.Name, To: to, Network: "tcp", Address: a(addr), Port: port, Seen: seen}
	}
	udp := func(from *lab.Host, to, addr string, port uint16, seen netip.Addr) probe {
		return probe{From: from, FromName: from.Name, To: to, Network: "udp", Address: a(addr), Port: port, Seen: seen}
	}
	const pod = answerPort
	return []probe{
		tcp(n.berlinPC, "pod web-1", web1, pod, a(berlinPC)),
		tcp(n.berlinPC, "pod web-2", web2, pod, a(berlinPC)),
		tcp(n.berlinPC, "service web", webService, 80, a(berlinPC)),
		udp(n.berlinPC, "service web", webService, 80, a(berlinPC)),
		tcp(n.web1, "site berlin", berlinPC, pod, a(web1)),
		udp(n.web2, "site berlin", berlinPC, pod, a(web2)),
		tcp(n.osloPC, "pod web-1", web1, pod, a(osloPC)),
		tcp(n.osloPC, "pod web-2 (IPv6)", web2v6, pod, a(osloPCv6)),
		tcp(n.osloPC, "service web", webService, 80, a(osloPC)),
		udp(n.osloPC, "service web", webService, 80, a(osloPC)),
		tcp(n.osloPC, "service web (IPv6)", webServiceV6, 80, a(osloPCv6)),
		tcp(n.web2, "site oslo", osloPC, pod, a(web2)),
		tcp(n.web2, "site oslo (IPv6)", osloPCv6, pod, a(web2v6)),
		tcp(n.phone, "pod web-1", web1, pod, a(phone)),
		tcp(n.phone, "service web", webService, 80, a(phone)),
		udp(n.phone, "service web", webService, 80, a(phone)),
		tcp(n.phone, "service web (IPv6)", webServiceV6, 80, a(phoneV6)),
		tcp(n.web1, "device phone", phone, pod, a(web1)),
		udp(n.web1, "device laptop", laptop, pod, a(web1)),
		tcp(n.laptop, "site oslo (access: Sites)", osloPC, pod, a(laptop)),
		tcp(n.laptop, "node (access: Nodes)", node, pod, a(laptop)),

		tcp(n.phone, "site oslo (no access)", osloPC, pod, none),
		tcp(n.phone, "node (no access)", node, pod, none),
		tcp(n.phone, "device laptop", laptop, pod, none),
		tcp(n.osloPC, "device phone", phone, pod, none),
		tcp(n.osloPC, "site berlin", berlinPC, pod, none),
		tcp(n.berlinPC, "node (no access)", node, pod, none),
		tcp(n.phone, "service without backend", emptyService, 80, none),
		tcp(n.phone, "gateway itself", "10.244.0.10", 9586, none),
	}
}
