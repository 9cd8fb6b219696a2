package wireguard

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailscale/wireguard-go/conn"
	wg "github.com/tailscale/wireguard-go/device"
	"github.com/tailscale/wireguard-go/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// memTUN is a TUN in memory: what is sent into it comes out of the tunnel's other end.
type memTUN struct {
	out    chan []byte // to encrypt
	in     atomic.Int64
	events chan tun.Event
	closed chan struct{}
}

func newMemTUN() *memTUN {
	return &memTUN{out: make(chan []byte, 16), events: make(chan tun.Event, 1), closed: make(chan struct{})}
}

func (m *memTUN) File() *os.File { return nil }

func (m *memTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case <-m.closed:
		return 0, os.ErrClosed
	case p := <-m.out:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	}
}

func (m *memTUN) Write(bufs [][]byte, _ int) (int, error) {
	m.in.Add(int64(len(bufs)))
	return len(bufs), nil
}

func (m *memTUN) MTU() (int, error)        { return 1420, nil }
func (m *memTUN) Name() (string, error)    { return "mem", nil }
func (m *memTUN) Events() <-chan tun.Event { return m.events }
func (m *memTUN) BatchSize() int           { return 1 }
func (m *memTUN) Close() error             { close(m.closed); close(m.events); return nil }

// smallBind has one UDP socket and no batches, so that a thousand of them are cheap.
type smallBind struct {
	h    *labtest.Host
	from netip.Addr
	pc   *net.UDPConn
}

func (b *smallBind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	err := b.h.Host.Do(func() (err error) {
		b.pc, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.from, 0)))
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	pc := b.pc
	fn := func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		n, from, err := pc.ReadFromUDPAddrPort(bufs[0])
		sizes[0], eps[0] = n, &conn.StdNetEndpoint{AddrPort: from}
		return 1, err
	}
	return []conn.ReceiveFunc{fn}, uint16(pc.LocalAddr().(*net.UDPAddr).Port), nil
}

func (b *smallBind) Close() error {
	if b.pc == nil {
		return nil
	}
	return b.pc.Close()
}
func (b *smallBind) SetMark(uint32) error { return nil }
func (b *smallBind) BatchSize() int       { return 1 }
func (b *smallBind) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	for _, p := range bufs {
		if _, err := b.pc.WriteToUDPAddrPort(p[offset:], to.(*conn.StdNetEndpoint).AddrPort); err != nil {
			return err
		}
	}
	return nil
}

func (b *smallBind) ParseEndpoint(s string) (conn.Endpoint, error) {
	ap, err := netip.ParseAddrPort(s)
	return &conn.StdNetEndpoint{AddrPort: ap}, err
}

// client is one device of a herd: the library itself, as a stock client uses it.
type client struct {
	*memTUN
	dev     *wg.Device
	keys    keys
	address netip.Addr
}

// newHerd makes n clients of a gateway, all behind one address.
func newHerd(t *testing.T, h *labtest.Host, from string, n int, gateway netstate.Key, endpoint string) []*client {
	var herd []*client
	for i := range n {
		c := &client{memTUN: newMemTUN(), keys: newKeys(t), address: deviceAddress(i + 2)}
		c.dev = wg.NewDevice(c.memTUN, &smallBind{h: h, from: netip.MustParseAddr(from)}, wg.NewLogger(wg.LogLevelSilent, ""))
		t.Cleanup(c.dev.Close)
		key := c.keys.private
		cfg := wgtypes.Config{PrivateKey: &key, Peers: []wgtypes.PeerConfig{{
			PublicKey: wgtypes.Key(gateway), AllowedIPs: ipNets(ips("10.64.0.0/10")),
			Endpoint: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(endpoint)),
		}}}
		if err := c.dev.IpcSetOperation(writeUAPI(cfg)); err != nil {
			t.Fatal(err)
		}
		if err := c.dev.Up(); err != nil {
			t.Fatal(err)
		}
		herd = append(herd, c)
	}
	return herd
}

// ping sends an ICMP echo request to the gateway's inner address.
func (c *client) ping() {
	p := make([]byte, 28)
	p[0], p[3], p[8], p[9] = 0x45, 28, 64, 1
	copy(p[12:], c.address.AsSlice())
	copy(p[16:], deviceAddress(1).AsSlice())
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	p[20] = 8
	binary.BigEndian.PutUint16(p[22:], checksum(p[20:]))
	select {
	case c.out <- p:
	default:
	}
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// untilAnswered pings from all clients each second until the given share has an answer
// that is newer than the call.
func untilAnswered(t *testing.T, herd []*client, share float64, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	before := make([]int64, len(herd))
	for i, c := range herd {
		before[i] = c.in.Load()
	}
	for next := began; ; {
		if !time.Now().Before(next) {
			for i, c := range herd {
				if c.in.Load() == before[i] {
					c.ping()
				}
			}
			next = next.Add(time.Second)
		}
		time.Sleep(20 * time.Millisecond)
		answered := 0
		for i, c := range herd {
			if c.in.Load() > before[i] {
				answered++
			}
		}
		if float64(answered) >= share*float64(len(herd)) {
			return time.Since(began)
		}
		if time.Since(began) > limit {
			t.Fatalf("%d of %d answered after %s", answered, len(herd), limit)
		}
	}
}

// TestRestartWithAThousandBehindOneAddress: the gateway restarts, with its peers' last
// endpoints; 1,000 devices behind one address that all speak at once: 99 % of them have
// traffic within 10 s. Then the same with devices that the gateway cannot greet first.
func TestRestartWithAThousandBehindOneAddress(t *testing.T) {
	const n = 1000
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		l, h, w, d := gateway(t, kind)
		far := l.Host("far")
		l.Connect(h, "eth0", "192.0.2.1/24", far, "eth0", "192.0.2.2/24")
		herd := newHerd(t, far, "192.0.2.2", n, d.PublicKey, "192.0.2.1:51820")
		for i, c := range herd {
			d.Peers = append(d.Peers, netstate.WireGuardPeer{
				Name: fmt.Sprintf("device default/d%d", i), PublicKey: c.keys.public,
				AllowedIPs: []netip.Prefix{netip.PrefixFrom(c.address, 32)},
			})
		}
		up := func() {
			set(t, w, -1, d)
			h.IP("link", "set", "cvtwg0", "up", "mtu", "1420")
			h.IP("addr", "replace", "10.64.0.1/10", "dev", "cvtwg0")
			labtest.Eventually(t, 5*time.Second, "listening", func() error { return w.devices["cvtwg0"].listening() })
		}
		up()
		t.Logf("no sessions, all speak at once: 99 %% after %s", untilAnswered(t, herd, 0.99, 10*time.Second).Round(time.Millisecond))
		untilAnswered(t, herd, 1, 20*time.Second)

		restart := func(remember bool) {
			at := map[netstate.Key]netip.AddrPort{}
			for _, p := range observe(t, w).Peers {
				at[p.PublicKey] = p.Endpoint
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			for i := range d.Peers {
				p := &d.Peers[i]
				p.Endpoint, p.Initiate = at[p.PublicKey], remember
			}
			w = newWireGuard(t, h, kind)
			up()
		}
		restart(true)
		t.Logf("restart, we greet: 99 %% after %s", untilAnswered(t, herd, 0.99, 10*time.Second).Round(time.Millisecond))
		_, err := w.Observe(context.Background())
		if err != nil {
			t.Fatal(err)
		}
	})
}
