package wireguard

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// pair is our gateway with two stock peers at 10.9.0.2 and 10.9.0.3.
type pair struct {
	lab  *labtest.Lab
	h    *labtest.Host
	w    *WireGuard
	d    netstate.WireGuard
	a, b *stock
}

const gatewayAt = "192.0.2.1:51820"

func newPair(t *testing.T, kind Datapath) *pair {
	t.Helper()
	l, h, w, d := gateway(t, kind)
	p := &pair{lab: l, h: h, w: w, d: d}
	h.IP("link", "add", "br0", "type", "bridge")
	h.IP("addr", "add", "192.0.2.1/24", "dev", "br0")
	h.IP("link", "set", "br0", "up")
	for i, name := range []string{"a", "b"} {
		host := l.Host(name)
		l.Connect(h, "eth"+name, "", host, "eth0", fmt.Sprintf("192.0.2.%d/24", i+2))
		h.IP("link", "set", "eth"+name, "master", "br0")
		s := newStock(t, host, fmt.Sprintf("10.9.0.%d/24", i+2))
		s.peer(d.PublicKey, gatewayAt, "10.9.0.0/24,10.77.0.0/16")
		p.d.Peers = append(p.d.Peers, netstate.WireGuardPeer{
			Name: "device default/" + name, PublicKey: s.public, AllowedIPs: ips(fmt.Sprintf("10.9.0.%d/32", i+2)),
		})
		if i == 0 {
			p.a = s
		} else {
			p.b = s
		}
	}
	set(t, w, -1, p.d)
	if err := h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
		t.Fatal(err)
	}
	h.IP("route", "add", "10.77.0.0/16", "dev", "cvtwg0")
	p.reach(t, p.a, p.b)
	return p
}

// reach waits until the peers reach the gateway.
func (p *pair) reach(t *testing.T, peers ...*stock) {
	t.Helper()
	for _, s := range peers {
		labtest.Eventually(t, 10*time.Second, "ping from "+s.Name, func() error { return s.ping("10.9.0.1") })
	}
}

// sessions tells the peers' last handshakes by key.
func (p *pair) sessions(t *testing.T) map[netstate.Key]time.Time {
	out := map[netstate.Key]time.Time{}
	for _, x := range observe(t, p.w).Peers {
		out[x.PublicKey] = x.LastHandshake
	}
	return out
}

// TestEachChange: every kind of change is one change, is in effect, and leaves the other
// peer's session alone.
func TestEachChange(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		set(t, p.w, 0, p.d)
		other := p.sessions(t)[p.b.public]
		pa, pb := &p.d.Peers[0], &p.d.Peers[1]

		pa.AllowedIPs = append(pa.AllowedIPs, ips("10.77.1.0/24")...)
		p.a.IP("addr", "add", "10.77.1.1/32", "dev", "lo")
		p.b.IP("addr", "add", "10.77.1.1/32", "dev", "lo")
		set(t, p.w, 1, p.d)
		p.h.Run("ping", "-c1", "-W1", "10.77.1.1")
		rx := func(i int) uint64 {
			for _, x := range observe(t, p.w).Peers {
				if x.PublicKey == p.d.Peers[i].PublicKey {
					return x.ReceivedBytes
				}
			}
			return 0
		}

		// The prefix moves to the other peer, listed before and after it.
		pa.AllowedIPs, pb.AllowedIPs = pa.AllowedIPs[:1], append(pb.AllowedIPs, pa.AllowedIPs[1])
		set(t, p.w, 2, p.d)
		before := rx(1)
		p.h.Run("ping", "-c1", "-W1", "10.77.1.1")
		if rx(1) == before {
			t.Error("the prefix did not move to the second peer")
		}
		pa.AllowedIPs, pb.AllowedIPs = append(pa.AllowedIPs, pb.AllowedIPs[1]), pb.AllowedIPs[:1]
		set(t, p.w, 2, p.d)
		before = rx(0)
		p.h.Run("ping", "-c1", "-W1", "10.77.1.1")
		if rx(0) == before {
			t.Error("the prefix did not move back")
		}
		pa.AllowedIPs = pa.AllowedIPs[:1]
		set(t, p.w, 1, p.d)
		if _, err := p.h.Try("ping", "-c1", "-W1", "10.77.1.1"); err == nil {
			t.Error("a prefix that was taken away still answers")
		}

		pa.PersistentKeepaliveSeconds = 1
		set(t, p.w, 1, p.d)
		tx := p.sent(t, 0)
		labtest.Eventually(t, 4*time.Second, "keepalives", func() error {
			if p.sent(t, 0) == tx {
				return fmt.Errorf("none sent")
			}
			return nil
		})
		pa.PersistentKeepaliveSeconds = 0
		set(t, p.w, 1, p.d)

		p.d.FirewallMark = netstate.MarkOuter
		set(t, p.w, 1, p.d)
		p.h.Run("nft", "add table inet m; add chain inet m o { type filter hook output priority 0; }; add rule inet m o udp sport 51820 meta mark != 0xc10000 drop")
		p.reach(t, p.a)

		p.d.ListenPort = 51900
		set(t, p.w, 1, p.d)
		p.a.wg("peer", p.d.PublicKey.String(), "endpoint", "192.0.2.1:51900")
		p.b.wg("peer", p.d.PublicKey.String(), "endpoint", "192.0.2.1:51900")
		p.reach(t, p.a, p.b)
		if got := p.sessions(t)[p.b.public]; !got.Equal(other) {
			t.Errorf("the other peer's session was made anew: %s, had %s", got, other)
		}

		// Fault 11: silent at once.
		p.d.Peers = p.d.Peers[1:]
		set(t, p.w, 1, p.d)
		if p.a.ping("10.9.0.1") == nil {
			t.Error("a removed peer is still answered")
		}
		p.reach(t, p.b)
		set(t, p.w, 0, p.d)
	})
}

