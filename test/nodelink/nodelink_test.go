package nodelink

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// start makes the cluster with the gateway on a node, and applies what is planned.
func start(t *testing.T, mtu, node int) *cluster {
	t.Helper()
	c := newCluster(t, mtu)
	c.placeGateway(node, "gateway")
	answer(t, c.site, siteIP, siteIP6)
	c.apply()
	return c
}

func TestBothWays(t *testing.T) {
	for _, mtu := range []int{1500, 1280} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			c := start(t, mtu, 1)
			c.bothWays()
			c.transfers()
			c.nothingSpoofed()
		})
	}
}

// bothWays sees that the site and the pods of both nodes reach each other, with their own
// addresses.
func (c *cluster) bothWays() {
	t := c.t
	t.Helper()
	for i := 1; i <= 2; i++ {
		for _, f := range []struct{ pod, site string }{{fmt.Sprintf(podAddr, i), siteIP}, {fmt.Sprintf(podAddr6, i), siteIP6}} {
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, c.site, network, f.pod, fmt.Sprintf("pod-%d %s", i, f.site))
				reaches(t, c.pods[i], network, f.site, "site "+f.pod)
			}
		}
	}
}

// transfers sends 10 MiB between the site and the pods, both ways, byte-exact.
func (c *cluster) transfers() {
	c.t.Helper()
	for i := 1; i <= 2; i++ {
		for _, to := range []string{fmt.Sprintf(podAddr, i), fmt.Sprintf(podAddr6, i)} {
			if err := transfer(c.site, to, 10<<20); err != nil {
				c.t.Errorf("10 MiB between site and %s: %v", to, err)
			}
		}
	}
}

// nothingSpoofed sees that the fabric had nothing to drop but what is sent on purpose.
func (c *cluster) nothingSpoofed() {
	c.t.Helper()
	count := func() int {
		n := 0
		for line := range strings.Lines(c.fabric.Run("nft", "list", "table", "bridge", "antispoofing")) {
			var packets int
			if _, after, ok := strings.Cut(line, "counter packets "); ok && strings.Contains(line, " ip saddr") {
				_, _ = fmt.Sscan(after, &packets)
				n += packets
			}
		}
		return n
	}
	if n := count(); n != 0 {
		c.t.Errorf("the fabric dropped %d IPv4 packets", n)
	}
	c.nodes[2].IP("addr", "add", siteIP+"/32", "dev", "lo")
	_, _ = c.nodes[2].Try("ping", "-c1", "-W1", "-I", siteIP, "172.30.0.11")
	c.nodes[2].IP("addr", "del", siteIP+"/32", "dev", "lo")
	if count() == 0 {
		c.t.Error("the fabric does not drop what is spoofed on purpose")
	}
}

// Nodes themselves, and so pods in the host's network, reach the site and are reached.
func TestHostNetwork(t *testing.T) {
	c := start(t, 1500, 1)
	for i := 1; i <= 2; i++ {
		for _, f := range []struct{ node, site string }{{fmt.Sprintf(nodeAddr, i), siteIP}, {fmt.Sprintf(nodeAddr6, i), siteIP6}} {
			reaches(t, c.site, "tcp", f.node, fmt.Sprintf("node-%d %s", i, f.site))
			reaches(t, c.nodes[i], "tcp", f.site, "site "+f.node)
		}
	}
}

// A node with a second address, which its kernel prefers as a source, is known by both.
func TestNodeWithTwoAddresses(t *testing.T) {
	c := newCluster(t, 1500)
	c.nodes[2].IP("addr", "add", "172.30.0.22/24", "dev", "eth0")
	c.nodes[2].IP("route", "change", "10.244.1.0/24", "via", "172.30.0.11", "src", "172.30.0.22")
	c.model.Nodes[1].Addresses = addrs("172.30.0.12", "172.30.0.22", "fd00:30::12")
	c.placeGateway(1, "gateway")
	answer(t, c.site, siteIP, siteIP6)
	c.apply()
	c.bothWays()
}

