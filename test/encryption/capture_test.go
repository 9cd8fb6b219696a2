package encryption

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
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
	icmp         byte // type
}

func (p packet) String() string {
	return fmt.Sprintf("%s:%d → %s:%d protocol %d icmp %d", p.src, p.sport, p.dst, p.dport, p.protocol, p.icmp)
}

// capture sees the packets on a link, both ways.
type capture struct {
	where string
	stop  func()
	mu    sync.Mutex
	all   map[packet]int
}

func sniff(t testing.TB, h *labtest.Host, link string) *capture {
	t.Helper()
	c := &capture{where: h.Name + " " + link, all: map[packet]int{}}
	fd := -1
	h.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // nothing before it is bound to the link
		if err != nil {
			return err
		}
		i, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: i.Index}))
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

func (c *capture) read(fd int, quit chan struct{}) {
	buf := make([]byte, 65536)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == nil {
			if p, ok := parsePacket(buf[:n]); ok {
				c.mu.Lock()
				c.all[p]++
				c.mu.Unlock()
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

func parsePacket(b []byte) (p packet, ok bool) {
	var rest int // where the transport header begins
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
	switch {
	case (p.protocol == unix.IPPROTO_TCP || p.protocol == unix.IPPROTO_UDP) && len(b) >= rest+4:
		p.sport, p.dport = binary.BigEndian.Uint16(b[rest:]), binary.BigEndian.Uint16(b[rest+2:])
	case p.protocol == unix.IPPROTO_ICMPV6 && len(b) > rest:
		p.icmp = b[rest]
	}
	return p, true
}

// watch is captures at both ends of every wire.
type watch struct {
	c    *cluster
	ends []*capture
}

func (c *cluster) watch() *watch {
	c.t.Helper()
	w := &watch{c: c}
	for _, n := range c.nodes {
		w.ends = append(w.ends, sniff(c.t, n.Host, "eth0"), sniff(c.t, c.fabric, n.port))
	}
	return w
}

// plain counts the packets in clear at every end, and lists some.
func (w *watch) plain() (counts []int, first string) {
	time.Sleep(50 * time.Millisecond)
	var some []string
	for _, end := range w.ends {
		end.mu.Lock()
		n := 0
		for p, times := range end.all {
			if w.c.inClear(p) {
				n += times
				some = append(some, end.where+": "+p.String())
			}
		}
		end.mu.Unlock()
		counts = append(counts, n)
	}
	slices.Sort(some)
	return counts, strings.Join(some[:min(len(some), 6)], "; ")
}

// encrypted counts WireGuard's packets at every end.
func (w *watch) encrypted() (counts []int) {
	for _, end := range w.ends {
		end.mu.Lock()
		n := 0
		for p, times := range end.all {
			if p.protocol == unix.IPPROTO_UDP && p.dport == wgPort && p.sport == wgPort {
				n += times
			}
		}
		end.mu.Unlock()
		counts = append(counts, n)
	}
	return counts
}

// none sees that nothing went over any wire in clear.
func (w *watch) none(what string) {
	w.c.t.Helper()
	counts, first := w.plain()
	w.c.t.Logf("%s: in clear %v, encrypted %v at %d ends", what, counts, w.encrypted(), len(w.ends))
	for _, n := range counts {
		if n > 0 {
			w.c.t.Errorf("%s: packets in clear: %s", what, first)
			return
		}
	}
}

// plenty sees that the same filter catches packets at every end.
func (w *watch) plenty(what string) {
	w.c.t.Helper()
	counts, _ := w.plain()
	w.c.t.Logf("%s: in clear %v", what, counts)
	for i, n := range counts {
		if n < 10 {
			w.c.t.Errorf("%s: %s caught %d packets in clear, want plenty: the filter proves nothing", what, w.ends[i].where, n)
		}
	}
}

func (w *watch) forget() {
	for _, end := range w.ends {
		end.mu.Lock()
		clear(end.all)
		end.mu.Unlock()
	}
}

// inClear tells whether a packet is the cluster's and should have been encrypted.
func (c *cluster) inClear(p packet) bool {
	pod := func(a netip.Addr) bool {
		return slices.ContainsFunc(c.podRanges, func(r netip.Prefix) bool { return r.Contains(a) })
	}
	if pod(p.src) || pod(p.dst) {
		return true
	}
	node := func(a netip.Addr) bool {
		return slices.ContainsFunc(c.nodes, func(n *node) bool { return slices.Contains(n.model.Addresses, a) })
	}
	if !c.model.NodeEncryption.AllTraffic || !node(p.src) || !node(p.dst) {
		return false
	}
	switch {
	case p.protocol == unix.IPPROTO_UDP && p.dport == wgPort && p.sport == wgPort:
		return false
	case p.protocol == unix.IPPROTO_ICMPV6 && p.icmp >= 133 && p.icmp <= 137:
		return false
	case p.protocol == unix.IPPROTO_TCP && (p.dport == apiPort && p.dst == c.nodes[0].model.Addresses[0] || p.sport == apiPort && p.src == c.nodes[0].model.Addresses[0]):
		return false
	}
	return true
}
