package encryption

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/guard"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// The goals are asserted when CULVERT_GOALS is set (make speed), which wants a machine that
// does nothing else: the median of all rounds must reach them. Otherwise the best of few rounds
// guards against getting much worse.
const (
	goalSpeed  = 0.9
	goalRounds = 31

	guardSpeed  = 0.7
	guardRounds = 3

	goalGuard  = 0.98 // with the guard as against without
	guardGuard = 0.85
)

// TestSpeed: a pod talks to a pod of the other node, with WireGuard in user space, against two
// hosts of the same network with the library's own program and nothing else; and with the guard
// against without it. One TCP stream, in turns.
func TestSpeed(t *testing.T) {
	labtest.Require(t, "iperf3", "ping", "go", "wg")
	c := newCluster(t, 2)
	plain := newPlain(t, c)
	c.model.NodeEncryption.AllTraffic = true
	for _, n := range c.nodes {
		n.process("once")
	}
	from, to := c.nodes[0].pod, c.nodes[1].podAddr(0)
	listen(t, from, c.nodes[1].pod, to)

	rounds := int(labtest.Goal(goalRounds, guardRounds))
	bound, cost := labtest.Goal(goalSpeed, guardSpeed), labtest.Goal(goalGuard, guardGuard)
	directions := [][]string{nil, {"-R"}}
	if os.Getenv("CULVERT_GOALS") == "" {
		directions = directions[:1]
	}
	for _, direction := range directions {
		ours := func() float64 { return gigabits(t, from, to, direction...) }
		theirs := func() float64 { return gigabits(t, plain.host, plain.far, direction...) }
		if r := ratio(t, fmt.Sprint("pod to pod, the library's program ", direction), rounds, ours, theirs); r < bound {
			t.Errorf("%v: %.3f of the library's program, want %.2f at least", direction, r, bound)
		}
	}
	for _, n := range c.nodes {
		n.saveTable(t)
	}
	with := func() float64 { c.guards(true); return gigabits(t, from, to) }
	without := func() float64 { c.guards(false); return gigabits(t, from, to) }
	if r := ratio(t, "with the guard, without", rounds, with, without); r < cost {
		t.Errorf("with the guard %.3f of what it is without, want %.2f at least", r, cost)
	}
}

// plain is a host with a tunnel of the library's program to the address far.
type plain struct {
	host *labtest.Host
	far  string
}

func newPlain(t *testing.T, c *cluster) plain {
	t.Helper()
	program := filepath.Join(t.TempDir(), "wireguard-go")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/tailscale/wireguard-go").CombinedOutput(); err != nil {
		t.Fatalf("build the library's program: %v: %s", err, out)
	}
	hosts := []*labtest.Host{c.Host("plain-1"), c.Host("plain-2")}
	var keys []wgtypes.Key
	for i, h := range hosts {
		port := fmt.Sprintf("p%d", i+1)
		c.Connect(c.fabric, port, "", h, "eth0", fmt.Sprintf("172.30.0.2%d/24", i+1))
		c.fabric.IP("link", "set", port, "master", "br0")
		k, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	for i, h := range hosts {
		link := fmt.Sprintf("pl%d-%d", os.Getpid()%1000000, i)
		h.Background(program, "-f", link)
		socket := filepath.Join("/var/run/wireguard", link+".sock")
		labtest.Eventually(t, 10*time.Second, "wireguard-go", func() error { _, err := os.Stat(socket); return err })
		t.Cleanup(func() { _ = os.Remove(socket) })
		conf := filepath.Join(t.TempDir(), "wg.conf")
		text := fmt.Sprintf("[Interface]\nPrivateKey = %s\nListenPort = 51820\n[Peer]\nPublicKey = %s\nEndpoint = 172.30.0.2%d:51820\nAllowedIPs = 10.9.0.0/24\n",
			keys[i], keys[1-i].PublicKey(), 2-i)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		h.Run("wg", "setconf", link, conf)
		h.IP("link", "set", link, "mtu", "1440") // as between nodes over IPv4
		if err := h.Up(link, fmt.Sprintf("10.9.0.%d/24", i+1)); err != nil {
			t.Fatal(err)
		}
	}
	listen(t, hosts[0], hosts[1], "10.9.0.2")
	return plain{hosts[0], "10.9.0.2"}
}

// listen starts an iperf3 server and waits until it answers.
func listen(t *testing.T, from, on *labtest.Host, at string) {
	t.Helper()
	on.Background("iperf3", "-s")
	labtest.Eventually(t, 20*time.Second, "iperf3 on "+on.Name, func() error {
		_, err := from.Try("iperf3", "-c", at, "-n", "1", "--connect-timeout", "1000")
		return err
	})
}

// ratio measures two in turns and returns the ratio that decides.
func ratio(t *testing.T, what string, rounds int, x, y func() float64) float64 {
	t.Helper()
	var ratios, xs, ys []float64
	for i := range rounds {
		var a, b float64
		if i%2 == 0 {
			a, b = x(), y()
		} else {
			b, a = y(), x()
		}
		ratios, xs, ys = append(ratios, a/b), append(xs, a), append(ys, b)
	}
	load, _ := os.ReadFile("/proc/loadavg")
	decisive := labtest.Decisive(ratios, func(a, b float64) bool { return a > b })
	t.Logf("%s: %.3f and %.3f Gbit/s, median of %d ratios %.3f, %.3f decides (load %.4s)", what, median(xs), median(ys), rounds, median(ratios), decisive, load)
	return decisive
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// gigabits is the speed of one TCP stream of a second.
func gigabits(t *testing.T, h *labtest.Host, to string, more ...string) float64 {
	t.Helper()
	out := h.Run("iperf3", append([]string{"-c", to, "-t", "1", "-J"}, more...)...)
	var r struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	return r.End.Received.BitsPerSecond / 1e9
}

func (n *node) tableFile() string { return n.file + ".nft" }

// saveTable keeps the guard's table as nft(8) prints it.
func (n *node) saveTable(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(n.tableFile(), []byte(n.Run("nft", "list", "table", "inet", guard.Table)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// guards puts up all nodes' guards, or takes them away.
func (c *cluster) guards(up bool) {
	c.t.Helper()
	for _, n := range c.nodes {
		n.Run("nft", "add table inet "+guard.Table+"; delete table inet "+guard.Table)
		if up {
			n.Run("nft", "-f", n.tableFile())
		}
	}
}
