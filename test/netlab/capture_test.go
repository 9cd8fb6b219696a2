package netlab

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// packet is what a capture knows of one.
type packet struct {
	src, dst     netip.Addr
	protocol     byte
	sport, dport uint16
	length       int // of the IP packet, bytes
}

// capture counts the packets on a link, both ways.
type capture struct {
	stop  func()
	total atomic.Int64
	clear atomic.Int64 // from or to an inner range
	mu    sync.Mutex
	first packet // of those in clear
	count func(packet)
}

// sniff starts a capture on a link of a host; count, if not nil, sees every packet.
func sniff(t testing.TB, h *labtest.Host, link string, count func(packet)) *capture {
	t.Helper()
	c := &capture{count: count}
	fd := -1
	h.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		index, err := linkIndex(link)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}))
	})
	quit, done := make(chan struct{}), make(chan struct{})
	c.stop = sync.OnceFunc(func() {
		time.Sleep(20 * time.Millisecond) // what is on its way
		close(quit)
		<-done
	})
	t.Cleanup(c.stop)
	go func() {
		defer close(done)
		defer func() { _ = unix.Close(fd) }()
		c.read(fd, quit)
	}()
	return c
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func linkIndex(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req)
	return int(req.Uint32()), err
}

func (c *capture) read(fd int, quit chan struct{}) {
	buf := make([]byte, 65536)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == nil {
			if p, ok := parsePacket(buf[:n]); ok {
				c.note(p)
			}
			continue
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return
		}
		select {
		case <-quit:
			return
		default:
		}
	}
}

func (c *capture) note(p packet) {
	c.total.Add(1)
	if c.count != nil {
		c.count(p)
	}
	if !within(p.src, inner) && !within(p.dst, inner) {
		return
	}
	if c.clear.Add(1) == 1 {
		c.mu.Lock()
		c.first = p
		c.mu.Unlock()
	}
}

func parsePacket(b []byte) (p packet, ok bool) {
	p.length = len(b)
	var rest int // of the bytes: where the transport header begins
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.src, p.dst, p.protocol = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9]
		rest = int(b[0]&15) * 4
		if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return p, true // not the first fragment: no ports
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		p.src, p.dst, p.protocol = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[6]
		rest = 40
	default:
		return p, false
	}
	if (p.protocol == unix.IPPROTO_TCP || p.protocol == unix.IPPROTO_UDP) && len(b) >= rest+4 {
		p.sport, p.dport = binary.BigEndian.Uint16(b[rest:]), binary.BigEndian.Uint16(b[rest+2:])
	}
	return p, true
}

// leaks watches links of the underlay for packets in clear.
type leaks struct {
	n        *network
	captures map[string]*capture
}

// watchLeaks starts a capture on each of the internet's links that are named.
func (n *network) watchLeaks(links ...string) *leaks {
	n.t.Helper()
	l := &leaks{n: n, captures: map[string]*capture{}}
	for _, link := range links {
		l.captures[link] = sniff(n.t, n.internet, link, nil)
	}
	return l
}

// none ends the captures: tunnels ran over every link, nothing was seen in clear, and the
// same filter catches a packet that is sent in clear on purpose.
func (l *leaks) none() {
	t := l.n.t
	t.Helper()
	time.Sleep(50 * time.Millisecond)
	for link, c := range l.captures {
		c.mu.Lock()
		got, total := c.clear.Load(), c.total.Load()
		t.Logf("link %s: %d packets in clear of %d", link, got, total)
		if got != 0 || total == 0 {
			t.Errorf("link %s: %d packets in clear of %d, want 0 of some; the first: %s → %s, protocol %d", link, got, total, c.first.src, c.first.dst, c.first.protocol)
		}
		c.mu.Unlock()
	}
	for link, c := range l.captures {
		l.control(link, c)
		c.stop()
	}
}

// control sends one packet of each family in clear out of the internet's link.
func (l *leaks) control(link string, c *capture) {
	t, h := l.n.t, l.n.internet
	t.Helper()
	before := c.clear.Load()
	for _, to := range []string{"10.244.9.9", "fd00:10:244:9::9"} {
		prefix := "/32"
		if netip.MustParseAddr(to).Is6() {
			prefix = "/128"
		}
		h.IP("route", "replace", to+prefix, "dev", link)
		mac := "02:00:00:00:00:01"
		h.IP("neigh", "replace", to, "lladdr", mac, "dev", link)
		conn, err := dial(h, "udp", "", at(to, port), time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("in clear"))
		_ = conn.Close()
		h.IP("route", "del", to+prefix, "dev", link)
	}
	labtest.Eventually(t, time.Second, "the capture on "+link+" sees a packet in clear", func() error {
		if c.clear.Load() < before+2 {
			return errors.New("not seen")
		}
		return nil
	})
}