func (p *pair) sent(t *testing.T, i int) uint64 {
	for _, x := range observe(t, p.w).Peers {
		if x.PublicKey == p.d.Peers[i].PublicKey {
			return x.SentBytes
		}
	}
	return 0
}

// TestPresharedKey: the peers agree only with the same one.
func TestPresharedKey(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		psk := newPSK()
		p.d.Peers[0].PresharedKey = psk
		set(t, p.w, 1, p.d)
		// A new session needs it now: the peer starts afresh.
		p.a.wg("peer", p.d.PublicKey.String(), "remove")
		p.a.peer(p.d.PublicKey, gatewayAt, "10.9.0.0/24")
		if p.a.ping("10.9.0.1") == nil {
			t.Error("a peer without the pre-shared key is answered")
		}
		p.a.wg("peer", p.d.PublicKey.String(), "remove")
		p.a.peer(p.d.PublicKey, gatewayAt, "10.9.0.0/24", "preshared-key", p.a.file(netstate.Key(psk.Reveal()).String()))
		p.reach(t, p.a)
		p.d.Peers[0].PresharedKey = secret.Bytes{}
		set(t, p.w, 1, p.d)
		set(t, p.w, 0, p.d)
	})
}

// TestSpoofedInnerSource (fault 9): what a peer sends with another's address is dropped.
func TestSpoofedInnerSource(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		p.h.Run("nft", "add table inet c; add chain inet c i { type filter hook prerouting priority -300; }; add rule inet c i iifname cvtwg0 ip saddr 10.9.0.3 counter; add rule inet c i iifname cvtwg0 ip saddr 10.9.0.2 counter")
		p.a.IP("addr", "add", "10.9.0.3/32", "dev", "lo")
		_, _ = p.a.Try("ping", "-c3", "-i0.1", "-W1", "-I", "10.9.0.3", "10.9.0.1")
		p.reach(t, p.a) // the positive control
		out := p.h.Run("nft", "list", "table", "inet", "c")
		if !strings.Contains(out, "10.9.0.3 counter packets 0 ") || strings.Contains(out, "10.9.0.2 counter packets 0 ") {
			t.Errorf("counters of spoofed and honest packets:\n%s", out)
		}
	})
}

