// Package encryption tests the encryption between the nodes of a cluster with real packets:
// namespaces as nodes, pods behind their bridges, WireGuard in between.
package encryption

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/guard"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/nft"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/route"
	"github.com/culvert-vpn/culvert/internal/secret"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

const (
	wgPort  = 51821
	apiPort = 6443
	service = "10.96.0.7" // leads to the pod on the last node
)

// cluster is some nodes on a fabric with a pod on each.
//
//	pod 1 ─ cni0 ─ node 1 ─┐
//	pod 2 ─ cni0 ─ node 2 ─┤ fabric
//	pod 3 ─ cni0 ─ node 3 ─┘
//
// The nodes check reverse paths strictly, as some distributions do.
type cluster struct {
	*labtest.Lab
	t         *testing.T
	fabric    *labtest.Host
	nodes     []*node
	model     model.Model
	podRanges []netip.Prefix
}

// node is one machine, and what an agent on it holds.
type node struct {
	*labtest.Host
	c     *cluster
	i     int // from 1
	port  string
	pod   *labtest.Host
	model model.Node
	key   wgtypes.Key
	file  string // of the guard

	route *route.Route
	nft   *nft.NFT
	guard *guard.Guard
	wg    *wireguard.WireGuard
	// enforced is what the facts say; more changes them.
	enforced bool
	more     func(*plan.NodeFacts)
}

func newCluster(t *testing.T, size int) *cluster {
	t.Helper()
	labtest.Require(t, "nft", "ping")
	c := &cluster{Lab: labtest.New(t), t: t, podRanges: prefixes("10.244.0.0/16", "fd00:244::/32")}
	c.model.NodeEncryption = &model.NodeEncryption{ID: model.ID{Name: "cluster"}, Strict: true, Port: wgPort}
	c.fabric = c.Host("fabric")
	c.fabric.IP("link", "add", "br0", "type", "bridge")
	c.fabric.IP("link", "set", "br0", "up")
	for i := 1; i <= size; i++ {
		c.addNode(i)
	}
	for _, n := range c.nodes {
		for _, o := range c.nodes {
			if n != o {
				n.wayTo(o)
			}
		}
		n.service()
	}
	return c
}

func (c *cluster) addNode(i int) *node {
	c.t.Helper()
	n := &node{Host: c.Host(fmt.Sprintf("node-%d", i)), c: c, i: i, port: fmt.Sprintf("n%d", i), enforced: true}
	n.file = filepath.Join(c.t.TempDir(), "guard.json")
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		c.t.Fatal(err)
	}
	n.key = key
	n.Sysctl("net/ipv4/ip_forward", "1")
	n.Sysctl("net/ipv6/conf/all/forwarding", "1")
	n.Sysctl("net/ipv4/conf/all/rp_filter", "1")
	n.Sysctl("net/ipv4/conf/default/rp_filter", "1")
	c.Connect(c.fabric, n.port, "", n.Host, "eth0", fmt.Sprintf("172.30.0.1%d/24 fd00:30::1%d/64", i, i))
	c.fabric.IP("link", "set", n.port, "master", "br0")
	n.IP("route", "add", "default", "via", "172.30.0.1")
	n.IP("-6", "route", "add", "default", "via", "fd00:30::1")
	n.IP("link", "add", "cni0", "address", fmt.Sprintf("02:00:00:00:0c:%02d", i), "type", "bridge")
	if err := n.Up("cni0", fmt.Sprintf("10.244.%d.1/24 fd00:244:%d::1/64", i, i)); err != nil {
		c.t.Fatal(err)
	}
	n.pod = c.Host(fmt.Sprintf("pod-%d", i))
	c.Connect(n.Host, "vpod", "", n.pod, "eth0", fmt.Sprintf("10.244.%d.7/24 fd00:244:%d::7/64", i, i))
	n.IP("link", "set", "vpod", "master", "cni0")
	n.pod.IP("route", "add", "default", "via", fmt.Sprintf("10.244.%d.1", i))
	n.pod.IP("-6", "route", "add", "default", "via", fmt.Sprintf("fd00:244:%d::1", i))
	n.model = model.Node{
		Name:      fmt.Sprintf("node-%d", i),
		Addresses: addrs(fmt.Sprintf("172.30.0.1%d", i), fmt.Sprintf("fd00:30::1%d", i)),
		PodCIDRs:  prefixes(fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:244:%d::/64", i)),
	}
	answer(c.t, n.pod, fmt.Sprintf("10.244.%d.7", i), fmt.Sprintf("fd00:244:%d::7", i))
	answer(c.t, n.Host, fmt.Sprintf("172.30.0.1%d", i), fmt.Sprintf("fd00:30::1%d", i))
	c.nodes = append(c.nodes, n)
	c.t.Cleanup(n.forget)
	c.publish(n)
	return n
}

// publish makes the node and its key known to all.
func (c *cluster) publish(n *node) {
	c.model.Nodes = append(c.model.Nodes, n.model)
	c.model.NodeEncryption.Nodes = append(c.model.NodeEncryption.Nodes, model.NodeTunnel{Name: n.model.Name, PublicKey: netstate.Key(n.key.PublicKey()), Ready: true})
}

// wayTo is the CNI's plain route to another node's pods.
func (n *node) wayTo(o *node) {
	n.IP("route", "add", fmt.Sprintf("10.244.%d.0/24", o.i), "via", fmt.Sprintf("172.30.0.1%d", o.i))
	n.IP("-6", "route", "add", fmt.Sprintf("fd00:244:%d::/64", o.i), "via", fmt.Sprintf("fd00:30::1%d", o.i))
}

