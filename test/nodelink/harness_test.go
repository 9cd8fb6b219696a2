package nodelink

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/nft"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/route"
)

// The addresses of the small cluster, as format strings of the node's number.
const (
	nodeAddr, nodeAddr6 = "172.30.0.1%d", "fd00:30::1%d"
	podNet, podNet6     = "10.244.%d.0/24", "fd00:244:%d::/64"
	podAddr, podAddr6   = "10.244.%d.7", "fd00:244:%d::7"
	gwAddr, gwAddr6     = "10.244.%d.5", "fd00:244:%d::5"
	siteIP, siteIP6     = "192.168.50.10", "fd00:50::10"
	siteNet, siteNet6   = "192.168.50.0/24", "fd00:50::/64"
)

// cluster is two nodes on a fabric, a pod on each, and a gateway pod with a site.
//
//	site ── gateway ── node 1 ── fabric ── node 2 ── pod 2
//	           pod 1 ──┘
//
// It is as unforgiving as a cloud: the fabric drops what has a source that is neither the
// node's nor its pods', the nodes check reverse paths strictly, and their CNI masquerades.
// The way between gateway and site is a plain wire in place of a tunnel.
type cluster struct {
	*labtest.Lab
	t        *testing.T
	fabric   *labtest.Host
	nodes    [3]*labtest.Host // by number, from 1
	pods     [3]*labtest.Host
	gateway  *labtest.Host
	site     *labtest.Host
	on       int  // the node that the gateway is on
	only6    bool // the gateway's pod has no IPv4 address, as far as anybody knows
	model    model.Model
	mtu      int
	appliers map[*labtest.Host]*applier
}

func newCluster(t *testing.T, mtu int) *cluster {
	t.Helper()
	labtest.Require(t, "nft")
	c := &cluster{Lab: labtest.New(t), t: t, mtu: mtu, appliers: map[*labtest.Host]*applier{}}
	c.fabric = c.Host("fabric")
	c.fabric.IP("link", "add", "br0", "type", "bridge")
	c.fabric.IP("link", "set", "br0", "up", "mtu", fmt.Sprint(mtu))
	for i := 1; i <= 2; i++ {
		c.node(i)
	}
	c.routesBetweenNodes()
	c.fabric.Run("nft", `table bridge antispoofing {
		chain forward { type filter hook forward priority 0;
			iifname "n1" ip saddr != { 172.30.0.11, 172.30.0.21, 10.244.1.0/24 } counter drop
			iifname "n2" ip saddr != { 172.30.0.12, 172.30.0.22, 10.244.2.0/24 } counter drop
			iifname "n1" ip6 saddr != { fe80::/10, fd00:30::11, fd00:30::21, fd00:244:1::/64 } counter drop
			iifname "n2" ip6 saddr != { fe80::/10, fd00:30::12, fd00:30::22, fd00:244:2::/64 } counter drop
		}
	}`)
	c.site = c.Host("site")
	c.objects()
	return c
}

func (c *cluster) node(i int) {
	n := c.Host(fmt.Sprintf("node-%d", i))
	c.nodes[i] = n
	router(n)
	n.Sysctl("net/ipv4/conf/all/rp_filter", "1")
	n.Sysctl("net/ipv4/conf/default/rp_filter", "1")
	c.Connect(c.fabric, fmt.Sprintf("n%d", i), "", n, "eth0", fmt.Sprintf(nodeAddr+"/24 "+nodeAddr6+"/64", i, i))
	c.fabric.IP("link", "set", fmt.Sprintf("n%d", i), "master", "br0", "mtu", fmt.Sprint(c.mtu))
	n.IP("link", "set", "eth0", "mtu", fmt.Sprint(c.mtu))
	n.IP("route", "add", "default", "via", "172.30.0.1")
	n.IP("-6", "route", "add", "default", "via", "fd00:30::1")
	n.IP("link", "add", "cni0", "address", fmt.Sprintf("02:00:00:00:0c:%02d", i), "type", "bridge")
	if err := n.Up("cni0", fmt.Sprintf("10.244.%d.1/24 fd00:244:%d::1/64", i, i)); err != nil {
		c.t.Fatal(err)
	}
	// What bridge, flannel and the like do, and a little more: everything between pods and
	// others is masqueraded.
	n.Run("nft", fmt.Sprintf(`table inet cni {
		chain postrouting { type nat hook postrouting priority srcnat;
			ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
			ip6 saddr fd00:244::/32 ip6 daddr != fd00:244::/32 masquerade
			ip saddr != { 10.244.0.0/16, 172.30.0.0/24 } ip daddr 10.244.%[1]d.0/24 masquerade
			ip6 saddr != { fd00:244::/32, fd00:30::/64 } ip6 daddr fd00:244:%[1]d::/64 masquerade
		}
	}`, i))
	c.pods[i] = c.pod(i, fmt.Sprintf("pod-%d", i), fmt.Sprintf(podAddr+"/24 "+podAddr6+"/64", i, i))
	answer(c.t, c.pods[i], fmt.Sprintf(podAddr, i), fmt.Sprintf(podAddr6, i))
	answer(c.t, n, fmt.Sprintf(nodeAddr, i), fmt.Sprintf(nodeAddr6, i))
}

