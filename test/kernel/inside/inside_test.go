// Package inside holds tests that need a kernel with WireGuard, ESP, xfrm interfaces and
// netem. They run inside the virtual machine of test/kernel.
package inside

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

func newLab(t *testing.T, programs ...string) *labtest.Lab {
	t.Helper()
	if os.Getenv("CULVERT_KERNEL") != "1" {
		t.Skip("SKIP: runs inside the virtual machine: make test-kernel")
	}
	return labtest.New(t, programs...)
}

// What the other suites take for granted inside the machine.
func TestKernelHas(t *testing.T) {
	l := newLab(t, "tc", "nft")
	h := l.Host("a")
	for _, kind := range []string{"wireguard", "dummy", "bridge"} {
		h.IP("link", "add", "x0", "type", kind)
		h.IP("link", "del", "x0")
	}
	h.IP("link", "add", "d0", "type", "dummy")
	h.IP("link", "set", "d0", "up")
	h.IP("link", "add", "x0", "type", "xfrm", "dev", "d0", "if_id", "7")
	h.IP("link", "add", "v0", "type", "vxlan", "id", "7", "dstport", "4789", "dev", "d0")
	for _, family := range [][2]string{{"192.0.2.1", "192.0.2.2"}, {"2001:db8::1", "2001:db8::2"}} {
		h.IP("xfrm", "state", "add", "src", family[0], "dst", family[1], "proto", "esp", "spi", "0x100", "mode", "tunnel",
			"if_id", "7", "aead", "rfc4106(gcm(aes))", "0x"+strings.Repeat("42", 36), "128")
	}
	h.Run("tc", "qdisc", "add", "dev", "d0", "root", "netem", "loss", "5%", "delay", "10ms")
	ruleset := t.TempDir() + "/rules.nft"
	if err := os.WriteFile(ruleset, []byte(`table inet t {
	map m { type ipv4_addr . inet_proto . inet_service : verdict; }
	chain c { dnat ip to numgen random mod 2 map { 0 : 192.0.2.1, 1 : 192.0.2.2 }; }
	chain nat { type nat hook prerouting priority dstnat; ip daddr . meta l4proto . th dport vmap @m; }
	chain divert { type filter hook prerouting priority mangle; meta l4proto tcp tproxy ip to 127.0.0.1:1; fib saddr . iif oif missing drop; }
	chain rewrite { type nat hook postrouting priority srcnat; masquerade; }
}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	h.Run("nft", "-f", ruleset)
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Error(err)
	}
}

// Two machines, kernel WireGuard between them, and a lossy underlay.
func TestWireGuard(t *testing.T) {
	l := newLab(t, "wg", "ping", "tc")
	a, b := l.Host("a"), l.Host("b")
	l.Connect(a, "eth0", "192.0.2.1/24", b, "eth0", "192.0.2.2/24")
	keys := map[*labtest.Host]string{}
	for i, h := range []*labtest.Host{a, b} {
		key := strings.TrimSpace(h.Run("wg", "genkey"))
		file := fmt.Sprintf("%s/key%d", t.TempDir(), i)
		if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
		h.IP("link", "add", "wg0", "type", "wireguard")
		h.Run("wg", "set", "wg0", "private-key", file, "listen-port", "51820")
		h.IP("addr", "add", fmt.Sprintf("10.0.0.%d/24", i+1), "dev", "wg0")
		h.IP("link", "set", "wg0", "up")
		keys[h] = strings.TrimSpace(h.Run("wg", "show", "wg0", "public-key"))
	}
	a.Run("wg", "set", "wg0", "peer", keys[b], "allowed-ips", "10.0.0.2/32", "endpoint", "192.0.2.2:51820")
	b.Run("wg", "set", "wg0", "peer", keys[a], "allowed-ips", "10.0.0.1/32")
	labtest.Eventually(t, 20*time.Second, "ping through the tunnel", func() error {
		_, err := a.Try("ping", "-n", "-c", "1", "-W", "1", "10.0.0.2")
		return err
	})
	// netem works on the underlay: nothing passes when all is lost.
	a.Run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "loss", "100%")
	if out, err := a.Try("ping", "-n", "-c", "1", "-W", "1", "10.0.0.2"); err == nil {
		t.Errorf("an underlay that loses everything let a ping pass: %s", out)
	}
}

// Two machines, ESP of the kernel with an xfrm interface each.
func TestESP(t *testing.T) {
	l := newLab(t, "ping")
	a, b := l.Host("a"), l.Host("b")
	l.Connect(a, "eth0", "192.0.2.1/24", b, "eth0", "192.0.2.2/24")
	for i, h := range []*labtest.Host{a, b} {
		inner := fmt.Sprintf("10.0.0.%d/24", i+1)
		h.IP("link", "add", "x0", "type", "xfrm", "dev", "eth0", "if_id", "7")
		h.IP("addr", "add", inner, "dev", "x0")
		h.IP("link", "set", "x0", "up")
		for j, pair := range [][2]string{{"192.0.2.1", "192.0.2.2"}, {"192.0.2.2", "192.0.2.1"}} {
			h.IP("xfrm", "state", "add", "src", pair[0], "dst", pair[1], "proto", "esp", "spi", fmt.Sprint(0x100+j), "mode", "tunnel",
				"if_id", "7", "aead", "rfc4106(gcm(aes))", "0x"+strings.Repeat("42", 36), "128")
			dir := "out"
			if i != j {
				dir = "in"
			}
			h.IP("xfrm", "policy", "add", "src", "0.0.0.0/0", "dst", "0.0.0.0/0", "dir", dir, "if_id", "7",
				"tmpl", "src", pair[0], "dst", pair[1], "proto", "esp", "mode", "tunnel")
		}
	}
	labtest.Eventually(t, 10*time.Second, "ping through ESP", func() error {
		_, err := a.Try("ping", "-n", "-c", "1", "-W", "1", "10.0.0.2")
		return err
	})
}
