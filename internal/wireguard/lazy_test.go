package wireguard

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	wg "github.com/tailscale/wireguard-go/device"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// initiationBy makes a handshake initiation to the gateway that names one key and is
// proved with another, as of a time.
func initiationBy(t testing.TB, gateway, named netstate.Key, private wgtypes.Key, at time.Time) []byte {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	to, err := ecdh.X25519().NewPublicKey(gateway[:])
	must(err)
	own, err := ecdh.X25519().NewPrivateKey(private[:])
	must(err)
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	must(err)
	es, err := ephemeral.ECDH(to)
	must(err)
	ss, err := own.ECDH(to)
	must(err)

	p := binary.LittleEndian.AppendUint32(nil, wg.MessageInitiationType)
	p = binary.LittleEndian.AppendUint32(p, 4711)
	p = append(p, ephemeral.PublicKey().Bytes()...)
	hash := blake2s.Sum256(append(wg.InitialHash[:], gateway[:]...))
	var chain, key [blake2s.Size]byte
	hash = blake2s.Sum256(append(hash[:], p[ephemeralAt:]...))
	wg.KDF1(&chain, wg.InitialChainKey[:], p[ephemeralAt:])
	for _, x := range []struct{ secret, text []byte }{{es, named[:]}, {ss, timestamp(at)}} {
		wg.KDF2(&chain, &key, chain[:], x.secret)
		aead, err := chacha20poly1305.New(key[:])
		must(err)
		sealed := aead.Seal(nil, make([]byte, 12), x.text, hash[:])
		hash = blake2s.Sum256(append(hash[:], sealed...))
		p = append(p, sealed...)
	}
	p = append(p, make([]byte, 32)...)
	var macs wg.CookieGenerator
	macs.Init(wg.NoisePublicKey(gateway))
	macs.AddMacs(p)
	return p
}

// timestamp is TAI64N.
func timestamp(at time.Time) []byte {
	b := binary.BigEndian.AppendUint64(nil, 1<<62+10+uint64(at.Unix()))
	return binary.BigEndian.AppendUint32(b, uint32(at.Nanosecond()))
}

// onDevice lists the peers that the library has.
func onDevice(t testing.TB, w *WireGuard) map[netstate.Key]wgtypes.Peer {
	t.Helper()
	d, err := w.devices["cvtwg0"].read()
	if err != nil {
		t.Fatal(err)
	}
	out := map[netstate.Key]wgtypes.Peer{}
	for _, p := range d.Peers {
		out[netstate.Key(p.PublicKey)] = p
	}
	return out
}

// caller sends initiations from another namespace and sees whether they are answered.
type caller struct{ conn net.Conn }

func newCaller(t *testing.T, h *labtest.Host) *caller {
	t.Helper()
	c := &caller{}
	h.Do(func() (err error) { c.conn, err = net.Dial("udp4", gatewayAt); return err })
	t.Cleanup(func() { _ = c.conn.Close() })
	return c
}

// call reports whether the initiation is answered with a handshake response.
func (c *caller) call(t *testing.T, packet []byte) bool {
	t.Helper()
	if _, err := c.conn.Write(packet); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 200)
	for deadline := time.Now().Add(300 * time.Millisecond); ; {
		_ = c.conn.SetReadDeadline(deadline)
		n, err := c.conn.Read(b)
		if err != nil {
			return false
		}
		if n == wg.MessageResponseSize && binary.LittleEndian.Uint32(b) == wg.MessageResponseType {
			return true
		}
	}
}

