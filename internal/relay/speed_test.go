package relay

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

const haproxyConfig = `
global
	nbthread 2
defaults
	mode tcp
	timeout connect 5s
	timeout client 60s
	timeout server 60s
	%s
listen iperf
	bind %s:5201
	server pod 10.2.0.2:5201
`

// speedRounds is how often each candidate is measured; they take turns. The number is
// fixed: to go on until the figures please would prove nothing.
var speedRounds = int(labtest.Goal(9, 5))

// One TCP stream through the relay is at least as fast as through HAProxy with its better
// setting of splicing, in the same run.
func TestOneStreamIsAsFastAsHAProxy(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	labtest.Require(t, "iperf3", "haproxy")
	n := newNetwork(t, Options{})
	n.set(port(netstate.TCP, "10.96.0.1:5201", "10.2.0.2:5201"))
	n.pods.Background("iperf3", "-s")
	candidates := []candidate{
		{name: "relay", address: "10.96.0.1"},
		n.haproxy("HAProxy, splice on", "10.1.0.11", "option splice-request\n\toption splice-response"),
		n.haproxy("HAProxy, splice auto", "10.1.0.12", "option splice-auto"),
	}
	for _, c := range candidates {
		labtest.Eventually(t, 5*time.Second, c.name+" answers", func() error {
			_, err := n.client.Try("iperf3", "-c", c.address, "-n", "1K")
			return err
		})
	}
	for range speedRounds {
		for i := range candidates {
			c := &candidates[i]
			c.figures = append(c.figures, n.iperf(c.address))
		}
	}
	ratio := candidates[0].median() / max(candidates[1].median(), candidates[2].median())
	for _, c := range candidates {
		t.Logf("%-20s median %5.1f Gbit/s of %.1f", c.name, c.median(), c.figures)
	}
	t.Logf("relay / the better HAProxy = %.2f", ratio)
	if want := labtest.Goal(1, 0.7); ratio < want {
		t.Errorf("the relay has %.2f of HAProxy's throughput, want %.1f", ratio, want)
	}
}

type candidate struct {
	name, address string
	figures       []float64 // Gbit/s
}

func (c candidate) median() float64 {
	f := slices.Sorted(slices.Values(c.figures))
	return f[len(f)/2]
}

// haproxy starts HAProxy on an address of its own on the client's side of the gateway.
func (n *network) haproxy(name, address, options string) candidate {
	n.t.Helper()
	n.gateway.IP("addr", "add", address+"/24", "dev", "tun0")
	file := filepath.Join(n.t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, fmt.Appendf(nil, haproxyConfig, options, address), 0o600); err != nil {
		n.t.Fatal(err)
	}
	n.gateway.Background("haproxy", "-db", "-f", file)
	return candidate{name: name, address: address}
}

// iperf measures one stream from the client in Gbit/s.
func (n *network) iperf(address string) float64 {
	n.t.Helper()
	var result struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	out := n.client.Run("iperf3", "-J", "-t", "1", "-c", address)
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		n.t.Fatal(err)
	}
	return result.End.Received.Rate / 1e9
}