// When the gateway's pod is replaced by one on another node, the nodes follow; in between
// nothing leaves by another route.
func TestGatewayMoves(t *testing.T) {
	c := start(t, 1500, 1)
	c.bothWays()
	c.on = 0
	for i := 1; i <= 2; i++ {
		c.applier(c.nodes[i]).set(t, c.nodePlan(i).State)
		if _, err := who(c.pods[i], "tcp", siteIP, time.Second); err == nil || !strings.Contains(err.Error(), "unreachable") && !strings.Contains(err.Error(), "no route") {
			t.Errorf("pod-%d → site without a gateway: %v, want unreachable", i, err)
		}
	}
	if err := c.gateway.Host.IP("link", "del", "eth0"); err != nil {
		t.Fatal(err)
	}
	c.placeGateway(2, "moved")
	c.apply()
	c.bothWays()
}

// Without encapsulation, on a fabric that lets foreign addresses pass.
func TestDirect(t *testing.T) {
	c := newCluster(t, 1500)
	c.fabric.Run("nft", "delete", "table", "bridge", "antispoofing")
	c.model.Gateways[0].NodeLink = "Direct"
	c.placeGateway(1, "gateway")
	answer(t, c.site, siteIP, siteIP6)
	c.apply()
	c.bothWays()
	c.transfers()
	if err := c.nodes[2].Host.IP("link", "show", netstate.NodeLinkName); err == nil {
		t.Error("there is a VXLAN link")
	}
}

// A cluster of IPv6 only: VXLAN runs over it.
func TestOverIPv6(t *testing.T) {
	c := newCluster(t, 1500)
	v6 := func(list []netip.Addr) []netip.Addr { return slices.DeleteFunc(list, netip.Addr.Is4) }
	for i := range c.model.Nodes {
		n := &c.model.Nodes[i]
		n.Addresses, n.LinkAddresses, n.PodCIDRs = v6(n.Addresses), v6(n.LinkAddresses), n.PodCIDRs[1:]
	}
	gw := c.model.Gateways[0]
	gw.Pods, gw.Nodes = gw.Pods[1:], gw.Nodes[1:]
	c.only6 = true
	c.placeGateway(1, "gateway")
	answer(t, c.site, siteIP6)
	c.apply()
	for i := 1; i <= 2; i++ {
		pod := fmt.Sprintf(podAddr6, i)
		reaches(t, c.site, "tcp", pod, fmt.Sprintf("pod-%d %s", i, siteIP6))
		reaches(t, c.pods[i], "tcp", siteIP6, "site "+pod)
		if err := transfer(c.site, pod, 10<<20); err != nil {
			t.Errorf("10 MiB between site and %s: %v", pod, err)
		}
	}
}

