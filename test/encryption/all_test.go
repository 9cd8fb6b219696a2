package encryption

import (
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// apiServer serves on the first node where the API server would.
func (c *cluster) apiServer() {
	serve(c.t, c.nodes[0].Host, net.JoinHostPort(c.nodes[0].addr(0), fmt.Sprint(apiPort)), nil)
}

// apiPaths are those that must work without a key: each host to the API server, by its
// address and by the service's.
func (c *cluster) apiPaths() []path {
	var out []path
	for _, n := range c.nodes[1:] {
		for _, at := range []string{net.JoinHostPort(c.nodes[0].addr(0), fmt.Sprint(apiPort)), "10.96.0.1:443"} {
			out = append(out, path{n.Host, "tcp", at, c.nodes[0].Name + " " + n.addr(0)})
		}
	}
	return out
}

// Scope All: what hosts say to each other is encrypted as well; TLS to the API server is
// not, so that it works without any key.
func TestAll(t *testing.T) {
	c := newCluster(t, 3)
	c.model.NodeEncryption.AllTraffic = true
	c.apiServer()
	w := c.watch()
	c.reach(append(c.podPaths(), c.hostPaths()...))
	w.plenty("encryption off")
	c.encrypt()
	w.forget()
	c.reach(append(c.podPaths(), c.hostPaths()...))
	c.reach(c.apiPaths())
	w.none("scope All")
}

// No node has published a key: nothing of the cluster goes out, but each host can talk to
// the API server, and when it has fetched and published keys everything works.
func TestNoKeysYet(t *testing.T) {
	c := newCluster(t, 3)
	c.model.NodeEncryption.AllTraffic = true
	c.apiServer()
	keys := c.model.NodeEncryption.Nodes
	w := c.watch()
	c.reach(append(c.podPaths(), c.hostPaths()...))
	c.model.NodeEncryption.Nodes = nil
	c.encrypt()
	w.forget()
	if ok := c.try(append(c.podPaths(), c.hostPaths()...)); ok != 0 {
		t.Errorf("%d paths exist without keys", ok)
	}
	c.reach(c.apiPaths())
	w.none("no keys")
	c.model.NodeEncryption.Nodes = keys
	c.encrypt()
	c.reach(append(c.podPaths(), c.hostPaths()...))
	w.none("keys published")
}

// A node joins a strict cluster: others know its Node, and not its key yet.
func TestNodeJoins(t *testing.T) {
	c := newCluster(t, 3)
	c.model.NodeEncryption.AllTraffic = true
	c.apiServer()
	all := c.model.NodeEncryption.Nodes
	c.model.NodeEncryption.Nodes = all[:2]
	for _, n := range c.nodes[:2] {
		n.apply()
	}
	w := c.watch()
	last := c.nodes[2]
	toLast, others := c.split(last)
	c.reach(others)
	// The new node's own agent has not run yet: it sends in the clear, and is not heard.
	var arrived atomic.Int64
	serve(t, c.nodes[0].pod, "10.244.1.7:9000", &arrived)
	serve(t, c.nodes[0].Host, "172.30.0.11:9000", &arrived)
	for _, from := range []*labtest.Host{last.Host, last.pod} {
		for _, to := range []string{"10.244.1.7:9000", "172.30.0.11:9000"} {
			if from == last.pod && to == "172.30.0.11:9000" {
				continue
			}
			if _, err := ask(from, "udp", to, 300*time.Millisecond); err == nil {
				t.Errorf("%s was answered by %s", from.Name, to)
			}
		}
	}
	if n := arrived.Load(); n != 0 {
		t.Errorf("%d requests in the clear were delivered", n)
	}
	c.reach(c.apiPaths())
	c.model.NodeEncryption.Nodes = all
	c.encrypt()
	w.forget()
	c.reach(append(toLast, others...))
	w.none("joined")
}

// split sorts the paths into those from or to a node and the rest.
func (c *cluster) split(n *node) (with, without []path) {
	for _, p := range append(c.podPaths(), c.hostPaths()...) {
		host, _, _ := net.SplitHostPort(p.at)
		if p.from == n.Host || p.from == n.pod || host == n.addr(0) || host == n.addr(1) || host == n.podAddr(0) || host == n.podAddr(1) || host == service ||
			len(p.at) > 6 && p.at[len(p.at)-6:] == ":30080" {
			with = append(with, p)
		} else {
			without = append(without, p)
		}
	}
	return with, without
}

// A plain packet of a host on the nodes' network, with the source of a pod or of a node, is
// not delivered.
func TestSpoofed(t *testing.T) {
	c := newCluster(t, 2)
	outsider := c.Host("outsider")
	c.Connect(c.fabric, "out", "", outsider, "eth0", "172.30.0.99/24 fd00:30::99/64")
	c.fabric.IP("link", "set", "out", "master", "br0")
	a := c.nodes[0]
	a.IP("link", "set", "eth0", "address", "02:00:00:00:00:01")
	for f := range 2 {
		outsider.IP("neigh", "replace", a.addr(f), "lladdr", "02:00:00:00:00:01", "dev", "eth0")
	}
	outsider.IP("route", "add", "10.244.1.0/24", "via", a.addr(0))
	outsider.IP("-6", "route", "add", "fd00:244:1::/64", "via", a.addr(1))
	var arrived atomic.Int64
	for f := range 2 {
		serve(t, a.pod, net.JoinHostPort(a.podAddr(f), "9000"), &arrived)
	}
	spoof := func() {
		for _, source := range []string{"10.244.2.7", "10.244.1.9", "172.30.0.12", "fd00:244:2::7", "fd00:244:1::9", "fd00:30::12"} {
			family, prefix := 0, "/32"
			if net.ParseIP(source).To4() == nil {
				family, prefix = 1, "/128"
			}
			if err := outsider.Up("lo", source+prefix); err != nil {
				t.Fatal(err)
			}
			outsider.Do(func() error {
				conn, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(source)}, &net.UDPAddr{IP: net.ParseIP(a.podAddr(family)), Port: 9000})
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = conn.Write([]byte("spoofed"))
				return err
			})
			time.Sleep(50 * time.Millisecond)
			outsider.IP("addr", "del", source+prefix, "dev", "lo")
		}
		time.Sleep(200 * time.Millisecond)
	}
	a.Sysctl("net/ipv4/conf/all/rp_filter", "0")
	a.Sysctl("net/ipv4/conf/eth0/rp_filter", "0")
	c.reach([]path{{outsider, "udp", a.podAddr(0) + ":9000", ""}, {outsider, "udp", net.JoinHostPort(a.podAddr(1), "9000"), ""}})
	arrived.Store(0)
	spoof()
	if n := arrived.Load(); n != 6 {
		t.Fatalf("with encryption off %d of 6 spoofed packets arrived: the test proves nothing", n)
	}
	c.encrypt()
	arrived.Store(0)
	spoof()
	if n := arrived.Load(); n != 0 {
		t.Errorf("%d spoofed packets were delivered", n)
	}
	o, err := a.observe()
	if err != nil || o.Dropped["in_pods"] < 4 || o.Dropped["in_nodes"] < 2 {
		t.Errorf("counted as dropped: %v, %v; want 4 in_pods and 2 in_nodes", o.Dropped, err)
	}
	if len(o.Seen) < 6 {
		t.Errorf("who was dropped: %v; want all six", o.Seen)
	}
}
