package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailscale/wireguard-go/conn"
	wg "github.com/tailscale/wireguard-go/device"
	"github.com/tailscale/wireguard-go/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// herdTUN is a TUN in memory: what is put into out is sent through the tunnel, what comes
// out of the tunnel is counted.
type herdTUN struct {
	out    chan []byte
	in     atomic.Int64
	events chan tun.Event
	closed chan struct{}
}

func (m *herdTUN) File() *os.File           { return nil }
func (m *herdTUN) MTU() (int, error)        { return 1420, nil }
func (m *herdTUN) Name() (string, error)    { return "herd", nil }
func (m *herdTUN) Events() <-chan tun.Event { return m.events }
func (m *herdTUN) BatchSize() int           { return 1 }
func (m *herdTUN) Close() error             { close(m.closed); close(m.events); return nil }

func (m *herdTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case <-m.closed:
		return 0, os.ErrClosed
	case p := <-m.out:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	}
}

func (m *herdTUN) Write(bufs [][]byte, _ int) (int, error) {
	m.in.Add(int64(len(bufs)))
	return len(bufs), nil
}

// herdBind is one UDP socket without batches, so that a thousand of them are cheap.
type herdBind struct {
	h    *labtest.Host
	from string
	pc   *net.UDPConn
	// answered is when the first handshake response came, as Unix nanoseconds; 0: none.
	answered atomic.Int64
}

func (b *herdBind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	err := b.h.Host.Do(func() (err error) {
		b.pc, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(b.from)})
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	pc := b.pc
	fn := func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		n, from, err := pc.ReadFromUDPAddrPort(bufs[0])
		if err == nil && n == wg.MessageResponseSize && binary.LittleEndian.Uint32(bufs[0]) == wg.MessageResponseType {
			b.answered.CompareAndSwap(0, time.Now().UnixNano())
		}
		sizes[0], eps[0] = n, &conn.StdNetEndpoint{AddrPort: from}
		return 1, err
	}
	return []conn.ReceiveFunc{fn}, uint16(pc.LocalAddr().(*net.UDPAddr).Port), nil
}

func (b *herdBind) Close() error {
	if b.pc == nil {
		return nil
	}
	return b.pc.Close()
}

func (b *herdBind) SetMark(uint32) error { return nil }
func (b *herdBind) BatchSize() int       { return 1 }

func (b *herdBind) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	for _, p := range bufs {
		if _, err := b.pc.WriteToUDPAddrPort(p[offset:], to.(*conn.StdNetEndpoint).AddrPort); err != nil {
			return err
		}
	}
	return nil
}

func (b *herdBind) ParseEndpoint(s string) (conn.Endpoint, error) {
	ap, err := netip.ParseAddrPort(s)
	return &conn.StdNetEndpoint{AddrPort: ap}, err
}

// herdClient is one device of many: the library, used as a stock client uses it.
type herdClient struct {
	*herdTUN
	bind    *herdBind
	dev     *wg.Device
	private wgtypes.Key
	gateway wgtypes.Key
	address netip.Addr
}

// newHerdClient makes a device of the gateway that is not spoken of in the manifests yet.
func newHerdClient(t testing.TB, h *labtest.Host, gateway wgtypes.Key, address netip.Addr) *herdClient {
	t.Helper()
	c := &herdClient{
		herdTUN: &herdTUN{out: make(chan []byte, 16), events: make(chan tun.Event, 1), closed: make(chan struct{})},
		bind:    &herdBind{h: h, from: scaleFar}, private: newKey(t), gateway: gateway, address: address,
	}
	c.dev = wg.NewDevice(c.herdTUN, c.bind, wg.NewLogger(wg.LogLevelSilent, ""))
	t.Cleanup(c.dev.Close)
	uapi := fmt.Sprintf("private_key=%x\npublic_key=%x\nendpoint=%s:51820\nallowed_ip=0.0.0.0/0\n", c.private[:], gateway[:], public)
	if err := errors.Join(c.dev.IpcSetOperation(strings.NewReader(uapi)), c.dev.Up()); err != nil {
		t.Fatal(err)
	}
	return c
}

