package wireguard

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	"pgregory.net/rapid"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// modelDevice does what WireGuard does with a configuration.
type modelDevice struct {
	peers map[wgtypes.Key]wgtypes.PeerConfig
	owner map[string]wgtypes.Key
}

func (m *modelDevice) configure(t *rapid.T, cfg wgtypes.Config) {
	for _, p := range cfg.Peers {
		have, known := m.peers[p.PublicKey]
		if p.UpdateOnly && !known {
			t.Fatalf("a peer that the device does not have is updated")
		}
		if p.Remove || p.ReplaceAllowedIPs {
			for ip, k := range m.owner {
				if k == p.PublicKey {
					delete(m.owner, ip)
				}
			}
		}
		if p.Remove {
			delete(m.peers, p.PublicKey)
			continue
		}
		if p.PresharedKey != nil {
			have.PresharedKey = p.PresharedKey
		}
		if p.PersistentKeepaliveInterval != nil {
			have.PersistentKeepaliveInterval = p.PersistentKeepaliveInterval
		}
		if p.Endpoint != nil {
			have.Endpoint = p.Endpoint
		}
		m.peers[p.PublicKey] = have
		for _, ip := range p.AllowedIPs {
			m.owner[ip.String()] = p.PublicKey
		}
	}
}

// TestDiffAgainstModel: after any changes and calls, lazy or not, a device that does as it
// is told has exactly the desired peers, but for those that wait, and each prefix leads to
// its peer or, while that waits, nowhere.
func TestDiffAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := applied{peers: map[wgtypes.Key]peer{}, lazy: rapid.Bool().Draw(t, "lazy")}
		m := &modelDevice{peers: map[wgtypes.Key]wgtypes.PeerConfig{}, owner: map[string]wgtypes.Key{}}
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			var d netstate.WireGuard
			for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(1, 5), 0, 5, rapid.ID[int]).Draw(t, "peers") {
				d.Peers = append(d.Peers, drawPeer(t, i))
			}
			c, err := a.diff(d, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			m.configure(t, c.config)
			a.record(c)
			if again, err := a.diff(d, time.Now()); err != nil || !again.empty() || len(again.config.Peers) > 0 || len(again.hello) > 0 {
				t.Fatalf("the second time: %d changes, %d greetings, %v", again.count, len(again.hello), err)
			}
			for k, p := range a.peers {
				if p.waits && rapid.Bool().Draw(t, "calls") {
					cfg, _ := a.config(k)
					m.configure(t, wgtypes.Config{Peers: []wgtypes.PeerConfig{cfg}})
					p.waits = false
					a.peers[k] = p
				}
			}
			m.compare(t, &a, d)
		}
	})
}

func drawPeer(t *rapid.T, i int) netstate.WireGuardPeer {
	p := netstate.WireGuardPeer{Name: rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "name"), PublicKey: netstate.Key{byte(i)}}
	for n := range 4 {
		if rapid.Bool().Draw(t, "allowed") {
			p.AllowedIPs = append(p.AllowedIPs, netip.PrefixFrom(deviceAddress(n), 32))
		}
	}
	if rapid.Bool().Draw(t, "psk") {
		p.PresharedKey = secret.New(slices.Repeat([]byte{7}, 32))
	}
	if rapid.IntRange(0, 3).Draw(t, "endpoint") == 0 {
		p.Endpoint = netip.AddrPortFrom(deviceAddress(i), 1)
		p.Initiate = rapid.Bool().Draw(t, "initiate")
	}
	p.PersistentKeepaliveSeconds = rapid.SampledFrom([]uint16{0, 25}).Draw(t, "keepalive")
	return p
}

func (m *modelDevice) compare(t *rapid.T, a *applied, d netstate.WireGuard) {
	w, _ := desiredPeers(d)
	want := w.peers
	routed := 0
	for k, p := range want {
		have, ok := m.peers[k]
		switch got := a.peers[k]; {
		case got.waits && (ok || !a.lazy || p.endpoint.IsValid()):
			t.Fatalf("peer %d waits: on the device %t, endpoint %s", k[0], ok, p.endpoint)
		case got.waits:
			continue
		case !ok:
			t.Fatalf("peer %d is neither on the device nor does it wait", k[0])
		}
		if psk := have.PresharedKey; (psk != nil && *psk != wgtypes.Key{}) != (p.psk.Reveal() != nil) {
			t.Fatalf("peer %d: pre-shared key %t", k[0], psk != nil)
		}
		if i := have.PersistentKeepaliveInterval; i != nil && *i != time.Duration(p.keepalive)*time.Second || i == nil && p.keepalive != 0 {
			t.Fatalf("peer %d: keepalive", k[0])
		}
		if p.endpoint.IsValid() && addrPort(have.Endpoint) != p.endpoint {
			t.Fatalf("peer %d: endpoint %v, want %s", k[0], have.Endpoint, p.endpoint)
		}
		for _, ip := range ipNets(p.allowed) {
			if m.owner[ip.String()] != k {
				t.Fatalf("%s leads to %d, want %d", ip.String(), m.owner[ip.String()][0], k[0])
			}
			routed++
		}
	}
	if routed != len(m.owner) {
		t.Fatalf("%d prefixes lead somewhere, want %d", len(m.owner), routed)
	}
	for k := range m.peers {
		if _, ok := want[k]; !ok {
			t.Fatalf("peer %d is still on the device", k[0])
		}
	}
}
