package netlab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// device is a stock user-space WireGuard, configured by wg(8).
type device struct {
	*labtest.Host
	t       *testing.T
	link    string
	private wgtypes.Key
	addrs   []string
}

var stockLinks atomic.Int32

// newDevice starts wireguard-go on a host. Its control socket is in a directory that all
// namespaces share, hence the name of the link.
func newDevice(t *testing.T, h *labtest.Host) *device {
	t.Helper()
	d := &device{Host: h, t: t, link: fmt.Sprintf("nl%d-%d", os.Getpid()%1000000, stockLinks.Add(1)), private: newKey(t)}
	h.Background("wireguard-go", "--foreground", d.link)
	socket := filepath.Join("/var/run/wireguard", d.link+".sock")
	labtest.Eventually(t, 10*time.Second, "wireguard-go", func() error { _, err := os.Stat(socket); return err })
	t.Cleanup(func() { _ = os.Remove(socket) })
	return d
}

// key is the device's public key.
func (d *device) key() string { return d.private.PublicKey().String() }

// up configures the device: its addresses, and the gateway as its one peer.
func (d *device) up(gateway wgtypes.Key, endpoint string, addrs []string, extra ...string) {
	d.t.Helper()
	d.conf(fmt.Sprintf("[Interface]\nPrivateKey = %s\n[Peer]\nPublicKey = %s\nEndpoint = %s\nAllowedIPs = %s\n%s\n",
		d.private, gateway, endpoint, clusterRanges, strings.Join(extra, "\n")))
	d.IP("link", "set", d.link, "mtu", "1420")
	for _, a := range addrs {
		d.address(a)
	}
	d.IP("link", "set", d.link, "up")
	for _, r := range strings.Split(clusterRanges, ",") {
		d.IP("route", "replace", r, "dev", d.link)
	}
	answer(d.t, d.Host, addrs...)
}

func (d *device) address(a string) {
	d.t.Helper()
	ip := netip.MustParseAddr(a)
	args := []string{"addr", "add", netip.PrefixFrom(ip, ip.BitLen()).String(), "dev", d.link}
	if ip.Is6() {
		args = append(args, "nodad")
	}
	d.IP(args...)
	d.addrs = append(d.addrs, a)
}

// conf is "wg setconf".
func (d *device) conf(text string) {
	d.t.Helper()
	path := filepath.Join(d.t.TempDir(), "wg.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.Run("wg", "setconf", d.link, path)
}

// dialIn adds a device with a host of its own that dials the gateway, and its manifest
// "device-NAME.yaml"; number chooses its addresses.
func (n *network) dialIn(g *gateway, name string, number int, extra ...string) (*device, *wire) {
	n.t.Helper()
	w := n.dialler(name)
	return n.deviceOn(g, w.host, name, number, extra...), w
}

func (n *network) deviceOn(g *gateway, h *labtest.Host, name string, number int, extra ...string) *device {
	n.t.Helper()
	d := newDevice(n.t, h)
	addrs := []string{fmt.Sprintf("10.99.0.%d", number), fmt.Sprintf("fd00:99::%x", number)}
	g.write("device-"+name+".yaml", deviceYAML(name, d.key(), append([]string{fmt.Sprintf("addresses: [%s, %q]", addrs[0], addrs[1])}, extra...)...))
	g.await("the gateway knows the device "+name, 5*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/"+name); p == nil || p.Reason == "NotConfigured" || p.Reason == "Waiting" {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	d.up(g.public, public+":51820", addrs)
	return d
}