// TestPeersWaitUntilTheyCall: who cannot be reached costs nothing until its own first
// handshake; nobody else can change that.
func TestPeersWaitUntilTheyCall(t *testing.T) {
	inUserSpace(t, func(t *testing.T) {
		l, h, w, d := gateway(t, UserSpace)
		far := l.Host("far")
		l.Connect(h, "eth0", "192.0.2.1/24", far, "eth0", "192.0.2.2/24")
		device, other, stranger, site := newKeys(t), newKeys(t), newKeys(t), newKeys(t)
		d.Peers = []netstate.WireGuardPeer{
			{Name: "device default/a", PublicKey: device.public, AllowedIPs: ips("10.9.0.2/32")},
			{Name: "device default/b", PublicKey: other.public, AllowedIPs: ips("10.9.0.3/32"), PersistentKeepaliveSeconds: 1},
			{Name: "site default/c", PublicKey: site.public, AllowedIPs: ips("10.8.0.0/16"), Endpoint: netip.MustParseAddrPort("192.0.2.2:9")},
		}
		set(t, w, 6, d)
		if err := h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, 5*time.Second, "listening", func() error { return w.devices["cvtwg0"].listening() })
		expect := func(when string, want ...netstate.Key) {
			t.Helper()
			got := onDevice(t, w)
			for _, k := range want {
				if _, ok := got[k]; !ok {
					t.Errorf("%s: a peer is not on the device", when)
				}
			}
			if len(got) != len(want) {
				t.Errorf("%s: %d peers on the device, want %d", when, len(got), len(want))
			}
			if all := observe(t, w).Peers; len(all) != len(d.Peers) {
				t.Errorf("%s: %d peers observed, want %d", when, len(all), len(d.Peers))
			}
		}
		expect("at first", site.public)

		c, now := newCaller(t, far), time.Now()
		for _, x := range []struct {
			name   string
			packet []byte
		}{
			{"a stranger", initiationBy(t, d.PublicKey, stranger.public, stranger.private, now)},
			{"a stranger with a device's public key", initiationBy(t, d.PublicKey, device.public, stranger.private, now)},
			{"one device in another's name", initiationBy(t, d.PublicKey, device.public, other.private, now)},
			{"garbage", make([]byte, wg.MessageInitiationSize)},
		} {
			if c.call(t, x.packet) {
				t.Errorf("%s is answered", x.name)
			}
			expect("after "+x.name, site.public)
		}
		damaged := initiationBy(t, d.PublicKey, device.public, device.private, now)
		damaged[timestampAt]++
		if c.call(t, damaged) {
			t.Error("a damaged initiation is answered")
		}

		first := initiationBy(t, d.PublicKey, device.public, device.private, now)
		if !c.call(t, first) {
			t.Error("a device is not answered")
		}
		expect("after a device", site.public, device.public)
		if got := onDevice(t, w)[device.public]; !slices.Equal(prefixes(got.AllowedIPs), ips("10.9.0.2/32")) {
			t.Errorf("the device's allowed IPs: %v", got.AllowedIPs)
		}
		if c.call(t, first) {
			t.Error("a replay is answered")
		}

		// Removed, and replayed: nobody. Added again, and another in its stead.
		gone := d
		gone.Peers = d.Peers[1:]
		set(t, w, 1, gone)
		if c.call(t, initiationBy(t, d.PublicKey, device.public, device.private, now.Add(time.Second))) {
			t.Error("a removed device is answered")
		}
		set(t, w, 1, d)
		expect("added again", site.public)

		// What changed while it waited is what counts.
		psk := newPSK()
		d.Peers[1].PresharedKey, d.Peers[1].AllowedIPs = psk, ips("10.9.0.4/32")
		set(t, w, 1, d)
		set(t, w, 0, d)
		if !c.call(t, initiationBy(t, d.PublicKey, other.public, other.private, now)) {
			t.Error("the other device is not answered")
		}
		got := onDevice(t, w)[other.public]
		if got.PresharedKey != wgtypes.Key(psk.Reveal()) || !slices.Equal(prefixes(got.AllowedIPs), ips("10.9.0.4/32")) ||
			got.PersistentKeepaliveInterval != time.Second {
			t.Error("the other device was made from what was before")
		}
		set(t, w, 0, d)
		d.Peers[0].AllowedIPs = ips("10.9.0.2/32", "10.9.0.9/32")
		set(t, w, 1, d)
		d.Peers = d.Peers[1:]
		set(t, w, 1, d)
		if c.call(t, initiationBy(t, d.PublicKey, device.public, device.private, now.Add(2*time.Second))) {
			t.Error("a device that was removed while it waited is answered")
		}
	})
}

