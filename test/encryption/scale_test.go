package encryption

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// How long an agent may work when one node joins 250: goal and guard, in milliseconds, see
// speed_test.go.
const (
	goalJoin  = 100
	guardJoin = 400
)

// stranger makes a node that is only heard of.
func (c *cluster) stranger(i int) {
	c.t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		c.t.Fatal(err)
	}
	name := fmt.Sprintf("stranger-%d", i)
	c.model.Nodes = append(c.model.Nodes, model.Node{
		Name:      name,
		Addresses: addrs(fmt.Sprintf("172.30.%d.%d", 1+i/250, 1+i%250), fmt.Sprintf("fd00:30::1:%x", i)),
		PodCIDRs:  prefixes(fmt.Sprintf("10.245.%d.0/24", i), fmt.Sprintf("fd00:245:%x::/64", i)),
	})
	c.model.NodeEncryption.Nodes = append(c.model.NodeEncryption.Nodes, model.NodeTunnel{Name: name, PublicKey: netstate.Key(key.PublicKey()), Ready: true})
}

// One of 250 nodes that joins is little work for an agent: planning, guard, WireGuard, routes. Others
// are left alone.
func TestOneMoreNode(t *testing.T) {
	const nodes, joins = 249, 5
	c := newCluster(t, 1)
	c.model.NodeEncryption.AllTraffic = true
	for i := range nodes {
		c.stranger(i)
	}
	n := c.nodes[0]
	start := time.Now()
	n.apply()
	atOnce := time.Since(start)
	t.Logf("%d nodes at once: %s", nodes, atOnce.Round(time.Millisecond))
	best := time.Hour
	var took []float64
	for i := range joins {
		c.stranger(nodes + i)
		start := time.Now()
		changed := n.apply()
		took = append(took, time.Since(start).Seconds()*1e3)
		best = min(best, time.Since(start))
		// A file and a table, a peer, four routes and what is behind them.
		if changed == 0 || changed > 20 {
			t.Errorf("%d changes for one node", changed)
		}
		if changed := n.apply(); changed != 0 {
			t.Errorf("the second application made %d changes", changed)
		}
	}
	bound := time.Duration(labtest.Goal(goalJoin, guardJoin)) * time.Millisecond
	t.Logf("one more: %s at best", best.Round(time.Millisecond))
	if best > bound {
		t.Errorf("one more node took %s, want %s at most", best, bound)
	}
	slices.Sort(took)
	labtest.Report("Agent/250",
		labtest.Figure{Value: atOnce.Seconds() * 1e3, Unit: "all nodes at once-ms"}, labtest.Figure{Value: took[len(took)/2], Unit: "one more node-ms"})
}
