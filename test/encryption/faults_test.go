package encryption

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// repair is how soon service must be back after the cause of a fault is gone.
const repair = 10 * time.Second

// inBothScopes runs a test with pods' traffic encrypted, and with all.
func inBothScopes(t *testing.T, f func(t *testing.T, c *cluster, paths []path)) {
	for _, all := range []bool{false, true} {
		name := "Pods"
		if all {
			name = "All"
		}
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 2)
			c.model.NodeEncryption.AllTraffic = all
			c.apiServer()
			paths := c.podPaths()
			if all {
				paths = append(paths, c.hostPaths()...)
			}
			w := c.watch()
			c.reach(paths) // so that no packet waits for its neighbour any more
			w.plenty("encryption off")
			c.encrypt()
			c.reach(paths)
			f(t, c, paths)
		})
	}
}

// back sees that all paths exist again in time.
func (c *cluster) back(since time.Time, paths []path) {
	c.t.Helper()
	c.reach(paths)
	if d := time.Since(since); d > repair {
		c.t.Errorf("service was back after %s, want %s at most", d, repair)
	} else {
		c.t.Logf("service was back after %s", d.Round(time.Millisecond))
	}
}

// Somebody undoes a part by hand: nothing goes out in the clear, and the next round repairs it.
func TestUndoneByHand(t *testing.T) {
	faults := []struct {
		name string
		do   func(n *node)
		dead bool // nothing gets through until it is repaired
	}{
		{"device deleted", func(n *node) { n.IP("link", "del", netstate.EncryptionLink) }, true},
		{"device down", func(n *node) { n.IP("link", "set", netstate.EncryptionLink, "down") }, true},
		{"guard flushed", func(n *node) { n.Run("nft", "flush table inet culvert-guard") }, false},
		{"guard deleted", func(n *node) { n.Run("nft", "delete table inet culvert-guard") }, false},
		{"guard's sets emptied", func(n *node) {
			for _, s := range []string{"nodes4", "nodes6", "pods4", "pods6"} {
				n.Run("nft", "flush set inet culvert-guard "+s)
			}
		}, false},
		{"routes flushed", func(n *node) {
			for _, table := range []int{netstate.EncryptionTable, netstate.ForwardedTable} {
				n.IP("-4", "route", "flush", "table", fmt.Sprint(table))
				n.IP("-6", "route", "flush", "table", fmt.Sprint(table))
			}
		}, true},
		{"rules deleted", func(n *node) {
			for _, family := range []string{"-4", "-6"} {
				for _, p := range []int{netstate.RulePriorityOuter, netstate.RulePriorityExempt, netstate.RulePriorityPodsToNodes, netstate.RulePriorityBetweenNodes} {
					n.IP(family, "rule", "del", "priority", fmt.Sprint(p))
				}
			}
		}, true},
	}
	inBothScopes(t, func(t *testing.T, c *cluster, paths []path) {
		n := c.nodes[1]
		for _, f := range faults {
			t.Run(f.name, func(t *testing.T) {
				w := c.watch()
				f.do(n)
				if ok := c.try(paths); f.dead && ok != 0 {
					t.Errorf("%d of %d paths exist", ok, len(paths))
				} else if !f.dead && ok == 0 {
					t.Error("no path exists, although the tunnel is whole")
				}
				c.reach(c.apiPaths())
				w.none(f.name)
				start := time.Now()
				if n.apply() == 0 {
					t.Error("nothing was repaired")
				}
				c.back(start, paths)
				w.none("repaired")
			})
		}
	})
}

// The peer's entry is removed at one end, then at the other: the request itself is not
// delivered, let alone in the clear.
func TestPeerRemoved(t *testing.T) {
	inBothScopes(t, func(t *testing.T, c *cluster, paths []path) {
		for _, n := range c.nodes {
			var arrived atomic.Int64
			for _, o := range c.nodes {
				for f := range 2 {
					serve(t, o.pod, net.JoinHostPort(o.podAddr(f), fmt.Sprint(9000+n.i)), &arrived)
				}
			}
			w := c.watch()
			facts, err := n.facts()
			if err != nil {
				t.Fatal(err)
			}
			devices := plan.Node(&c.model, facts).State.WireGuard
			devices[0].Peers = nil
			if _, err := n.wg.Set(context.Background(), devices); err != nil {
				t.Fatal(err)
			}
			for _, from := range c.nodes {
				for _, to := range c.nodes {
					if from == to {
						continue
					}
					for f := range 2 {
						if _, err := ask(from.pod, "udp", net.JoinHostPort(to.podAddr(f), fmt.Sprint(9000+n.i)), 300*time.Millisecond); err == nil {
							t.Errorf("%s was answered by %s", from.pod.Name, to.pod.Name)
						}
					}
				}
			}
			if got := arrived.Load(); got != 0 {
				t.Errorf("%d requests were delivered", got)
			}
			w.none("peer removed at " + n.Name)
			start := time.Now()
			n.apply()
			c.back(start, paths)
		}
	})
}