// pod makes a pod on a node; its link has the MTU of the node's.
func (c *cluster) pod(i int, name, addrs string) *labtest.Host {
	p := c.Host(name)
	port := "v" + name
	c.Connect(c.nodes[i], port, "", p, "eth0", addrs)
	c.nodes[i].IP("link", "set", port, "master", "cni0", "mtu", fmt.Sprint(c.mtu))
	p.IP("link", "set", "eth0", "mtu", fmt.Sprint(c.mtu))
	p.IP("route", "add", "default", "via", fmt.Sprintf("10.244.%d.1", i))
	p.IP("-6", "route", "add", "default", "via", fmt.Sprintf("fd00:244:%d::1", i))
	return p
}

func (c *cluster) routesBetweenNodes() {
	for i := 1; i <= 2; i++ {
		o := 3 - i
		c.nodes[i].IP("route", "add", fmt.Sprintf(podNet, o), "via", fmt.Sprintf(nodeAddr, o))
		c.nodes[i].IP("-6", "route", "add", fmt.Sprintf(podNet6, o), "via", fmt.Sprintf(nodeAddr6, o))
	}
}

// placeGateway makes the gateway's pod on a node, as the CNI and the kubelet would, and
// wires the site to it. One that is elsewhere is gone from then on.
func (c *cluster) placeGateway(i int, name string) {
	c.t.Helper()
	c.on = i
	c.gateway = c.pod(i, name, fmt.Sprintf(gwAddr+"/24 "+gwAddr6+"/64", i, i))
	for _, s := range plan.GatewayPodSysctls() {
		c.gateway.Sysctl(s.Path, s.Value)
	}
	if err := c.site.Host.IP("link", "del", "eth0"); err != nil {
		c.t.Log("the wire to the site is the first one")
	}
	c.Connect(c.gateway, plan.WireGuardLink, "", c.site, "eth0", siteIP+"/24 "+siteIP6+"/64")
	// A tunnel has no neighbour discovery, which the gateway's firewall would drop.
	const mine, theirs = "02:00:00:00:00:01", "02:00:00:00:00:02"
	c.gateway.IP("link", "set", plan.WireGuardLink, "address", mine)
	c.site.IP("link", "set", "eth0", "address", theirs)
	c.gateway.IP("neigh", "replace", siteIP6, "lladdr", theirs, "dev", plan.WireGuardLink)
	c.site.IP("neigh", "replace", "fd00:99::1", "lladdr", mine, "dev", "eth0")
	c.site.IP("link", "set", "eth0", "mtu", "1420")
	for _, via := range []string{"10.99.0.1", "fd00:99::1"} {
		c.site.IP("route", "add", via, "dev", "eth0")
		c.site.IP("route", "add", "default", "via", via)
	}
}