// listening: the link is up and so is the device.
func (m *managed) listening() error {
	if up, err := m.up(); err != nil || !up {
		return fmt.Errorf("not up: %w", err)
	}
	return nil
}

// TestCallsDuringChanges: devices call while they are added, changed and removed; none is
// on the device afterwards that was removed, or with anything but its last configuration.
func TestCallsDuringChanges(t *testing.T) {
	inUserSpace(t, func(t *testing.T) {
		l, h, w, d := gateway(t, UserSpace)
		far := l.Host("far")
		l.Connect(h, "eth0", "192.0.2.1/24", far, "eth0", "192.0.2.2/24")
		set(t, w, -1, d)
		if err := h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, 5*time.Second, "listening", func() error { return w.devices["cvtwg0"].listening() })
		const n = 40
		all := make([]keys, n)
		for i := range all {
			all[i] = newKeys(t)
		}
		var calls sync.WaitGroup
		stop := make(chan struct{})
		c := newCaller(t, far)
		calls.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				k := all[i%n]
				_, _ = c.conn.Write(initiationBy(t, d.PublicKey, k.public, k.private, time.Now()))
			}
		})
		made := 0
		for round := range 60 {
			d.Peers = nil
			for i, k := range all {
				if (i+round)%3 == 0 {
					continue
				}
				d.Peers = append(d.Peers, netstate.WireGuardPeer{
					Name: fmt.Sprint(i), PublicKey: k.public,
					AllowedIPs: []netip.Prefix{netip.PrefixFrom(deviceAddress((i+round)%n), 32)},
				})
			}
			set(t, w, -1, d)
			set(t, w, 0, d)
			want := map[netstate.Key][]netip.Prefix{}
			for _, p := range d.Peers {
				want[p.PublicKey] = p.AllowedIPs
			}
			for k, p := range onDevice(t, w) {
				if !slices.Equal(prefixes(p.AllowedIPs), want[k]) {
					t.Fatalf("round %d: a peer has %v, want %v", round, p.AllowedIPs, want[k])
				}
				made++
			}
			if got := len(observe(t, w).Peers); got != len(d.Peers) {
				t.Fatalf("round %d: %d peers observed, want %d", round, got, len(d.Peers))
			}
			time.Sleep(10 * time.Millisecond)
		}
		if made == 0 {
			t.Error("no call made a peer")
		}
		close(stop)
		calls.Wait()
	})
}

// TestManyToGreet: thousands with a remembered endpoint do not hold up the first Set, and
// all get their turn.
func TestManyToGreet(t *testing.T) {
	inUserSpace(t, func(t *testing.T) {
		l, h, w, d := gateway(t, UserSpace)
		far := l.Host("far")
		l.Connect(h, "eth0", "192.0.2.1/24", far, "eth0", "192.0.2.2/24")
		const n = 1000
		d.Peers = manyPeers(n)
		for i := range d.Peers {
			d.Peers[i].Endpoint, d.Peers[i].Initiate = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.2"), uint16(1000+i)), true
		}
		set(t, w, n+3, d)
		if got := len(onDevice(t, w)); got != makeAtOnce {
			t.Errorf("%d peers made at once, want %d", got, makeAtOnce)
		}
		if err := h.Up("cvtwg0", "10.64.0.1/10"); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		labtest.Eventually(t, time.Minute, "all made", func() error {
			waiting := 0
			w.devices["cvtwg0"].waiting.Range(func(any, any) bool { waiting++; return true })
			if waiting > 0 {
				return fmt.Errorf("%d peers wait", waiting)
			}
			return nil
		})
		t.Logf("all had their turn after %s", time.Since(began).Round(time.Millisecond))
		set(t, w, 0, d)
		made := onDevice(t, w)
		for _, p := range d.Peers {
			if got := made[p.PublicKey]; addrPort(got.Endpoint) != p.Endpoint {
				t.Fatalf("a peer's endpoint is %v, want %s", got.Endpoint, p.Endpoint)
			}
		}
	})
}
