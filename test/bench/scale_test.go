package bench

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// crowd is a gateway with many devices.
type crowd struct {
	*pair
	n int
	// rounds that were run: each adds a device.
	added int
}

func scale(brief bool) *suite {
	s := &suite{
		name: "scale", title: "Scale: one gateway, many devices", against: "10 devices",
		metrics: []metric{{"start", "s", true}, {"one more device", "ms", true}, {"memory", "MB", true}, {"goroutines", "", true}},
	}
	counts := []int{10, 1000, 10000}
	if brief {
		counts = counts[:1]
	}
	for _, n := range counts {
		s.contenders = append(s.contenders, contender{name: strconv.Itoa(n) + " devices", ours: true, start: func(t *testing.T, l *labtest.Lab) candidate {
			c := &crowd{pair: &pair{t: t, b: l.Host(fmt.Sprintf("crowd%d", hosts.Add(1))), dir: shortDir(t)}, n: n}
			var all strings.Builder
			for i := range n {
				all.WriteString(c.device(fmt.Sprintf("device-%d", i)))
			}
			c.write("manifests/devices.yaml", all.String())
			c.write("manifests/gateway.yaml", "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: bench, namespace: default}\nspec:\n  cluster: {podCIDRs: [10.200.0.0/16]}\n  deviceCIDRs: [10.64.0.0/16]\n  expose: {type: None}\n")
			return c
		}})
	}
	return s
}

func (c *crowd) device(name string) string {
	return "---\napiVersion: culvert.dev/v1alpha1\nkind: Device\nmetadata: {name: " + name + ", namespace: default}\nspec: {gatewayRef: {name: bench}, publicKey: " + newKey(c.t).PublicKey().String() + "}\n"
}

// peers counts the devices that the gateway has in effect, and its goroutines.
func (c *crowd) peers() (devices int, goroutines float64) {
	out, err := c.b.Try("curl", "-s", "http://127.0.0.1:9586/metrics")
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "wireguard_sent_bytes_total{") {
			devices++
		}
		if v, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			goroutines, _ = strconv.ParseFloat(strings.TrimSpace(v), 64)
		}
	}
	return devices, goroutines
}

func (c *crowd) await(want int) {
	c.t.Helper()
	labtest.Eventually(c.t, 2*time.Minute, fmt.Sprintf("%d devices", want), func() error {
		if n, _ := c.peers(); n != want {
			return fmt.Errorf("%d devices", n)
		}
		return nil
	})
}

func (c *crowd) measure(t *testing.T) figures {
	t.Helper()
	out := figures{}
	begin := time.Now()
	cmd, _ := c.b.Background(culvert, "gateway", "--manifests", c.path("manifests"), "--state", c.path("state"), "--http", "127.0.0.1:9586", "--log-level", "warn")
	c.await(c.n + c.added)
	out["start"] = time.Since(begin).Seconds()
	c.added++
	begin = time.Now()
	c.replace(fmt.Sprintf("manifests/more-%d.yaml", c.added), c.device(fmt.Sprintf("more-%d", c.added)))
	c.await(c.n + c.added)
	out["one more device"] = time.Since(begin).Seconds() * 1e3
	_, out["goroutines"] = c.peers()
	out["memory"] = resident(cmd.Process.Pid)
	stopProcess(cmd)
	return out
}