// knock sends handshakes, one every 5 ms, until one is answered, and returns when that was.
func (c *herdClient) knock(t testing.TB, timeout time.Duration) time.Time {
	t.Helper()
	peer, ok := c.dev.LookupActivePeer(wg.NoisePublicKey(c.gateway))
	if !ok {
		t.Fatal("the client has no peer")
	}
	for began := time.Now(); c.bind.answered.Load() == 0; time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > timeout {
			t.Fatalf("no handshake is answered for %s", timeout)
		}
		peer.ExpireCurrentKeypairs() // or the library waits 5 s before the next one
		_ = peer.SendHandshakeInitiation(false)
	}
	return time.Unix(0, c.bind.answered.Load())
}

// ping sends an ICMP echo request to the pod.
func (c *herdClient) ping() {
	p := make([]byte, 28)
	p[0], p[3], p[8], p[9] = 0x45, 28, 64, 1
	copy(p[12:], c.address.AsSlice())
	copy(p[16:], netip.MustParseAddr(scalePod).AsSlice())
	binary.BigEndian.PutUint16(p[10:], internetChecksum(p[:20]))
	p[20] = 8
	binary.BigEndian.PutUint16(p[22:], internetChecksum(p[20:]))
	select {
	case c.out <- p:
	default:
	}
}

// internetChecksum is that of RFC 1071, of an even number of bytes.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// herdAnswered pings the pod from all clients each second, until the given share of them
// has an answer that is newer than the call.
func herdAnswered(t *testing.T, herd []*herdClient, share float64, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	before := make([]int64, len(herd))
	for i, c := range herd {
		before[i] = c.in.Load()
	}
	for next := began; ; time.Sleep(20 * time.Millisecond) {
		if !time.Now().Before(next) {
			for i, c := range herd {
				if c.in.Load() == before[i] {
					c.ping()
				}
			}
			next = next.Add(time.Second)
		}
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

// TestScaleRestart: 1,000 devices behind one address, as behind a NAT, speak at once; then
// the gateway is killed and started again while they go on: 99 % of them have traffic
// within 10 s of its start.
func TestScaleRestart(t *testing.T) {
	const devices = 1000
	n := newScaleNet(t)
	g := newGateway(t, n.gateway)
	var text strings.Builder
	var herd []*herdClient
	for i := range devices {
		c := newHerdClient(t, n.far, g.public, scaleAddress(i))
		herd = append(herd, c)
		text.WriteString(scaleDevice(i, c.private.PublicKey()))
	}
	g.write("gateway.yaml", scaleGateway())
	g.write("devices.yaml", text.String())
	startScaled(t, g)
	first := herdAnswered(t, herd, 0.99, 10*time.Second)
	all := herdAnswered(t, herd, 1, 20*time.Second)
	t.Logf("1,000 devices that have no session speak at once: 99 %% have traffic after %s, all %s later (load %s)", ms(first), ms(all), load())
	t.Logf("with 1,000 sessions: RSS %d MiB, %d goroutines", g.rss()>>20, g.goroutines())
	time.Sleep(6 * time.Second) // so that the endpoints are on disk

	for _, c := range []struct {
		name   string
		forget bool // the endpoints
	}{{"killed and restarted", false}, {"restarted without knowing where they are", true}} {
		g.kill()
		if c.forget {
			if err := os.Remove(g.state + "/endpoints.json"); err != nil {
				t.Fatal(err)
			}
			// Stock clients shake hands anew 15 s after unanswered data: as if that time were over.
			for _, c := range herd {
				if p, ok := c.dev.LookupActivePeer(wg.NoisePublicKey(g.public)); ok {
					p.ExpireCurrentKeypairs()
				}
			}
		}
		began := time.Now()
		ready, _ := startScaled(t, g)
		herdAnswered(t, herd, 0.99, 10*time.Second)
		back := time.Since(began)
		t.Logf("%s: ready after %s, 99 %% have traffic %s after the start (load %s)", c.name, ms(ready), ms(back), load())
		withinBound(t, c.name, back, 10*time.Second)
	}
	g.profile("heap-herd.prof", "heap?gc=1")
}
