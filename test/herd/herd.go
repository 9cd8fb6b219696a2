// Package herd gives tests many WireGuard devices in one process: the library, used as a
// stock client uses it, with a TUN in memory and one small UDP socket each, so that a
// thousand of them are cheap.
package herd

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

	"github.com/culvert-vpn/culvert/internal/lab"
)

// link is a TUN in memory: what is put into out is sent through the tunnel, what comes out
// of the tunnel is counted.
type link struct {
	out    chan []byte
	in     atomic.Int64
	events chan tun.Event
	closed chan struct{}
}

func (l *link) File() *os.File           { return nil }
func (l *link) MTU() (int, error)        { return 1420, nil }
func (l *link) Name() (string, error)    { return "herd", nil }
func (l *link) Events() <-chan tun.Event { return l.events }
func (l *link) BatchSize() int           { return 1 }
func (l *link) Close() error             { close(l.closed); close(l.events); return nil }

func (l *link) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case <-l.closed:
		return 0, os.ErrClosed
	case p := <-l.out:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	}
}

func (l *link) Write(bufs [][]byte, _ int) (int, error) {
	l.in.Add(int64(len(bufs)))
	return len(bufs), nil
}

// bind is one UDP socket without batches.
type bind struct {
	h    *lab.Host
	from netip.Addr
	pc   *net.UDPConn
	// answered is when the first handshake response came, as Unix nanoseconds; 0: none.
	answered atomic.Int64
}

func (b *bind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	err := b.h.Do(func() (err error) {
		b.pc, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.from, 0)))
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

func (b *bind) Close() error {
	if b.pc == nil {
		return nil
	}
	return b.pc.Close()
}

func (b *bind) SetMark(uint32) error { return nil }
func (b *bind) BatchSize() int       { return 1 }

func (b *bind) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	for _, p := range bufs {
		if _, err := b.pc.WriteToUDPAddrPort(p[offset:], to.(*conn.StdNetEndpoint).AddrPort); err != nil {
			return err
		}
	}
	return nil
}

func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	ap, err := netip.ParseAddrPort(s)
	return &conn.StdNetEndpoint{AddrPort: ap}, err
}

// Place is where devices are, and where their gateway is.
type Place struct {
	Host *lab.Host  // whose sockets they use
	From netip.Addr // IPv4 address of that host: all are behind it, as behind a NAT
	// Gateway is where it listens, Key its public key.
	Gateway netip.AddrPort
	Key     wgtypes.Key
	// Pod is the IPv4 address behind the gateway that Ping asks.
	Pod netip.Addr
}

// Client is one device of many.
type Client struct {
	Private wgtypes.Key

	tun     link
	place   Place
	bind    bind
	dev     *wg.Device
	address netip.Addr
}

// New makes a device with an inner IPv4 address and a key of its own, which the gateway
// need not know yet. It is closed at the end of the test, or earlier by Close.
func New(t testing.TB, p Place, address netip.Addr) *Client {
	t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	c := &Client{
		Private: key, place: p, address: address, bind: bind{h: p.Host, from: p.From},
		tun: link{out: make(chan []byte, 16), events: make(chan tun.Event, 1), closed: make(chan struct{})},
	}
	c.dev = wg.NewDevice(&c.tun, &c.bind, wg.NewLogger(wg.LogLevelSilent, ""))
	t.Cleanup(c.dev.Close)
	uapi := fmt.Sprintf("private_key=%x\npublic_key=%x\nendpoint=%s\nallowed_ip=0.0.0.0/0\n", c.Private[:], p.Key[:], p.Gateway)
	if err := errors.Join(c.dev.IpcSetOperation(strings.NewReader(uapi)), c.dev.Up()); err != nil {
		t.Fatal(err)
	}
	return c
}

// Close ends the device.
func (c *Client) Close() { c.dev.Close() }

// Forget makes the next packet wait for a handshake, which follows at once. A stock client
// does that 15 s after data that was not answered: as if that time were over.
func (c *Client) Forget() {
	if p, ok := c.dev.LookupActivePeer(wg.NoisePublicKey(c.place.Key)); ok {
		p.ExpireCurrentKeypairs()
	}
}

// Knock sends handshakes, one every 5 ms, until one is answered, and returns when the first
// ever was.
func (c *Client) Knock(t testing.TB, timeout time.Duration) time.Time {
	t.Helper()
	peer, ok := c.dev.LookupActivePeer(wg.NoisePublicKey(c.place.Key))
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

// Ping sends an ICMP echo request to the pod.
func (c *Client) Ping() {
	p := make([]byte, 28)
	p[0], p[3], p[8], p[9] = 0x45, 28, 64, 1
	copy(p[12:], c.address.AsSlice())
	copy(p[16:], c.place.Pod.AsSlice())
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	p[20] = 8
	binary.BigEndian.PutUint16(p[22:], checksum(p[20:]))
	select {
	case c.tun.out <- p:
	default:
	}
}

// checksum is that of RFC 1071, of an even number of bytes.
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

// Answered pings the pod from all clients, each second from those without an answer, until
// the given share of them has an answer that is newer than the call; it returns how long
// that took. After the limit the test ends.
func Answered(t testing.TB, clients []*Client, share float64, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	before := make([]int64, len(clients))
	for i, c := range clients {
		before[i] = c.tun.in.Load()
	}
	for next := began; ; time.Sleep(20 * time.Millisecond) {
		if !time.Now().Before(next) {
			for i, c := range clients {
				if c.tun.in.Load() == before[i] {
					c.Ping()
				}
			}
			next = next.Add(time.Second)
		}
		answered := 0
		for i, c := range clients {
			if c.tun.in.Load() > before[i] {
				answered++
			}
		}
		if float64(answered) >= share*float64(len(clients)) {
			return time.Since(began)
		}
		if time.Since(began) > limit {
			t.Fatalf("%d of %d answered after %s", answered, len(clients), limit)
		}
	}
}
