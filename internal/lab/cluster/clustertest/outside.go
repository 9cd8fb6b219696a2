package clustertest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// named is a test under another name.
type named struct {
	testing.TB
	name string
}

func (n named) Name() string { return n.name }

// Behind makes a machine in the network lan ("192.168.77.0/24" is written "192.168.77": .1 is
// the router, .2 the machine) behind a router outside, with the given public address, that
// translates addresses. The test server runs on it. All goes at the test's end.
func (c *Cluster) Behind(name, public, lan string) *labtest.Host {
	c.t.Helper()
	router := c.OutsideHost(name+"nat", public+"/15")
	l := labtest.New(named{c.t, name}, "nft")
	h := l.Host(name)
	if err := l.Lab.Connect(router, "lan", lan+".1/24", h.Host, "eth0", lan+".2/24"); err != nil {
		c.t.Fatal(err)
	}
	h.IP("route", "add", "default", "via", lan+".1")
	if err := router.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		c.t.Fatal(err)
	}
	if _, err := router.Output(c.t.Context(), "nft", "table ip nat { chain post { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }"); err != nil {
		c.t.Fatal(err)
	}
	h.Background(c.TestServer())
	return h
}

// Device is a machine behind a router outside with a stock WireGuard in user space.
type Device struct {
	*labtest.Host
	Address string // its own in the VPN, IPv4
}

var devices atomic.Int32

// Device makes a machine as Behind does and gives wg-quick(8) a configuration as "kubectl
// culvert device config" prints it.
func (c *Cluster) Device(name, public, lan, config string) *Device {
	c.t.Helper()
	labtest.Require(c.t, "wg-quick", "wireguard-go", "curl")
	d := &Device{Host: c.Behind(name, public, lan)}
	for line := range strings.Lines(config) {
		if v, ok := strings.CutPrefix(line, "Address = "); ok {
			d.Address, _, _ = strings.Cut(strings.TrimSpace(v), "/")
		}
	}
	// The name of the file is that of the link, and of a socket that all namespaces share.
	file := filepath.Join(c.t.TempDir(), fmt.Sprintf("cv%d-%d.conf", os.Getpid()%1000000, devices.Add(1)))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.t.Setenv("WG_QUICK_USERSPACE_IMPLEMENTATION", "wireguard-go")
	d.Run("wg-quick", "up", file)
	c.t.Cleanup(func() { _, _ = d.Try("wg-quick", "down", file) })
	return d
}

// Get fetches a URL, within a second, from the device.
func (d *Device) Get(url string) (string, error) {
	return d.Try("curl", "-s", "-S", "-m", "1", url)
}
