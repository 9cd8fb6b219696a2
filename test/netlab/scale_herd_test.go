package netlab

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/herd"
)

// newHerdClient makes a device of the gateway that is not spoken of in the manifests yet.
func newHerdClient(t testing.TB, h *labtest.Host, gateway wgtypes.Key, address netip.Addr) *herd.Client {
	t.Helper()
	return herd.New(t, herd.Place{
		Host: h.Host, From: netip.MustParseAddr(scaleFar), Key: gateway, Gateway: netip.MustParseAddrPort(public + ":51820"), Pod: netip.MustParseAddr(scalePod),
	}, address)
}

// TestScaleRestart: 1,000 devices behind one address, as behind a NAT, speak at once; then
// the gateway is killed and started again while they go on: 99 % of them have traffic
// within 10 s of its start.
func TestScaleRestart(t *testing.T) {
	const devices = 1000
	n := newScaleNet(t)
	g := newGateway(t, n.gateway)
	var text strings.Builder
	var clients []*herd.Client
	for i := range devices {
		c := newHerdClient(t, n.far, g.public, scaleAddress(i))
		clients = append(clients, c)
		text.WriteString(scaleDevice(i, c.Private.PublicKey()))
	}
	g.write("gateway.yaml", scaleGateway())
	g.write("devices.yaml", text.String())
	startScaled(t, g)
	first := herd.Answered(t, clients, 0.99, 10*time.Second)
	all := herd.Answered(t, clients, 1, 20*time.Second)
	t.Logf("1,000 devices that have no session speak at once: 99 %% have traffic after %s, all %s later (load %s)", ms(first), ms(all), load())
	t.Logf("with 1,000 sessions: RSS %d MiB, %d goroutines", g.rss()>>20, g.goroutines())
	time.Sleep(6 * time.Second) // so that the endpoints are on disk

	for _, c := range []struct {
		name   string
		forget bool // the endpoints
	}{{"killed and restarted", false}, {"restarted without knowing where they are", true}} {
		g.kill()
		if c.forget {
			if err := os.Remove(g.state + "/endpoints.json"); err != nil {
				t.Fatal(err)
			}
			// Stock clients shake hands anew 15 s after unanswered data: as if that time were over.
			for _, c := range clients {
				c.Forget()
			}
		}
		began := time.Now()
		ready, _ := startScaled(t, g)
		herd.Answered(t, clients, 0.99, 10*time.Second)
		back := time.Since(began)
		t.Logf("%s: ready after %s, 99 %% have traffic %s after the start (load %s)", c.name, ms(ready), ms(back), load())
		withinBound(t, c.name, back, 10*time.Second)
	}
	g.profile("heap-herd.prof", "heap?gc=1")
}