// objects are the model of the cluster: one gateway with one site.
func (c *cluster) objects() {
	id := model.ID{Namespace: "vpn", Name: "edge"}
	c.model.Gateways = []*model.Gateway{{
		ID: id, Pods: prefixes("10.244.0.0/16", "fd00:244::/32"), ServiceRanges: prefixes("10.96.0.0/16"), Nodes: prefixes("172.30.0.0/24", "fd00:30::/64"),
		DeviceRanges: prefixes("10.99.0.0/24", "fd00:99::/64"), WireGuardPort: 51820, ServicesMode: netstate.ServicesTranslate, NodeLink: "Encapsulated",
		Sites: []*model.Site{{
			ID: model.ID{Namespace: "vpn", Name: "berlin"}, CIDRs: prefixes(siteNet, siteNet6), Access: netstate.AccessPods | netstate.AccessNodes,
			WireGuard: &model.WireGuardSite{PublicKey: netstate.Key{1}},
		}},
	}}
	for i := 1; i <= 2; i++ {
		c.model.Nodes = append(c.model.Nodes, model.Node{
			Name:      fmt.Sprintf("node-%d", i),
			Addresses: addrs(fmt.Sprintf(nodeAddr, i), fmt.Sprintf(nodeAddr6, i)), PodCIDRs: prefixes(fmt.Sprintf(podNet, i), fmt.Sprintf(podNet6, i)),
			LinkAddresses: addrs(fmt.Sprintf("10.244.%d.1", i), fmt.Sprintf("fd00:244:%d::1", i)),
		})
	}
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func (c *cluster) podIPs() []netip.Addr {
	if c.only6 {
		return addrs(fmt.Sprintf(gwAddr6, c.on))
	}
	return addrs(fmt.Sprintf(gwAddr, c.on), fmt.Sprintf(gwAddr6, c.on))
}

// nodePlan is what the agent of a node plans.
func (c *cluster) nodePlan(i int) plan.NodeResult {
	facts := plan.NodeFacts{
		Node: c.model.Nodes[i-1], UnderlayMTU: c.mtu, OnLink: map[netip.Addr]bool{},
		Pods: map[model.ID][]plan.GatewayPod{},
	}
	if c.on != 0 {
		facts.Pods[c.model.Gateways[0].ID] = []plan.GatewayPod{{
			Name: "edge-0", Node: fmt.Sprintf("node-%d", c.on), PodIPs: c.podIPs(), HostIPs: c.model.Nodes[c.on-1].Addresses, Active: true,
		}}
	}
	for _, n := range c.model.Nodes {
		for _, a := range n.Addresses {
			facts.OnLink[a] = true
		}
	}
	return plan.Node(&c.model, facts)
}

func (c *cluster) gatewayPlan() plan.Result {
	return plan.Gateway(c.model.Gateways[0], plan.Facts{
		Nodes: c.model.Nodes, NodeName: fmt.Sprintf("node-%d", c.on), PodIPs: c.podIPs(), UnderlayMTU: c.mtu,
	})
}

// apply brings gateway and nodes to what is planned.
func (c *cluster) apply() {
	c.t.Helper()
	c.applier(c.gateway).set(c.t, c.gatewayPlan().State)
	for i := 1; i <= 2; i++ {
		r := c.nodePlan(i)
		if len(r.Waiting) > 0 {
			c.t.Logf("node %d waits: %v", i, r.Waiting)
		}
		c.applier(c.nodes[i]).set(c.t, r.State)
	}
}

// applier holds the appliers of one host.
type applier struct {
	h     *labtest.Host
	route *route.Route
	nft   *nft.NFT
}

func (c *cluster) applier(h *labtest.Host) *applier {
	c.t.Helper()
	if a := c.appliers[h]; a != nil {
		return a
	}
	a := &applier{h: h}
	h.Do(func() (err error) {
		if a.route, err = route.New(route.Options{}); err != nil {
			return err
		}
		a.nft, err = nft.New(nft.Options{})
		return err
	})
	c.t.Cleanup(func() { _ = a.route.Detach() })
	c.appliers[h] = a
	return a
}

// set applies a state, and once more, which must change nothing.
func (a *applier) set(t *testing.T, s netstate.State) {
	t.Helper()
	if n := a.once(t, s); n == 0 {
		t.Logf("%s: nothing to do", a.h.Name)
	}
	if n := a.once(t, s); n != 0 {
		t.Errorf("%s: the second application made %d changes", a.h.Name, n)
	}
}

func (a *applier) once(t *testing.T, s netstate.State) (changed int) {
	t.Helper()
	ctx := context.Background()
	a.h.Do(func() error {
		n1, err1 := a.nft.SetFirewall(ctx, s.Firewall)
		n2, err2 := a.route.SetLinks(ctx, s.Links)
		n3, err3 := a.route.SetRoutes(ctx, s.Routes, s.Rules)
		changed = n1 + n2 + n3
		return errors.Join(err1, err2, err3)
	})
	return changed
}
