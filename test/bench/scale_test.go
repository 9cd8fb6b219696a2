package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/herd"
)

// Where the crowd is: all devices behind one address, as behind a NAT.
const (
	crowdFar     = "203.0.113.1"
	crowdGateway = "203.0.113.2"
	crowdPod     = "10.200.0.2"
	loudest      = 1000 // devices that speak, of those that there are
)

// crowd is a gateway with many devices, of which some speak.
type crowd struct {
	*pair
	key     wgtypes.Key // the gateway's
	n       int
	speak   []*herd.Client
	guests  []*herd.Client // that came later: each round adds some
	perTurn int
}

func scale(brief bool) *suite {
	s := &suite{
		name: "scale", title: "Scale: one gateway, many devices", against: "10 devices",
		metrics: []metric{
			{name: "start", unit: "s", less: true}, {name: "one more device", unit: "ms", less: true}, {name: "all speak after a restart", unit: "s", less: true}, {name: "memory", unit: "MB", less: true}, {name: "goroutines", unit: "", less: true},
		},
	}
	counts, turn := []int{10, 1000, 10000}, 3
	if brief {
		counts, turn = counts[:1], 1
	}
	for _, n := range counts {
		s.contenders = append(s.contenders, contender{name: strconv.Itoa(n) + " devices", ours: true, start: func(t *testing.T, l *labtest.Lab) candidate {
			return newCrowd(t, l, n, turn)
		}})
	}
	return s
}

// newCrowd builds far ─ gateway ─ pod, and writes the manifests; nothing runs yet.
func newCrowd(t *testing.T, l *labtest.Lab, n, perTurn int) *crowd {
	t.Helper()
	i := hosts.Add(1)
	c := &crowd{pair: &pair{t: t, a: l.Host(fmt.Sprintf("far%d", i)), b: l.Host(fmt.Sprintf("crowd%d", i)), dir: shortDir(t)}, key: newKey(t), n: n, perTurn: perTurn}
	pod := l.Host(fmt.Sprintf("crowdpod%d", i))
	l.Connect(c.a, "eth0", crowdFar+"/24", c.b, "public", crowdGateway+"/24")
	l.Connect(pod, "eth0", crowdPod+"/24", c.b, "pods", "10.200.0.1/24")
	pod.IP("route", "add", "default", "via", "10.200.0.1")
	c.b.Sysctl("net/ipv4/ip_forward", "1")
	var all strings.Builder
	for i := range n {
		key := newKey(t).PublicKey()
		if i < loudest {
			c.speak = append(c.speak, c.client(i))
			key = c.speak[i].Private.PublicKey()
		}
		all.WriteString(crowdDevice(i, key))
	}
	c.write("manifests/devices.yaml", all.String())
	c.write("manifests/gateway.yaml", "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: bench, namespace: default}\nspec:\n  cluster: {podCIDRs: [10.200.0.0/16]}\n  deviceCIDRs: [10.64.0.0/16]\n  expose: {type: None}\n")
	c.write("state/wireguard.key", c.key.String()+"\n")
	return c
}

// client makes the ith device.
func (c *crowd) client(i int) *herd.Client {
	return herd.New(c.t, herd.Place{
		Host: c.a.Host, From: netip.MustParseAddr(crowdFar), Key: c.key.PublicKey(),
		Gateway: netip.MustParseAddrPort(crowdGateway + ":51820"), Pod: netip.MustParseAddr(crowdPod),
	}, crowdAddress(i))
}

// crowdAddress is the address of the ith device.
func crowdAddress(i int) netip.Addr {
	i += 2 // the network's and the gateway's
	return netip.AddrFrom4([4]byte{10, 64, byte(i >> 8), byte(i)})
}

func crowdDevice(i int, key wgtypes.Key) string {
	return fmt.Sprintf("---\napiVersion: culvert.dev/v1alpha1\nkind: Device\nmetadata: {name: device-%d, namespace: default}\nspec: {gatewayRef: {name: bench}, publicKey: %s, addresses: [%s]}\n", i, key, crowdAddress(i))
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

// run starts the gateway, which knows nothing of where the devices are, and returns when it
// says that it is ready.
func (c *crowd) run(t *testing.T) (cmd *exec.Cmd, began time.Time) {
	t.Helper()
	_ = os.Remove(c.path("state/endpoints.json"))
	client := &http.Client{Timeout: 40 * time.Second, Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(c.b, "tcp", "127.0.0.1:9586") }}}
	defer client.CloseIdleConnections()
	began = time.Now()
	cmd, _ = c.b.Background(culvert, "gateway", "--manifests", c.path("manifests"), "--state", c.path("state"), "--http", "127.0.0.1:9586", "--log-level", "warn")
	for {
		resp, err := client.Get("http://127.0.0.1:9586/readyz")
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return cmd, began
			}
		}
		if time.Since(began) > 2*time.Minute {
			t.Fatalf("the gateway is not ready after two minutes: %v", err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// measure: a start with all devices in the manifests, until the gateway is ready; memory and
// goroutines when it is silent; some devices more, each until its handshake is answered; a
// restart, after which all that speak begin anew at once, until 99 % of them have an answer from
// a pod.
func (c *crowd) measure(t *testing.T) figures {
	t.Helper()
	out := figures{}
	cmd, began := c.run(t)
	out["start"] = time.Since(began).Seconds()
	time.Sleep(3 * time.Second)
	out["memory"] = resident(cmd.Process.Pid)
	devices, goroutines := c.peers()
	if out["goroutines"] = goroutines; devices != c.n+len(c.guests) {
		t.Errorf("ready with %d devices in effect, want %d", devices, c.n+len(c.guests))
	}
	var took []float64
	for range c.perTurn {
		i := c.n + len(c.guests)
		guest := c.client(i)
		c.guests = append(c.guests, guest)
		time.Sleep(200 * time.Millisecond)
		changed := time.Now()
		c.replace(fmt.Sprintf("manifests/guest-%d.yaml", i), crowdDevice(i, guest.Private.PublicKey()))
		took = append(took, guest.Knock(t, 20*time.Second).Sub(changed).Seconds()*1e3)
	}
	out["one more device"] = median(took)
	slay(cmd.Process.Pid)
	cmd, began = c.run(t)
	for _, s := range c.speak { // now: one that has tried while nobody listened waits 5 s
		s.Forget()
	}
	herd.Answered(t, c.speak, 0.99, time.Minute)
	out["all speak after a restart"] = time.Since(began).Seconds()
	stopProcess(cmd)
	return out
}
