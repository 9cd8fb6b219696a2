package wireguard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"syscall"

	"github.com/tailscale/wireguard-go/conn"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

const (
	// socketBuffer is asked for in both directions, in bytes: a burst waits there while the
	// processor is elsewhere.
	socketBuffer = 7 << 20
	// openTries is how often a port of the kernel's choice is asked for that is free in both
	// families.
	openTries = 100
)

// sockets are the UDP sockets of one device, one for each family that the host has, on the
// same port.
//
// The library has sockets of its own. These touch less memory for each packet (the library's
// pass over 128 places for messages with each packet, coming and going), and they offer what
// the library's do not: that routers may fragment what is sent.
type sockets struct {
	v4, v6 atomic.Pointer[udp]
}

// udp is one socket. A nil one sends nothing.
type udp struct {
	*net.UDPConn
	messages batcher
	segments atomic.Bool // the kernel segments (UDP_SEGMENT)
}

// batcher passes several messages in one system call: ipv4.PacketConn, ipv6.PacketConn.
type batcher interface {
	ReadBatch(messages []ipv6.Message, flags int) (int, error)
	WriteBatch(messages []ipv6.Message, flags int) (int, error)
}

// Open opens the sockets in the calling thread's network namespace, on port; 0: one that the
// kernel chooses. It returns a receiver for each, and the port.
func (s *sockets) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	if s.v4.Load() != nil || s.v6.Load() != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	v4, v6, err := openPair(port)
	for try := 1; port == 0 && errors.Is(err, unix.EADDRINUSE) && try < openTries; try++ {
		v4, v6, err = openPair(port)
	}
	if err != nil {
		return nil, 0, err
	}
	var out []conn.ReceiveFunc
	for _, u := range []*udp{v4, v6} {
		if u != nil {
			out = append(out, newReceiver(u).receive)
			port = u.port()
		}
	}
	if out == nil {
		return nil, 0, fmt.Errorf("open UDP sockets: %w", unix.EAFNOSUPPORT)
	}
	s.v4.Store(v4)
	s.v6.Store(v6)
	return out, port, nil
}

// openPair opens both families on one port; one that the host has not is nil.
func openPair(port uint16) (v4, v6 *udp, err error) {
	v4, err = openUDP("udp4", port)
	if err != nil {
		return nil, nil, err
	}
	if v4 != nil {
		port = v4.port()
	}
	v6, err = openUDP("udp6", port)
	if err != nil && v4 != nil {
		err = errors.Join(err, v4.Close())
	}
	return v4, v6, err
}

func openUDP(network string, port uint16) (*udp, error) {
	segments := false
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) { segments, set = setUp(int(fd), network) })
		return errors.Join(err, set)
	}}
	pc, err := lc.ListenPacket(context.Background(), network, ":"+strconv.Itoa(int(port)))
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	u := &udp{UDPConn: pc.(*net.UDPConn)}
	if network == "udp4" {
		u.messages = ipv4.NewPacketConn(pc)
	} else {
		u.messages = ipv6.NewPacketConn(pc)
	}
	u.segments.Store(segments)
	return u, nil
}

// setUp sets a socket's options. Larger buffers, and packets handed over in one piece
// (UDP_GRO, UDP_SEGMENT), are for speed: a kernel that has them not goes without.
//
// Routers may fragment what is sent over IPv4, as with the kernel's own WireGuard: inner
// packets of 1280 bytes, which IPv6 demands, make outer ones of 1340, and where messages that
// say "too big" are blocked these would be lost on a smaller path. Over IPv6 nobody but the
// sender fragments, and by default it does.
func setUp(fd int, network string) (segments bool, err error) {
	for _, o := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF, unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, socketBuffer) // the last two ask for a privilege
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	_, missing := unix.GetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT)
	type option struct{ level, name, value int }
	options := []option{{unix.IPPROTO_IP, unix.IP_PKTINFO, 1}, {unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT}}
	if network == "udp6" {
		options = []option{{unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1}, {unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1}}
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return false, fmt.Errorf("set option %d of level %d of a %s socket: %w", o.name, o.level, network, err)
		}
	}
	return missing == nil, nil
}

func (u *udp) port() uint16 { return uint16(u.LocalAddr().(*net.UDPAddr).Port) }

// Close ends all receiving with net.ErrClosed. Closed sockets can be opened again.
func (s *sockets) Close() error {
	var errs []error
	for _, p := range []*atomic.Pointer[udp]{&s.v4, &s.v6} {
		if u := p.Swap(nil); u != nil {
			errs = append(errs, u.Close())
		}
	}
	return errors.Join(errs...)
}

// SetMark marks what is sent from now on (SO_MARK); 0: no mark.
func (s *sockets) SetMark(mark uint32) error {
	for _, p := range []*atomic.Pointer[udp]{&s.v4, &s.v6} {
		u := p.Load()
		if u == nil {
			continue
		}
		raw, err := u.SyscallConn()
		if err != nil {
			return err
		}
		var set error
		err = raw.Control(func(fd uintptr) {
			set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		})
		if err = errors.Join(err, set); err != nil {
			return fmt.Errorf("mark what is sent: %w", err)
		}
	}
	return nil
}

// BatchSize is the number of packets that are received or sent at once at most.
func (*sockets) BatchSize() int { return conn.IdealBatchSize }

// ParseEndpoint reads address:port, or [address]:port.
func (*sockets) ParseEndpoint(s string) (conn.Endpoint, error) {
	to, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, err
	}
	return &endpoint{to: netip.AddrPortFrom(to.Addr().Unmap(), to.Port())}, nil
}

// endpoint is where a peer is, and the address of ours that it knows, from which it is
// answered.
type endpoint struct {
	to      netip.AddrPort
	src     netip.Addr
	control []byte // src as ancillary data: struct in_pktinfo or in6_pktinfo
	cleared atomic.Bool
}

// source is the ancillary data for a packet to the endpoint; nil: the kernel chooses the
// source.
func (e *endpoint) source() []byte {
	if e.cleared.Load() {
		return nil
	}
	return e.control
}

// ClearSrc lets the kernel choose the source from now on.
func (e *endpoint) ClearSrc() { e.cleared.Store(true) }

// SrcIP is the address of ours that the peer's last packet came to; not valid: not known.
func (e *endpoint) SrcIP() netip.Addr {
	if e.cleared.Load() {
		return netip.Addr{}
	}
	return e.src
}

// SrcToString is SrcIP in words.
func (e *endpoint) SrcToString() string { return e.SrcIP().String() }

// DstIP is the peer's address.
func (e *endpoint) DstIP() netip.Addr { return e.to.Addr() }

// DstToString is the peer's address and port.
func (e *endpoint) DstToString() string { return e.to.String() }

// DstToBytes is the peer's address and port as a cookie is made from.
func (e *endpoint) DstToBytes() []byte {
	b, _ := e.to.MarshalBinary() // it never fails
	return b
}
