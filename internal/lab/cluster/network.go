package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// buildNetwork makes the namespaces of the fabric, the router, the outside, the control
// plane and the nodes, with all links, addresses, routes and rules.
func (c *Cluster) buildNetwork(ctx context.Context) error {
	var err error
	for name, h := range map[string]**lab.Host{"control": &c.Control, "fabric": &c.Fabric, "router": &c.Router, "outside": &c.Outside} {
		if *h, err = c.addHost(name); err != nil {
			return err
		}
	}
	for _, m := range c.plan.nodes {
		h, err := c.addHost(m.name)
		if err != nil {
			return err
		}
		c.Nodes = append(c.Nodes, &Node{Host: h, cluster: c, address: m})
	}
	if err := c.buildFabric(); err != nil {
		return err
	}
	return errors.Join(c.antiSpoofing(ctx), c.translate(ctx))
}

func (c *Cluster) buildFabric() error {
	for s := range c.plan.subnets {
		if err := addBridge(c.Fabric, fabricBridge(s)); err != nil {
			return err
		}
	}
	if err := addBridge(c.Outside, outsideBridge); err != nil {
		return err
	}
	if err := c.routerUp(); err != nil {
		return err
	}
	if err := c.join(c.Control, c.plan.control); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := c.join(n.Host, n.address); err != nil {
			return err
		}
	}
	return nil
}

const outsideBridge = "br0"

func fabricBridge(subnet int) string { return "br" + strconv.Itoa(subnet) }

func addBridge(h *lab.Host, name string) error {
	return errors.Join(
		h.IP("link", "add", name, "type", "bridge", "mcast_snooping", "0"),
		h.IP("link", "set", name, "up"),
		// A switch, not a firewall: what crosses the bridge is not looked at again as IP.
		h.Sysctl("net/bridge/bridge-nf-call-iptables", "0"),
		h.Sysctl("net/bridge/bridge-nf-call-ip6tables", "0"),
		h.Sysctl("net/bridge/bridge-nf-call-arptables", "0"),
	)
}

// addHost makes a network namespace.
func (c *Cluster) addHost(name string) (*lab.Host, error) {
	h := &lab.Host{Name: name, Namespace: prefix(c.Name) + "-" + name}
	if err := run("ip", "netns", "add", h.Namespace); err != nil {
		return nil, err
	}
	return h, h.IP("link", "set", "lo", "up")
}

// plug joins a host to a bridge of another host.
func (c *Cluster) plug(h *lab.Host, link string, to *lab.Host, bridge, port string) error {
	mtu := strconv.Itoa(c.options.MTU)
	return errors.Join(
		h.IP("link", "add", link, "mtu", mtu, "type", "veth", "peer", "name", port, "netns", to.Namespace),
		to.IP("link", "set", port, "mtu", mtu, "master", bridge, "up"),
		// Before it has addresses: IPv6 ones that are set without a carrier answer late.
		h.Up(link, ""),
	)
}

// join connects a machine to the fabric, with addresses and routes.
func (c *Cluster) join(h *lab.Host, m machine) error {
	if err := c.plug(h, "eth0", c.Fabric, fabricBridge(m.subnet), m.name); err != nil {
		return err
	}
	if m.podCIDRs != nil {
		if err := nodeSysctls(h); err != nil {
			return err
		}
	}
	for i, a := range m.ips {
		if err := h.Up("eth0", netip.PrefixFrom(a, subnetBits[i]).String()); err != nil {
			return err
		}
		if err := h.IP("route", "add", "default", "via", inSubnet(m.subnet, 1)[i].String()); err != nil {
			return err
		}
	}
	return c.podRoutes(h, m)
}

// nodeSysctls are those of a node as distributions and clouds ship it: it forwards, and
// drops what comes from where it would not send to.
func nodeSysctls(h *lab.Host) error {
	var errs []error
	for _, path := range []string{
		"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv6/conf/default/forwarding",
		"net/ipv4/conf/all/rp_filter", "net/ipv4/conf/default/rp_filter", "net/ipv4/conf/eth0/rp_filter",
	} {
		errs = append(errs, h.Sysctl(path, "1"))
	}
	return errors.Join(errs...)
}

// podRoutes lead from a machine to the pods of every other node: straight to a node of
// the same subnet, else by the default route through the router.
func (c *Cluster) podRoutes(h *lab.Host, m machine) error {
	if c.options.CNI != Bridge {
		return nil
	}
	for _, other := range c.plan.nodes {
		if other.name == m.name || other.subnet != m.subnet {
			continue
		}
		if err := routePods(h, other); err != nil {
			return err
		}
	}
	return nil
}

func routePods(h *lab.Host, to machine) error {
	var errs []error
	for i, p := range to.podCIDRs {
		errs = append(errs, h.IP("route", "replace", p.String(), "via", to.ips[i].String()))
	}
	return errors.Join(errs...)
}

