package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Move gives a running node other addresses of its subnet, as a DHCP server may: on its link,
// in the routes of everybody to its pods, as a cloud does, and, by a kubelet that is started
// anew, in its Node, for which it waits, as for Cilium's agent, if there is one. Its public addresses lead nowhere meanwhile. The second time it moves
// back; a test must leave a node where it was.
func (n *Node) Move(ctx context.Context) error {
	c, m := n.cluster, &n.address
	old := m.ips
	m.ips, m.spare = m.spare, m.ips
	for i := range c.plan.nodes {
		if c.plan.nodes[i].name == m.name {
			c.plan.nodes[i] = *m
		}
	}
	if err := nft(ctx, c.Fabric, fmt.Sprintf("insert rule bridge antispoofing %[1]s ip saddr %[2]s accept\ninsert rule bridge antispoofing %[1]s ip6 saddr %[3]s accept\ninsert rule bridge antispoofing %[1]s arp saddr ip %[2]s accept\n",
		m.name, m.ips[0], m.ips[1])); err != nil {
		return err
	}
	for i, a := range old {
		if err := n.IP("addr", "del", netip.PrefixFrom(a, subnetBits[i]).String(), "dev", "eth0"); err != nil {
			return err
		}
		if err := n.Up("eth0", netip.PrefixFrom(m.ips[i], subnetBits[i]).String()); err != nil {
			return err
		}
		if err := n.IP("route", "replace", "default", "via", inSubnet(m.subnet, 1)[i].String()); err != nil {
			return err
		}
	}
	errs := []error{c.podRoutes(n.Host, *m)}
	if c.options.CNI == Bridge {
		errs = append(errs, routePods(c.Router, *m))
		if c.plan.control.subnet == m.subnet {
			errs = append(errs, routePods(c.Control, *m))
		}
		for _, o := range c.Nodes {
			if o != n && o.address.subnet == m.subnet {
				errs = append(errs, routePods(o.Host, *m))
			}
		}
	}
	args := slices.Clone(c.running[n.Name+"/kubelet"].Args)
	for i, a := range args {
		if strings.HasPrefix(a, "--node-ip=") {
			args[i] = "--node-ip=" + join(m.ips)
		}
	}
	if err := errors.Join(append(errs, c.StopProgram(n.Name, "kubelet"))...); err != nil {
		return err
	}
	if err := c.StartProgram(n.Name, "kubelet", args...); err != nil {
		return err
	}
	err := until(ctx, time.Minute, "the Node of "+n.Name+" has its new addresses", func() error {
		out, err := c.Kubectl(ctx, "get", "node", n.Name, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
		if err == nil && !strings.Contains(out, m.ips[0].String()) {
			err = fmt.Errorf("it has %s", out)
		}
		return err
	})
	if err != nil {
		return err
	}
	// Both learn their node's addresses when they start.
	if c.running[n.Name+"/kube-proxy"].Group != 0 {
		err = c.KillProgram(n.Name, "kube-proxy")
	}
	if c.options.CNI == Cilium {
		err = errors.Join(err, n.RestartCilium(ctx))
	}
	return err
}
