package wireguard

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// TestSmallUnderlay (fault 28): with 1280 bytes inside and 1280 on one of two hops outside
// the outer packets are fragmented, not refused or lost: 10 MiB arrive byte-exact each way,
// over IPv4 with ICMP blocked, and over IPv6, where the sender must be told.
func TestSmallUnderlay(t *testing.T) {
	for _, c := range []struct {
		name, prefix string
		bits         int
	}{{"IPv4", "192.0.%d.%d", 24}, {"IPv6", "2001:db8:%d::%d", 64}} {
		at := func(net, host int) string { return fmt.Sprintf(c.prefix, net, host) }
		cidr := func(net, host int) string { return fmt.Sprintf("%s/%d", at(net, host), c.bits) }
		t.Run(c.name, func(t *testing.T) {
			onEveryDatapath(t, func(t *testing.T, kind Datapath) {
				l, h, w, d := gateway(t, kind)
				far, r := l.Host("far"), l.Host("router")
				l.Connect(h, "eth0", cidr(2, 1), r, "eth0", cidr(2, 9))
				l.Connect(far, "eth0", cidr(3, 1), r, "eth1", cidr(3, 9))
				h.IP("route", "add", "default", "via", at(2, 9))
				far.IP("route", "add", "default", "via", at(3, 9))
				far.IP("link", "set", "eth0", "mtu", "1280")
				r.IP("link", "set", "eth1", "mtu", "1280")
				r.Sysctl("net/ipv4/ip_forward", "1")
				r.Sysctl("net/ipv6/conf/all/forwarding", "1")
				r.Run("nft", "add table ip f; add chain ip f o { type filter hook output priority 0; }; add rule ip f o ip protocol icmp drop")
				other := newWireGuard(t, far, kind)
				k := newKeys(t)
				o := netstate.WireGuard{Link: "cvtwg0", PrivateKey: k.secret(), PublicKey: k.public, ListenPort: 51820}
				o.Peers = []netstate.WireGuardPeer{{
					Name: "gateway", PublicKey: d.PublicKey, AllowedIPs: ips("10.9.0.1/32"), Initiate: true,
					Endpoint: netip.AddrPortFrom(netip.MustParseAddr(at(2, 1)), 51820),
				}}
				d.Peers = []netstate.WireGuardPeer{{Name: "site default/far", PublicKey: k.public, AllowedIPs: ips("10.9.0.2/32")}}
				for i, x := range []struct {
					h *labtest.Host
					w *WireGuard
					d netstate.WireGuard
				}{{h, w, d}, {far, other, o}} {
					set(t, x.w, -1, x.d)
					if err := x.h.Up("cvtwg0", fmt.Sprintf("10.9.0.%d/24", i+1)); err != nil {
						t.Fatal(err)
					}
					x.h.IP("link", "set", "cvtwg0", "mtu", "1280")
				}
				// As large as it gets, not to be fragmented inside.
				labtest.Eventually(t, 10*time.Second, "large pings", func() error {
					_, err := far.Try("ping", "-c1", "-W1", "-Mdo", "-s1252", "10.9.0.1")
					return err
				})
				transfer(t, far, h, "10.9.0.1")
				transfer(t, h, far, "10.9.0.2")
			})
		})
	}
}

// TestMTUIsFollowed: packets are padded to 16 bytes, but never beyond the link's MTU, also
// when that changes: 1275 bytes inside are 1335 outside (RFC 791, RFC 768 and 32 bytes of
// WireGuard).
func TestMTUIsFollowed(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		p.h.Run("nft", "add table inet m; add chain inet m o { type filter hook output priority 0; }; add rule inet m o udp sport 51820 meta length 1335 counter; add rule inet m o udp sport 51820 meta length 1340 counter")
		count := func() (exact, padded bool) {
			p.h.Run("ping", "-c3", "-i0.01", "-W1", "-s1247", "10.9.0.2")
			out := p.h.Run("nft", "list", "chain", "inet", "m", "o")
			return !strings.Contains(out, "1335 counter packets 0 "), !strings.Contains(out, "1340 counter packets 0 ")
		}
		p.h.IP("link", "set", "cvtwg0", "mtu", "1400")
		if exact, padded := count(); exact || !padded {
			t.Errorf("MTU 1400: packets of 1335 bytes outside: %t, of 1340: %t", exact, padded)
		}
		p.h.IP("link", "set", "cvtwg0", "mtu", "1275")
		labtest.Eventually(t, 3*time.Second, "the new MTU", func() error {
			if exact, _ := count(); !exact {
				return fmt.Errorf("no packet has 1335 bytes outside")
			}
			return nil
		})
	})
}

// transfer sends 10 MiB over TCP and compares; 1 MiB in an emulated machine.
func transfer(t *testing.T, from, to *labtest.Host, address string) {
	t.Helper()
	var ln net.Listener
	to.Do(func() (err error) { ln, err = net.Listen("tcp", net.JoinHostPort(address, "7000")); return err })
	defer ln.Close()
	data := make([]byte, 10<<20)
	if os.Getenv("CULVERT_KERNEL") != "" {
		data = data[:1<<20]
	}
	_, _ = rand.Read(data)
	got := make(chan [32]byte, 1)
	go func() {
		defer close(got)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		if err == nil {
			got <- sha256.Sum256(b)
		}
	}()
	began := time.Now()
	var c net.Conn
	from.Do(func() (err error) { c, err = net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second); return err })
	_ = c.SetDeadline(began.Add(time.Minute))
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	select {
	case sum := <-got:
		if sum != sha256.Sum256(data) {
			t.Error("what arrived is not what was sent")
		}
	case <-time.After(time.Minute):
		t.Fatal("not all arrived within a minute")
	}
	t.Logf("%d MiB in %s", len(data)>>20, time.Since(began).Round(time.Millisecond))
}