// service does what kube-proxy does for one service and one node port.
func (n *node) service() {
	last := len(n.c.nodes)
	n.Run("nft", fmt.Sprintf(`table ip kube {
		chain prerouting { type nat hook prerouting priority dstnat;
			ip daddr %[1]s udp dport 53 dnat to 10.244.%[2]d.7:8080
			ip daddr %[1]s tcp dport 53 dnat to 10.244.%[2]d.7:8080
			fib daddr type local tcp dport 30080 meta mark set 0x4000 dnat to 10.244.%[2]d.7:8080
		}
		chain output { type nat hook output priority -100;
			ip daddr %[1]s tcp dport 53 meta mark set mark | 0x4000 dnat to 10.244.%[2]d.7:8080
			ip daddr 10.96.0.1 tcp dport 443 dnat to 172.30.0.11:%[3]d
		}
		chain postrouting { type nat hook postrouting priority srcnat;
			meta mark & 0x4000 == 0x4000 masquerade
		}
	}`, service, last, apiPort))
}

func (n *node) addr(family int) string { return n.model.Addresses[family].String() }
func (n *node) podAddr(family int) string {
	return []string{fmt.Sprintf("10.244.%d.7", n.i), fmt.Sprintf("fd00:244:%d::7", n.i)}[family]
}

// facts are what the node's agent knows.
func (n *node) facts() (plan.NodeFacts, error) {
	api := n.c.model.Nodes[0].Addresses[0]
	f := plan.NodeFacts{Node: n.model, Encryption: plan.EncryptionFacts{
		PrivateKey: secret.New(n.key[:]), PublicKey: netstate.Key(n.key.PublicKey()), Local: []string{"cni0"}, Enforced: n.enforced,
		Pods: n.c.podRanges, Alive: map[netstate.Key]bool{}, Met: map[netstate.Key]bool{},
		Exempt: []netstate.Exemption{
			{Name: "API server", Protocol: netstate.TCP, Address: api, Port: apiPort},
			{Name: "API server", Protocol: netstate.TCP, Address: netip.MustParseAddr("10.96.0.1"), Port: 443},
		},
	}}
	if n.wg != nil {
		list, _ := n.wg.Observe(context.Background()) // a device that somebody deleted: nobody has answered
		for _, d := range list {
			for _, p := range d.Peers {
				f.Encryption.Met[p.PublicKey] = !p.LastHandshake.IsZero()
				f.Encryption.Alive[p.PublicKey] = time.Since(p.LastHandshake) < 3*time.Minute
			}
		}
	}
	if n.more != nil {
		n.more(&f)
	}
	return f, nil
}

// open opens the appliers in the node's namespace.
func (n *node) open() error {
	if n.guard != nil {
		return nil
	}
	return n.inside(func() error {
		var errs [4]error
		n.route, errs[0] = route.New(route.Options{FollowedLink: netstate.EncryptionLink})
		n.nft, errs[1] = nft.New(nft.Options{})
		n.guard, errs[2] = guard.New(guard.Options{File: n.file})
		n.wg, errs[3] = wireguard.New(wireguard.Options{})
		return errors.Join(errs[:]...)
	})
}

// forget lets go of the appliers and leaves what they made, but for a device in user space.
func (n *node) forget() {
	if n.guard != nil {
		_ = n.route.Detach()
		_ = n.wg.Close()
	}
	n.route, n.nft, n.guard, n.wg = nil, nil, nil, nil
}

// inside runs f in the node's namespace.
func (n *node) inside(f func() error) error {
	if n.Host == nil { // a process of its own
		return f()
	}
	return n.Host.Host.Do(f)
}

// set brings the node to what is planned, as its agent does.
func (n *node) set() (changed int, err error) {
	if err := n.open(); err != nil {
		return 0, err
	}
	facts, err := n.facts()
	if err != nil {
		return 0, err
	}
	s := plan.Node(&n.c.model, facts).State
	ctx := context.Background()
	err = n.inside(func() error {
		var errs []error
		for _, set := range []func() (int, error){
			func() (int, error) {
				if s.Guard == nil {
					return 0, nil
				}
				return n.guard.Set(ctx, s.Guard)
			},
			func() (int, error) { return n.nft.SetFirewall(ctx, s.Firewall) },
			func() (int, error) { return n.route.SetSysctls(ctx, s.Sysctls) },
			func() (int, error) { return n.route.MoveForeign(ctx, netstate.EncryptionLink) },
			func() (int, error) { return n.wg.Set(ctx, s.WireGuard) },
			func() (int, error) { return n.route.SetLinks(ctx, s.Links) },
			func() (int, error) { return n.route.SetRoutes(ctx, s.Routes, s.Rules) },
			func() (int, error) {
				if s.Guard != nil {
					return 0, nil
				}
				return 0, n.guard.Remove(ctx)
			},
		} {
			c, err := set()
			changed += c
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	return changed, err
}

func (n *node) apply() (changed int) {
	n.c.t.Helper()
	changed, err := n.set()
	if err != nil {
		n.c.t.Fatalf("%s: %v", n.Name, err)
	}
	return changed
}

// observe reads the node's guard.
func (n *node) observe() (o guard.Observation, err error) {
	if err := n.open(); err != nil {
		return o, err
	}
	err = n.inside(func() error { o, err = n.guard.Observe(); return err })
	return o, err
}

// encrypt brings all nodes to what is planned; the second time changes nothing.
func (c *cluster) encrypt() {
	c.t.Helper()
	for _, n := range c.nodes {
		n.apply()
	}
	for _, n := range c.nodes {
		if changed := n.apply(); changed != 0 {
			c.t.Errorf("%s: the second application made %d changes", n.Name, changed)
		}
	}
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
