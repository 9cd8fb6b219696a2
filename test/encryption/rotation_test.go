package encryption

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// heartbeat is a connection that says something every 20 ms and notes the longest time that
// an answer took.
type heartbeat struct {
	name    string
	stop    chan struct{}
	done    chan struct{}
	mu      sync.Mutex
	longest time.Duration
	beats   int
	err     error
}

func (c *cluster) heartbeat(p path) *heartbeat {
	c.t.Helper()
	h := &heartbeat{name: p.from.Name + " to " + p.at, stop: make(chan struct{}), done: make(chan struct{})}
	var conn net.Conn
	p.from.Do(func() (err error) { conn, err = net.DialTimeout("tcp", p.at, 5*time.Second); return err })
	go func() {
		defer close(h.done)
		defer conn.Close()
		r := bufio.NewReader(conn)
		_, _ = r.ReadString('\n') // who answers
		for i := 0; ; i++ {
			select {
			case <-h.stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			start := time.Now()
			_ = conn.SetDeadline(start.Add(15 * time.Second))
			_, err := fmt.Fprintln(conn, i)
			if err == nil {
				_, err = r.ReadString('\n')
			}
			h.mu.Lock()
			h.longest, h.beats, h.err = max(h.longest, time.Since(start)), h.beats+1, err
			h.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return h
}

// end sees that the connection was never interrupted for longer than a gap.
func (h *heartbeat) end(t *testing.T, gap time.Duration) {
	t.Helper()
	close(h.stop)
	<-h.done
	t.Logf("%s: %d beats, longest %s", h.name, h.beats, h.longest.Round(time.Millisecond))
	if h.err != nil {
		t.Errorf("%s: broken: %v", h.name, h.err)
	}
	if h.longest > gap {
		t.Errorf("%s: nothing passed for %s, want %s at most", h.name, h.longest, gap)
	}
	if h.beats < 25 {
		t.Errorf("%s: %d beats: too few to tell", h.name, h.beats)
	}
}

// A node changes its key: connections live on, nothing passes for a second at most, and
// nothing goes out in the clear.
func TestRotation(t *testing.T) {
	c := newCluster(t, 3)
	c.model.NodeEncryption.AllTraffic = true
	c.encrypt()
	a, b := c.nodes[0], c.nodes[1]
	paths := []path{{a.pod, "tcp", at(b.podAddr(0)), ""}, {b.pod, "tcp", at(a.podAddr(1)), ""}, {b.Host, "tcp", at(a.addr(0)), ""}}
	c.reach(paths)
	w := c.watch()
	var beats []*heartbeat
	for _, p := range paths {
		beats = append(beats, c.heartbeat(p))
	}
	all := func() {
		for _, n := range c.nodes {
			n.apply()
		}
	}
	tunnel := &c.model.NodeEncryption.Nodes[0]
	for range 2 {
		next, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		tunnel.NextPublicKey = netstate.Key(next.PublicKey())
		all() // announced
		time.Sleep(300 * time.Millisecond)
		a.key = next
		a.apply() // used; the others look five times a second while somebody changes a key
		for range 5 {
			time.Sleep(200 * time.Millisecond)
			all()
		}
		tunnel.PublicKey, tunnel.NextPublicKey = tunnel.NextPublicKey, netstate.Key{}
		all() // the old one is forgotten
		time.Sleep(300 * time.Millisecond)
	}
	for _, h := range beats {
		h.end(t, time.Second)
	}
	w.none("rotation")
}

// Encryption is turned on in a running cluster in two steps, and off again, and nobody is
// cut off: not even between a node that takes part already and one that does not yet.
func TestTurnedOnAndOff(t *testing.T) {
	c := newCluster(t, 3)
	c.model.NodeEncryption.AllTraffic = true
	c.model.NodeEncryption.Strict = false
	c.apiServer()
	everything := append(c.podPaths(), c.hostPaths()...)
	c.reach(everything)
	var beats []*heartbeat
	for _, p := range everything {
		// The kernel resets what is masqueraded when it leaves by another link.
		if p.network == "tcp" && !strings.HasSuffix(p.at, ":30080") && p.at != service+":53" {
			beats = append(beats, c.heartbeat(p))
		}
	}
	c.ready(false)
	for _, n := range c.nodes {
		n.enforced = false
		n.apply()
		c.reach(everything) // some are permissive, some have nothing yet
	}
	c.everywhere() // and now the routes to those that have answered
	c.reach(everything)
	w := c.watch()
	c.reach(everything)
	w.none("permissive, all answered")

	c.model.NodeEncryption.Strict = true
	c.everywhere()
	for _, n := range c.nodes {
		if n.dropping() {
			t.Errorf("%s drops although a node is not ready", n.Name)
		}
	}
	c.ready(true)
	c.everywhere()
	for _, n := range c.nodes {
		if !n.dropping() {
			t.Errorf("%s does not drop although all nodes are ready", n.Name)
		}
	}
	c.reach(everything)
	w.none("strict")

	c.model.NodeEncryption.Strict = false
	c.everywhere()
	c.reach(everything)
	for _, h := range beats {
		h.end(t, 2*time.Second)
	}
}

func (c *cluster) ready(yes bool) {
	for i := range c.model.NodeEncryption.Nodes {
		c.model.NodeEncryption.Nodes[i].Ready = yes
	}
}

func (c *cluster) everywhere() {
	c.t.Helper()
	for _, n := range c.nodes {
		n.apply()
	}
}

// dropping tells whether the node's guard drops.
func (n *node) dropping() bool {
	saved, err := n.guard.Saved()
	if err != nil {
		n.c.t.Fatal(err)
	}
	return saved.Strict
}