// TestLinkLifecycle: made, deleted by hand and made again, renamed away, removed.
func TestLinkLifecycle(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		p.h.IP("link", "del", "cvtwg0")
		labtest.Eventually(t, 3*time.Second, "made again", func() error {
			n, err := p.w.Set(context.Background(), []netstate.WireGuard{p.d})
			if err == nil && n == 0 {
				err = fmt.Errorf("nothing changed")
			}
			return err
		})
		if err := p.h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
			t.Fatal(err)
		}
		for _, s := range []*stock{p.a, p.b} { // stock peers notice after 15 s
			s.wg("private-key", s.file(s.private.String()))
			s.wg("peer", p.d.PublicKey.String(), "remove")
			s.peer(p.d.PublicKey, gatewayAt, "10.9.0.0/24")
		}
		p.reach(t, p.a, p.b)
		set(t, p.w, 0, p.d)

		p.h.IP("link", "add", "cvtforeign", "type", "veth", "peer", "name", "other0")
		second := p.d
		second.Link, second.ListenPort = "cvtwg1", 51821
		set(t, p.w, -1, p.d, second)
		set(t, p.w, 1, p.d)
		if out := p.h.Run("ip", "-br", "link"); strings.Contains(out, "cvtwg1") || !strings.Contains(out, "cvtforeign") {
			t.Errorf("after removing cvtwg1:\n%s", out)
		}
		if err := p.w.Close(); err != nil {
			t.Fatal(err)
		}
		if out := p.h.Run("ip", "-br", "link"); strings.Contains(out, "cvtwg") || !strings.Contains(out, "cvtforeign") {
			t.Errorf("after Close:\n%s", out)
		}
	})
}

// TestSecondProcess: one that starts while the kernel holds the state changes nothing.
func TestSecondProcess(t *testing.T) {
	requireKernel(t)
	p := newPair(t, Kernel)
	p.d.Peers[0].PersistentKeepaliveSeconds = 25
	p.d.Peers[0].Endpoint = observe(t, p.w).Peers[0].Endpoint
	p.d.Peers[1].PresharedKey = newPSK()
	set(t, p.w, -1, p.d)
	second := newWireGuard(t, p.h, Kernel)
	set(t, second, 0, p.d)
	set(t, second, 0, p.d)
}

// TestPortInUse: the error names the cause, and the next Set tries again. The kernel
// opens the port when the link is set up: then it is who does that, internal/route, that
// gets the error; when the link is up, it is Set.
func TestPortInUse(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		_, h, w, d := gateway(t, kind)
		take := func(port string) (taken net.PacketConn) {
			h.Do(func() (err error) { taken, err = net.ListenPacket("udp4", port); return err })
			return taken
		}
		inUse := func(err error) error {
			if err == nil || !strings.Contains(strings.ToLower(err.Error()), "address already in use") {
				return fmt.Errorf("want address already in use: %w", err)
			}
			return nil
		}
		taken := take(":51820")
		_, _ = w.Set(context.Background(), []netstate.WireGuard{d})
		err := h.Up("cvtwg0", "")
		if kind == Kernel {
			if err := inUse(err); err != nil {
				t.Errorf("setting the link up: %v", err)
			}
			_ = taken.Close()
			if err := h.Up("cvtwg0", ""); err != nil {
				t.Errorf("the port is free again: %v", err)
			}
			set(t, w, 0, d)
			taken = take(":51821")
			d.ListenPort = 51821
		}
		labtest.Eventually(t, 5*time.Second, "an error", func() error {
			_, err := w.Set(context.Background(), []netstate.WireGuard{d})
			return inUse(err)
		})
		_ = taken.Close()
		set(t, w, -1, d)
		set(t, w, 0, d)
	})
}

// TestOthersLoseNothing: peers come and go among a thousand, and a probe each 10 ms of
// another peer loses none.
func TestOthersLoseNothing(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		more := manyPeers(1000)
		p.d.Peers = append(p.d.Peers, more[:900]...)
		set(t, p.w, 900, p.d)
		out := make(chan string, 1)
		go func() {
			s, _ := p.a.Try("ping", "-q", "-i", "0.01", "-c", "200", "-W", "2", "10.9.0.1")
			out <- s
		}()
		for i := range 100 {
			p.d.Peers = append(p.d.Peers, more[900+i])
			began := time.Now()
			set(t, p.w, 1, p.d)
			if d := time.Since(began); d > 100*time.Millisecond {
				t.Errorf("one peer added in %s", d)
			}
			time.Sleep(5 * time.Millisecond)
		}
		p.d.Peers = p.d.Peers[:2]
		set(t, p.w, 1000, p.d)
		if s := <-out; !strings.Contains(s, " 0% packet loss") {
			t.Error(s)
		}
	})
}
