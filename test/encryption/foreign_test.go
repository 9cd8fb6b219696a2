package encryption

import (
	"fmt"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// plugin is a network plugin that starts on all nodes while all is encrypted: it asks the kernel by which link it
// reaches each other node, and puts its routes to the pods there onto that one, as Cilium does with
// autoDirectNodeRoutes=true.
func (c *cluster) plugin() {
	c.t.Helper()
	c.eachRoute(func(n, o *node, family, _ string, f int) {
		var link string
		words := strings.Fields(n.Run("ip", family, "route", "get", o.addr(f)))
		for i, w := range words[:len(words)-1] {
			if w == "dev" {
				link = words[i+1]
			}
		}
		if link != netstate.EncryptionLink {
			c.t.Fatalf("%s reaches %s by %q: the test proves nothing", n.Name, o.addr(f), link)
		}
		n.IP(family, "route", "replace", o.model.PodCIDRs[f].String(), "via", o.addr(f), "dev", link, "proto", "kernel")
	})
}

// direct sees that the network plugin's routes lead over the network itself.
func (c *cluster) direct(when string) {
	c.t.Helper()
	c.eachRoute(func(n, o *node, family, pods string, f int) {
		got := n.Run("ip", family, "route", "show", pods)
		if !strings.HasPrefix(got, fmt.Sprintf("%s via %s dev eth0 proto kernel", pods, o.addr(f))) || strings.Contains(got, netstate.EncryptionLink) {
			c.t.Errorf("%s: the route of %s to %s is %q", when, n.Name, pods, got)
		}
	})
}

// eachRoute does something for each route to another node's pods, by their range and the number of its family.
func (c *cluster) eachRoute(do func(n, o *node, family, pods string, f int)) {
	c.t.Helper()
	for _, n := range c.nodes {
		for _, o := range c.nodes {
			for f, family := range []string{"-4", "-6"} {
				if n != o {
					do(n, o, family, o.model.PodCIDRs[f].String(), f)
				}
			}
		}
	}
}

// A network plugin starts while all is encrypted, and takes the encrypted link for the way to the other nodes: its
// routes do not depend on that link, so that pods reach each other when it goes, with the agent or with the
// NodeEncryption.
func TestRoutesOfOthers(t *testing.T) {
	c := newCluster(t, 2)
	c.model.NodeEncryption.AllTraffic = true
	paths := c.podPaths()
	w := c.watch()
	c.reach(paths)
	w.plenty("encryption off")
	c.encrypt()
	c.reach(paths)
	w.forget()

	c.plugin()
	c.reach(paths)
	w.none("routes on the encrypted link")
	c.everywhere()
	c.direct("afterwards")
	c.reach(paths)
	w.none("routes moved")

	for _, n := range c.nodes {
		n.forget() // and the device in user space goes
	}
	c.direct("agents killed")
	if ok := c.try(paths); ok != 0 {
		t.Errorf("%d paths exist without anybody to encrypt", ok)
	}
	w.none("agents killed")
	c.everywhere()
	c.reach(paths)
	w.none("agents back")

	c.plugin() // and nobody has looked since
	c.model.NodeEncryption = nil
	c.everywhere()
	c.direct("turned off")
	c.reach(paths)
}
