package labtest

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Packet is what Sniff tells of an IP packet.
type Packet struct {
	Src, Dst netip.Addr
	Protocol byte
	// SPort and DPort are TCP's and UDP's; 0: another protocol, or not the first fragment.
	SPort, DPort uint16
	ICMP         byte // type, of ICMPv6
	Length       int  // of the IP packet, bytes
}

// Sniff tells of the IP packets on a link of a host, both ways, until stop is called or the test ends;
// stop waits for what is on its way.
func Sniff(t testing.TB, h *Host, link string, seen func(Packet)) (stop func()) {
	t.Helper()
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
	stop = sync.OnceFunc(func() {
		time.Sleep(20 * time.Millisecond) // what is on its way
		close(quit)
		<-done
	})
	t.Cleanup(stop)
	go func() {
		defer close(done)
		defer func() { _ = unix.Close(fd) }()
		read(fd, seen, quit)
	}()
	return stop
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func read(fd int, seen func(Packet), quit chan struct{}) {
	buf := make([]byte, 65536)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == nil {
			if p, ok := parsePacket(buf[:n]); ok {
				seen(p)
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

func parsePacket(b []byte) (p Packet, ok bool) {
	p.Length = len(b)
	var rest int // where the transport header begins
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.Src, p.Dst, p.Protocol = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9]
		rest = int(b[0]&15) * 4
		if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return p, true // not the first fragment: no ports
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		p.Src, p.Dst, p.Protocol = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[6]
		rest = 40
	default:
		return p, false
	}
	switch {
	case (p.Protocol == unix.IPPROTO_TCP || p.Protocol == unix.IPPROTO_UDP) && len(b) >= rest+4:
		p.SPort, p.DPort = binary.BigEndian.Uint16(b[rest:]), binary.BigEndian.Uint16(b[rest+2:])
	case p.Protocol == unix.IPPROTO_ICMPV6 && len(b) > rest:
		p.ICMP = b[rest]
	}
	return p, true
}