// routerUp gives the router a leg in each subnet and one outside, and the public
// addresses of the nodes.
func (c *Cluster) routerUp() error {
	for s := range c.plan.subnets {
		link := "eth" + strconv.Itoa(s)
		if err := c.plug(c.Router, link, c.Fabric, fabricBridge(s), "router"+strconv.Itoa(s)); err != nil {
			return err
		}
		for i, a := range inSubnet(s, 1) {
			if err := c.Router.Up(link, netip.PrefixFrom(a, subnetBits[i]).String()); err != nil {
				return err
			}
		}
	}
	if err := c.plug(c.Router, "out0", c.Outside, outsideBridge, "router"); err != nil {
		return err
	}
	for i, a := range RouterOutside {
		if err := c.Router.Up("out0", netip.PrefixFrom(a, OutsideCIDRs[i].Bits()).String()); err != nil {
			return err
		}
	}
	for _, m := range c.plan.nodes {
		for _, a := range m.external {
			if err := c.Router.Up("out0", netip.PrefixFrom(a, a.BitLen()).String()); err != nil {
				return err
			}
		}
		if c.options.CNI == Bridge {
			if err := routePods(c.Router, m); err != nil {
				return err
			}
		}
	}
	return errors.Join(
		c.Router.Sysctl("net/ipv4/ip_forward", "1"),
		c.Router.Sysctl("net/ipv6/conf/all/forwarding", "1"),
	)
}

// translate gives the router its NAT: each node's public addresses lead to the node and
// back, everything else shares the router's.
func (c *Cluster) translate(ctx context.Context) error {
	var to, from [2]strings.Builder
	for _, m := range c.plan.nodes {
		for i := range m.ips {
			fmt.Fprintf(&to[i], "%s : %s, ", m.external[i], m.ips[i])
			fmt.Fprintf(&from[i], "%s : %s, ", m.ips[i], m.external[i])
		}
	}
	var rules strings.Builder
	for i, family := range []string{"ip", "ip6"} {
		fmt.Fprintf(&rules, `table %[1]s nat {
	chain prerouting {
		type nat hook prerouting priority dstnat;
		iifname "out0" dnat to %[1]s daddr map { %[2]s }
	}
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname "out0" snat to %[1]s saddr map { %[3]s }
		oifname "out0" masquerade
	}
}
`, family, to[i].String(), from[i].String())
	}
	return nft(ctx, c.Router, rules.String())
}

// antiSpoofing lets each node's port of the fabric pass only what the node or its pods
// sent by their addresses, and counts the rest.
func (c *Cluster) antiSpoofing(ctx context.Context) error {
	verdict := "drop"
	if c.options.AllowSpoofing {
		verdict = "accept"
	}
	var rules strings.Builder
	rules.WriteString("table bridge antispoofing {\n")
	var ports strings.Builder
	for _, m := range c.plan.nodes {
		fmt.Fprintf(&ports, "\t\tiifname %q jump %s\n", m.name, m.name)
		fmt.Fprintf(&rules, `	counter %[1]s { }
	chain %[1]s {
		ip saddr { %[2]s, %[3]s } accept
		ip6 saddr { %[4]s, %[5]s, fe80::/10 } accept
		ip6 saddr :: meta l4proto ipv6-icmp accept
		arp saddr ip { 0.0.0.0, %[2]s, %[3]s } accept
		counter name %[1]q %[6]s
	}
`, m.name, m.ips[0], m.podCIDRs[0], m.ips[1], m.podCIDRs[1], verdict)
	}
	fmt.Fprintf(&rules, "\tchain prerouting {\n\t\ttype filter hook prerouting priority dstnat; policy accept;\n%s\t}\n}\n", ports.String())
	return nft(ctx, c.Fabric, rules.String())
}

func nft(ctx context.Context, h *lab.Host, rules string) error {
	cmd := h.Command(ctx, "nft", "-f", "-")
	var out strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(rules), &out, &out
	if err := h.Start(cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("nft -f in %s: %w: %s", h.Name, err, strings.TrimSpace(out.String()))
	}
	return nil
}

// Spoofed returns how many packets with a foreign source address a node has sent to the
// fabric so far; they were dropped, unless Options.AllowSpoofing.
func (c *Cluster) Spoofed(ctx context.Context, node string) (uint64, error) {
	out, err := c.Fabric.Output(ctx, "nft", "-j", "list", "counter", "bridge", "antispoofing", node)
	if err != nil {
		return 0, err
	}
	var reply struct {
		Nftables []struct {
			Counter *struct{ Packets uint64 }
		}
	}
	if err := json.Unmarshal([]byte(out), &reply); err != nil {
		return 0, fmt.Errorf("counter of %s: %w", node, err)
	}
	for _, o := range reply.Nftables {
		if o.Counter != nil {
			return o.Counter.Packets, nil
		}
	}
	return 0, fmt.Errorf("no counter of %s", node)
}

// OutsideHost makes a machine outside, with the given addresses of OutsideCIDRs (with
// their prefix lengths, say "198.18.1.1/15") on its link eth0. It reaches the nodes by their
// public addresses, and nothing else of the cluster. Its namespace is removed with the
// cluster.
func (c *Cluster) OutsideHost(name string, addrs ...string) (*lab.Host, error) {
	h, err := c.addHost(name)
	if err != nil {
		return nil, err
	}
	err = errors.Join(c.plug(h, "eth0", c.Outside, outsideBridge, "p-"+name), h.Up("eth0", strings.Join(addrs, " ")))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("outside host %s: %w", name, err), h.Remove())
	}
	return h, nil
}
