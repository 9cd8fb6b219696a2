package wireguard

import (
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// gateway is ours, at 192.0.2.1:51820 with 10.9.0.1 inside.
func gateway(t *testing.T, kind Datapath) (l *labtest.Lab, h *labtest.Host, w *WireGuard, d netstate.WireGuard) {
	l = labtest.New(t, "ping", "wg", "nft", "conntrack")
	h = l.Host("gw")
	w = newWireGuard(t, h, kind)
	k := newKeys(t)
	return l, h, w, netstate.WireGuard{Link: "cvtwg0", PrivateKey: k.secret(), PublicKey: k.public, ListenPort: 51820}
}

// TestDialInAndRoam: a peer without a configured endpoint dials in, then its address changes
// (its NAT gets another one).
func TestDialInAndRoam(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		l, h, w, d := gateway(t, kind)
		dev, nat := l.Host("dev"), l.Host("nat")
		l.Connect(h, "eth0", "192.0.2.1/24", nat, "eth0", "192.0.2.2/24")
		l.Connect(nat, "eth1", "10.0.0.1/24", dev, "eth0", "10.0.0.2/24")
		dev.IP("route", "add", "default", "via", "10.0.0.1")
		nat.Sysctl("net/ipv4/ip_forward", "1")
		nat.Run("nft", "add table ip n; add chain ip n p { type nat hook postrouting priority 100; }; add rule ip n p oifname eth0 masquerade")
		s := newStock(t, dev, "10.9.0.2/24")
		d.Peers = []netstate.WireGuardPeer{{Name: "device default/phone", PublicKey: s.public, AllowedIPs: ips("10.9.0.2/32")}}
		set(t, w, -1, d)
		if err := h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
			t.Fatal(err)
		}
		s.peer(d.PublicKey, "192.0.2.1:51820", "10.9.0.0/24")
		labtest.Eventually(t, 5*time.Second, "ping through the tunnel", func() error { return s.ping("10.9.0.1") })
		p := observe(t, w).Peers[0]
		if p.Endpoint.Addr() != netip.MustParseAddr("192.0.2.2") || p.LastHandshake.IsZero() || p.ReceivedBytes == 0 || p.SentBytes == 0 {
			t.Errorf("after dialling in: %+v", p)
		}

		nat.IP("addr", "del", "192.0.2.2/24", "dev", "eth0")
		nat.IP("addr", "add", "192.0.2.77/24", "dev", "eth0")
		nat.Run("conntrack", "-F")
		began := time.Now()
		labtest.Eventually(t, 5*time.Second, "ping from the new address", func() error { return s.ping("10.9.0.1") })
		t.Logf("back after %s", time.Since(began).Round(time.Millisecond))
		if got := observe(t, w).Peers[0].Endpoint.Addr(); got != netip.MustParseAddr("192.0.2.77") {
			t.Errorf("endpoint %s, want 192.0.2.77", got)
		}
		// And in the other direction, to where it is now.
		h.Run("ping", "-c1", "-W1", "10.9.0.2")
		set(t, w, 0, d)
		if got := observe(t, w).Peers[0].Endpoint.Addr(); got != netip.MustParseAddr("192.0.2.77") {
			t.Errorf("a second Set moved the endpoint to %s", got)
		}
	})
}