// What arrives over the link is looked at twice: who sent it, and whose address it has.
func TestGuard(t *testing.T) {
	c := start(t, 1500, 1)
	// A pod that speaks VXLAN to a node poses as the gateway.
	forger := c.pod(2, "forger", "10.244.2.9/24 fd00:244:2::9/64")
	forger.IP("link", "add", "cvtnodes", "type", "vxlan", "id", "3095", "dstport", "19604", "nolearning")
	forger.IP("link", "set", "cvtnodes", "up", "address", "02:c7:0a:f4:01:05")
	forger.IP("addr", "add", "192.168.50.66/32", "dev", "cvtnodes")
	forge := func(node string, mac string) {
		forger.Run("bridge", "fdb", "replace", mac, "dev", "cvtnodes", "dst", node, "self", "permanent")
		forger.IP("neigh", "replace", "10.244.2.7", "lladdr", mac, "dev", "cvtnodes", "nud", "permanent")
		forger.IP("route", "replace", "10.244.2.7/32", "dev", "cvtnodes", "src", "192.168.50.66")
	}
	got := listenUDP(t, c.pods[2], "10.244.2.7:9999")
	send := func() {
		if conn, err := dialFrom(forger, "192.168.50.66", "10.244.2.7:9999"); err == nil {
			_, _ = conn.Write([]byte("forged"))
			_ = conn.Close()
		}
	}
	forge("172.30.0.12", "02:c7:ac:1e:00:0c")
	send()
	if text := got(500 * time.Millisecond); text != "" {
		t.Errorf("a pod gets %q from a pod that poses as the gateway", text)
	}
	// The same from the gateway arrives; from the gateway with a pod's address it does not
	// (over IPv6, where no reverse-path check stands beside the guard).
	g := c.gateway
	g.IP("addr", "add", "fd00:50::66/128", "dev", "lo")
	g.IP("addr", "add", "fd00:244:1::77/128", "dev", "lo")
	g.IP("route", "replace", "fd00:244:2::7/128", "via", "fe80::ac1e:c", "dev", "cvtnodes", "onlink")
	reaches(t, c.site, "tcp", "fd00:244:2::7", "pod-2 "+siteIP6)
	got = listenUDP(t, c.pods[2], "[fd00:244:2::7]:9999")
	for from, want := range map[string]string{"fd00:50::66": "from fd00:50::66", "fd00:244:1::77": ""} {
		conn, err := dialFrom(g, from, "[fd00:244:2::7]:9999")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("from " + from))
		_ = conn.Close()
		if text := got(500 * time.Millisecond); text != want {
			t.Errorf("from %s a pod gets %q, want %q", from, text, want)
		}
	}
}

// Nobody's rules and routes but ours are touched, and all of ours go.
func TestNothingForeignIsTouched(t *testing.T) {
	c := newCluster(t, 1500)
	state := func() string {
		// Without the IPv6 routes that come on the kernel's own schedule.
		return c.nodes[1].Run("sh", "-c", "ip -d -br link | sort; ip rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all | grep -v -e ff00 -e fe80 -e 'table local proto kernel'; nft list ruleset | sed 's/packets [0-9]* bytes [0-9]*//'")
	}
	c.placeGateway(1, "gateway")
	before := state()
	c.apply()
	if state() == before {
		t.Error("nothing was done")
	}
	a := c.applier(c.nodes[1])
	a.h.Do(func() error {
		if err := a.route.Close(); err != nil {
			return err
		}
		return a.nft.Close()
	})
	if after := state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Ranges that are the cluster's own are never led out of it, whatever a Site says.
func TestOwnRangesStay(t *testing.T) {
	c := newCluster(t, 1500)
	c.placeGateway(1, "gateway")
	c.model.Gateways[0].Sites = append(c.model.Gateways[0].Sites, &model.Site{
		ID: model.ID{Namespace: "vpn", Name: "rogue"}, CIDRs: prefixes("10.244.2.0/25", "172.30.0.12/32"), WireGuard: &model.WireGuardSite{PublicKey: netstate.Key{2}},
	})
	r := c.nodePlan(1)
	for _, x := range r.State.Routes {
		if netip.MustParsePrefix("10.244.0.0/16").Overlaps(x.Destination) || x.Destination.Contains(netip.MustParseAddr("172.30.0.12")) {
			t.Errorf("the node routes %s", x.Destination)
		}
	}
	if r.Waiting["gateway vpn/edge"] == "" {
		t.Error("nothing is said about it")
	}
}

// listenUDP listens on a host and returns what the next packet holds, or "" after a time.
func listenUDP(t *testing.T, h *labtest.Host, addr string) func(time.Duration) string {
	t.Helper()
	var conn net.PacketConn
	h.Do(func() (err error) { conn, err = net.ListenPacket("udp", addr); return err })
	t.Cleanup(func() { _ = conn.Close() })
	return func(d time.Duration) string {
		buf := make([]byte, 256)
		_ = conn.SetReadDeadline(time.Now().Add(d))
		n, _, _ := conn.ReadFrom(buf)
		return string(buf[:n])
	}
}

func dialFrom(h *labtest.Host, from, to string) (conn net.Conn, err error) {
	d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
	err = h.Host.Do(func() error { conn, err = d.Dial("udp", to); return err })
	return conn, err
}