// The process that encrypts is killed: nothing goes out in the clear, the API server is
// reached all the same, and a new process brings everything back.
func TestKilled(t *testing.T) {
	inBothScopes(t, func(t *testing.T, c *cluster, paths []path) {
		n := c.nodes[1]
		n.forget()
		cmd := n.process()
		c.reach(paths)
		w := c.watch()
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if ok := c.try(paths); ok != 0 {
			t.Errorf("%d paths exist without anybody to encrypt", ok)
		}
		c.reach(c.apiPaths())
		w.none("killed")
		start := time.Now()
		n.process()
		c.back(start, paths)
		w.none("started again")
	})
}

// A node boots and its agent is absent: it has nothing but the guard from the disk.
func TestBootWithoutAgent(t *testing.T) {
	inBothScopes(t, func(t *testing.T, c *cluster, paths []path) {
		n := c.nodes[1]
		n.forget()
		n.Run("nft", "flush ruleset")
		for _, family := range []string{"-4", "-6"} {
			for _, table := range []int{netstate.EncryptionTable, netstate.ForwardedTable} {
				n.IP(family, "route", "flush", "table", fmt.Sprint(table))
			}
			for _, p := range []int{netstate.RulePriorityOuter, netstate.RulePriorityExempt, netstate.RulePriorityPodsToNodes, netstate.RulePriorityBetweenNodes} {
				n.IP(family, "rule", "del", "priority", fmt.Sprint(p))
			}
		}
		n.service()
		w := c.watch()
		c.try(paths)
		if counts, _ := w.plain(); slices.Max(counts) == 0 {
			t.Fatal("a node without guard sends nothing in the clear: the test proves nothing")
		}
		if err := n.open(); err != nil {
			t.Fatal(err)
		}
		n.Do(func() error {
			standing, err := n.guard.Restore(context.Background())
			if err == nil && !standing {
				t.Error("no guard stands")
			}
			return err
		})
		w.forget()
		for range 3 {
			c.try(paths)
		}
		c.reach(c.apiPaths())
		// The other node sends nothing either; what it encrypts nobody answers.
		w.none("agent absent")
		start := time.Now()
		n.apply()
		c.back(start, paths)
		w.none("agent started")
	})
}

// The cluster's objects know IPv4 only, but nodes and pods have IPv6 as well, with routes
// between them: none of it leaves in the clear.
func TestUnknownFamily(t *testing.T) {
	c := newCluster(t, 2)
	paths := c.podPaths()
	w := c.watch()
	c.reach(paths)
	w.plenty("encryption off")
	var four, six []path
	for _, p := range paths {
		host, _, _ := net.SplitHostPort(p.at)
		switch {
		case net.ParseIP(host).To4() != nil:
			four = append(four, p)
		case p.from == c.nodes[0].pod || p.from == c.nodes[1].pod:
			six = append(six, p)
		}
	}
	for i := range c.model.Nodes {
		m := &c.model.Nodes[i]
		m.Addresses, m.PodCIDRs = m.Addresses[:1], m.PodCIDRs[:1]
		c.nodes[i].model = *m
		c.nodes[i].more = func(f *plan.NodeFacts) { f.Encryption.Pods = prefixes("10.244.0.0/16") }
	}
	c.encrypt()
	c.reach(four)
	w.forget()
	if ok := c.try(six); ok != 0 {
		t.Errorf("%d of %d IPv6 paths of pods exist", ok, len(six))
	}
	w.none("IPv6 of pods")
	o, err := c.nodes[0].observe()
	if err != nil || o.Dropped["out_unknown"] == 0 {
		t.Errorf("dropped %v, %v: want out_unknown", o.Dropped, err)
	}
}

// A node gets another address: its old one leads nowhere, the new one is encrypted.
func TestAddressChanges(t *testing.T) {
	inBothScopes(t, func(t *testing.T, c *cluster, paths []path) {
		n := c.nodes[1]
		w := c.watch()
		n.IP("addr", "del", "172.30.0.12/24", "dev", "eth0")
		n.IP("addr", "del", "fd00:30::12/64", "dev", "eth0")
		if err := n.Up("eth0", "172.30.0.52/24 fd00:30::52/64"); err != nil {
			t.Fatal(err)
		}
		n.IP("route", "add", "default", "via", "172.30.0.1")
		n.IP("-6", "route", "replace", "default", "via", "fd00:30::1")
		n.IP("route", "replace", "10.244.1.0/24", "via", "172.30.0.11")
		n.IP("-6", "route", "replace", "fd00:244:1::/64", "via", "fd00:30::11")
		n.model.Addresses = addrs("172.30.0.52", "fd00:30::52")
		for i := range c.model.Nodes {
			if c.model.Nodes[i].Name == n.model.Name {
				c.model.Nodes[i] = n.model
			}
		}
		answer(t, n.Host, "172.30.0.52", "fd00:30::52")
		c.try(paths) // nobody knows of the change yet
		start := time.Now()
		c.encrypt()
		after := c.podPaths()
		if c.model.NodeEncryption.AllTraffic {
			after = append(after, c.hostPaths()...)
		}
		// The CNI's routes still lead to the old address: nobody follows them.
		c.back(start, after)
		w.none("address changed")
	})
}
