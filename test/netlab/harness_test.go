// Package netlab tests the real culvert program between network namespaces, with real
// peers: stock wg(8) with the distribution's wireguard-go, and an unmodified strongSwan.
//
// Every test builds its own small internet (newNetwork), starts "culvert gateway" on it
// as a supervisor would, edits manifests as a person would, and looks at packets.
package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// program is the culvert binary under test.
var program string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // every test skips
	}
	// test/kernel builds it on the host: inside an emulated machine that takes minutes.
	if program = os.Getenv("CULVERT_PROGRAM"); program != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "netlab")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program = filepath.Join(dir, "culvert")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // where nothing is compiled yet
	defer cancel()
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "../../cmd/culvert")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build culvert: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// The addresses of every network.
const (
	public   = "203.0.113.10" // of the gateway
	public6  = "2001:db8:113::10"
	fabricIP = "10.244.0.10" // of the gateway, in the cluster's network
	web1     = "10.244.1.10"
	web2     = "10.244.2.10"
	web1v6   = "fd00:10:244:1::10"
	web2v6   = "fd00:10:244:2::10"
	nodeIP   = "172.20.0.5"
	port     = 8080 // of all answerers
)

// inner are the ranges whose packets must never be seen outside a tunnel.
var inner = prefixes("10.244.0.0/16", "10.96.0.0/16", "10.99.0.0/16", "10.10.0.0/16", "10.20.0.0/16", "172.20.0.0/24",
	"fd00:10:244::/48", "fd00:10:96::/112", "fd00:99::/48", "fd00:10:10::/48", "fd00:20::/48")

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func within(a netip.Addr, list []netip.Prefix) bool {
	for _, p := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// network is a gateway between an internet and a cluster.
//
//	diallers ── internet ── gateway ── fabric ─┬── web-1
//	                                           ├── web-2
//	                                           └── node
type network struct {
	*labtest.Lab
	t   *testing.T
	mtu int // of the underlay's links

	internet, gateway, fabric, web1, web2, node *labtest.Host

	diallers int
	hosts    map[string]*labtest.Host // by the name of the site
}

// newNetwork builds the network; the answerers of pods and node run.
func newNetwork(t *testing.T) *network { return newNetworkMTU(t, 1500) }

func newNetworkMTU(t *testing.T, mtu int) *network {
	t.Helper()
	labtest.Require(t, "wg", "wireguard-go", "nft")
	n := &network{Lab: labtest.New(t), t: t, mtu: mtu}
	n.internet, n.gateway, n.fabric = n.Host("internet"), n.Host("gateway"), n.Host("fabric")
	n.web1, n.web2, n.node = n.Host("web-1"), n.Host("web-2"), n.Host("node")
	for _, h := range []*labtest.Host{n.internet, n.fabric} {
		router(h)
	}
	n.Connect(n.internet, "gateway", "203.0.113.1/24 2001:db8:113::1/64", n.gateway, "public", public+"/24 "+public6+"/64")
	n.underlay(n.internet, "gateway", n.gateway, "public")
	n.Connect(n.fabric, "gateway", "10.244.0.1/24 fd00:10:244::1/64", n.gateway, "eth0", fabricIP+"/24 fd00:10:244::10/64")
	n.Connect(n.fabric, "web-1", "10.244.1.1/24 fd00:10:244:1::1/64", n.web1, "eth0", web1+"/24 "+web1v6+"/64")
	n.Connect(n.fabric, "web-2", "10.244.2.1/24 fd00:10:244:2::1/64", n.web2, "eth0", web2+"/24 "+web2v6+"/64")
	n.Connect(n.fabric, "node", "172.20.0.1/24", n.node, "eth0", nodeIP+"/24")
	n.gateway.IP("route", "add", "default", "via", "203.0.113.1")
	n.gateway.IP("-6", "route", "add", "default", "via", "2001:db8:113::1")
	n.gateway.IP("route", "add", "10.244.0.0/16", "via", "10.244.0.1")
	n.gateway.IP("route", "add", "172.20.0.0/24", "via", "10.244.0.1")
	n.gateway.IP("-6", "route", "add", "fd00:10:244::/48", "via", "fd00:10:244::1")
	for h, via := range map[*labtest.Host][]string{
		n.web1: {"10.244.1.1", "fd00:10:244:1::1"}, n.web2: {"10.244.2.1", "fd00:10:244:2::1"}, n.node: {"172.20.0.1"},
	} {
		for _, v := range via {
			h.IP("route", "add", "default", "via", v)
		}
	}
	// What culvert's agent does on the nodes of a real cluster.
	n.behind("10.99.0.0/16", "fd00:99::/48", "10.10.0.0/16", "fd00:10:10::/48", "10.20.0.0/16", "fd00:20::/48")
	for h, addrs := range map[*labtest.Host][]string{n.web1: {web1, web1v6}, n.web2: {web2, web2v6}, n.node: {nodeIP}} {
		answer(t, h, addrs...)
	}
	return n
}

// router makes a host forward.
func router(h *labtest.Host) {
	h.Sysctl("net/ipv4/ip_forward", "1")
	h.Sysctl("net/ipv6/conf/all/forwarding", "1")
}

// underlay sets the underlay's MTU on a wire.
func (n *network) underlay(a *labtest.Host, linkA string, b *labtest.Host, linkB string) {
	if n.mtu == 1500 {
		return
	}
	a.IP("link", "set", linkA, "mtu", fmt.Sprint(n.mtu))
	b.IP("link", "set", linkB, "mtu", fmt.Sprint(n.mtu))
}

// behind routes ranges of sites and devices from the cluster to the gateway.
func (n *network) behind(ranges ...string) {
	n.t.Helper()
	for _, r := range ranges {
		via := "10.244.0.10"
		if netip.MustParsePrefix(r).Addr().Is6() {
			via = "fd00:10:244::10"
		}
		n.fabric.IP("route", "add", r, "via", via)
	}
}

// wire is how a dialling host hangs on the internet: the link is named as the host there,
// and "eth0" on the host.
type wire struct {
	host          *labtest.Host
	name          string // of the link there
	moves         int
	addr, addr6   string // the host's
	their, their6 string // the internet's
}

// dialler adds a host with a public address of its own.
func (n *network) dialler(name string) *wire {
	n.t.Helper()
	h := n.Host(name)
	w := &wire{host: h, name: name}
	w.number(n)
	n.Connect(n.internet, name, w.their+"/30 "+w.their6+"/64", h, "eth0", w.addr+"/30 "+w.addr6+"/64")
	n.underlay(n.internet, name, h, "eth0")
	h.IP("route", "add", "default", "via", w.their)
	h.IP("-6", "route", "add", "default", "via", w.their6)
	return w
}

// number takes the next addresses.
func (w *wire) number(n *network) {
	i := n.diallers
	n.diallers++
	w.their, w.addr = fmt.Sprintf("198.51.%d.%d", 100+i/60, i%60*4+1), fmt.Sprintf("198.51.%d.%d", 100+i/60, i%60*4+2)
	w.their6, w.addr6 = fmt.Sprintf("2001:db8:100:%x::1", i), fmt.Sprintf("2001:db8:100:%x::2", i)
}

// renumber gives the host other addresses, at once and without a word.
func (w *wire) renumber(n *network) {
	n.t.Helper()
	old := *w
	w.number(n)
	n.internet.IP("addr", "add", w.their+"/30", "dev", w.name)
	n.internet.IP("addr", "add", w.their6+"/64", "dev", w.name, "nodad")
	w.host.IP("addr", "add", w.addr+"/30", "dev", "eth0")
	w.host.IP("addr", "add", w.addr6+"/64", "dev", "eth0", "nodad")
	w.host.IP("route", "replace", "default", "via", w.their)
	w.host.IP("-6", "route", "replace", "default", "via", w.their6)
	w.host.IP("addr", "del", old.addr+"/30", "dev", "eth0")
	w.host.IP("addr", "del", old.addr6+"/64", "dev", "eth0")
	n.internet.IP("addr", "del", old.their+"/30", "dev", w.name)
	n.internet.IP("addr", "del", old.their6+"/64", "dev", w.name)
}

// move takes the host to another network: another link with other addresses.
func (w *wire) move(n *network) {
	n.t.Helper()
	old := fmt.Sprintf("eth%d", w.moves)
	w.moves++
	link := fmt.Sprintf("eth%d", w.moves)
	w.name += "m"
	w.number(n)
	n.Connect(n.internet, w.name, w.their+"/30 "+w.their6+"/64", w.host, link, w.addr+"/30 "+w.addr6+"/64")
	w.host.IP("link", "set", old, "down")
	w.host.IP("route", "replace", "default", "via", w.their)
	w.host.IP("-6", "route", "replace", "default", "via", w.their6)
}

// natted adds a NAT router with a host behind it.
func (n *network) natted(name string) (outside *wire, inside *labtest.Host) {
	n.t.Helper()
	outside = n.dialler(name + "-nat")
	router(outside.host)
	inside = n.Host(name)
	n.Connect(outside.host, "lan", "192.168.50.1/24", inside, "eth0", "192.168.50.2/24")
	n.underlay(outside.host, "lan", inside, "eth0")
	inside.IP("route", "add", "default", "via", "192.168.50.1")
	outside.host.Run("nft", `table ip nat {
		chain postrouting { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }
	}`)
	return outside, inside
}

// cluster routes the cluster's and the devices' ranges of a host into a link.
const clusterRanges = "10.244.0.0/16,10.96.0.0/16,172.20.0.0/24,10.99.0.0/16,10.10.0.0/16,10.20.0.0/16," +
	"fd00:10:244::/48,fd00:10:96::/112,fd00:99::/48,fd00:20::/48,fd00:10:10::/48"

func eventually(t testing.TB, timeout time.Duration, what string, f func() error) time.Duration {
	t.Helper()
	start := time.Now()
	labtest.Eventually(t, timeout, what, f)
	return time.Since(start)
}
