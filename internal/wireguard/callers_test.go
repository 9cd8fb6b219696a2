package wireguard

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// TestCallsBack: a load balancer that hides addresses gives a peer another port, and then
// another address too, when the gateway's successor takes over. The successor finds the peer by
// the data that it sends; by itself a stock one begins anew after 15 s.
func TestCallsBack(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		l := labtest.New(t, "ping", "wg", "nft", "conntrack")
		h, r, far := l.Host("gw"), l.Host("router"), l.Host("far")
		l.Connect(h, "eth0", "192.0.2.1/24", r, "in", "192.0.2.2/24")
		l.Connect(r, "out", "198.51.100.1/24", far, "eth0", "198.51.100.2/24")
		r.Sysctl("net/ipv4/ip_forward", "1")
		h.IP("route", "add", "10.5.0.2", "via", "192.0.2.2")
		balance := func(as string) {
			r.Run("nft", "add table ip b; delete table ip b; table ip b {"+
				"chain pre { type nat hook prerouting priority dstnat; iifname out udp dport 51820 dnat to 192.0.2.1; };"+
				"chain post { type nat hook postrouting priority srcnat; oifname in meta l4proto udp snat to "+as+"; }; }")
			r.Run("sh", "-c", "conntrack -F")
		}
		h.Run("nft", "table ip t { chain c { type filter hook input priority 0; ct state invalid drop; }; }")
		own, s := newKeys(t), newStock(t, far, "10.9.0.2/24")
		s.peer(own.public, "198.51.100.1:51820", "10.9.0.0/24")
		d := netstate.WireGuard{
			Link: "cvtwg0", PrivateKey: own.secret(), PublicKey: own.public, ListenPort: 51820,
			Peers: []netstate.WireGuardPeer{{Name: "device default/a", PublicKey: s.public, AllowedIPs: ips("10.9.0.2/32")}},
		}
		start := func() *WireGuard {
			w := newWireGuard(t, h, kind)
			set(t, w, -1, d)
			if err := h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
				t.Fatal(err)
			}
			return w
		}
		balance("192.0.2.2:2000")
		w := start()
		labtest.Eventually(t, 10*time.Second, "ping", func() error { return s.ping("10.9.0.1") })
		s.Background("ping", "-q", "-i0.2", "10.9.0.1")
		for _, next := range []string{"192.0.2.2:3000", "10.5.0.2:4000"} {
			d.Peers[0].Endpoint, d.Peers[0].Initiate = observe(t, w).Peers[0].Endpoint, true
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			balance(next)
			began := time.Now()
			w = start()
			labtest.Eventually(t, 8*time.Second, "the peer is found", func() error {
				if p := observe(t, w).Peers[0]; p.LastHandshake.IsZero() || p.Endpoint != netip.MustParseAddrPort(next) {
					return fmt.Errorf("last handshake %s, at %s, want %s", p.LastHandshake, p.Endpoint, next)
				}
				return nil
			})
			t.Logf("a session with %s after %s", next, time.Since(began).Round(time.Millisecond))
			set(t, w, 0, d)
		}
	})
}

func TestCallers(t *testing.T) {
	at := netip.MustParseAddrPort
	c := callers{flows: map[netip.Addr][]netip.AddrPort{}}
	for port := range uint16(20) {
		a := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), 1000+port)
		c.flows[a.Addr()] = append(c.flows[a.Addr()], a)
	}
	got := c.from(at("192.0.2.1:1000"), map[netip.AddrPort]bool{at("192.0.2.1:1001"): true})
	if len(got) != callersMax || got[0] != at("192.0.2.1:1002") {
		t.Errorf("%v, want %d that begin behind home and the one that is taken", got, callersMax)
	}
	if got := c.from(at("192.0.2.2:1000"), nil); len(got) > 0 {
		t.Errorf("another address has the flows %v", got)
	}
	inside := at("10.244.1.1:7")
	c.flows[inside.Addr()] = []netip.AddrPort{inside}
	if got := c.from(at("192.0.2.2:1000"), nil); !slices.Equal(got, []netip.AddrPort{inside}) {
		t.Errorf("%v, want %s, which is the cluster's own", got, inside)
	}
	if got := c.from(at("[2001:db8::1]:1000"), nil); len(got) > 0 {
		t.Errorf("an IPv6 address has the flows %v", got)
	}
}

func TestTurn(t *testing.T) {
	at := netip.MustParseAddrPort
	found, home := []netip.AddrPort{at("192.0.2.1:1"), at("192.0.2.1:2")}, at("192.0.2.1:9")
	var got []uint16
	for n := range 6 {
		got = append(got, turn(found, home, n+1).Port())
	}
	if want := []uint16{1, 9, 2, 9, 1, 9}; !slices.Equal(got, want) {
		t.Errorf("the attempts go to ports %v, want %v", got, want)
	}
}
