package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Types of ICMP messages (IANA).
const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
	headerLen                = 8 // of an echo message
)

// socket sends and receives echo messages of one family.
type socket struct {
	file *os.File
	raw  syscall.RawConn
	six  bool
	ip   bool // messages arrive with their IPv4 header
	id   uint16
}

// openSocket opens a ping socket, or else a raw one.
func openSocket(six bool) (*socket, error) {
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if six {
		family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	const flags = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	s := &socket{six: six, id: uint16(os.Getpid())}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|flags, protocol)
	if err != nil {
		var rawErr error
		if fd, rawErr = unix.Socket(family, unix.SOCK_RAW|flags, protocol); rawErr != nil {
			return nil, fmt.Errorf("ping socket: %w, raw socket: %w", err, rawErr)
		}
		s.ip = !six
		if err := onlyReplies(fd, six); err != nil {
			_ = unix.Close(fd)
			return nil, fmt.Errorf("filter ICMP: %w", err)
		}
	}
	// Room for a burst of answers; the kernel may grant less.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20)
	s.file = os.NewFile(uintptr(fd), "icmp")
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	return s, nil
}

// onlyReplies lets only echo replies into a raw socket.
func onlyReplies(fd int, six bool) error {
	if !six {
		const icmpFilter = 1 // ICMP_FILTER, linux/icmp.h
		blocked := ^uint32(1 << echoReply4)
		return unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, int(int32(blocked)))
	}
	var f unix.ICMPv6Filter
	for i := range f.Data {
		f.Data[i] = ^uint32(0)
	}
	f.Data[echoReply6/32] &^= 1 << (echoReply6 % 32)
	return unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, unix.ICMPV6_FILTER, &f)
}

func (s *socket) close() error {
	if s == nil {
		return nil
	}
	if err := s.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// send sends an echo request by the target's link, from its source.
func (s *socket) send(t Target, sequence uint16, body []byte) error {
	m := make([]byte, headerLen, headerLen+len(body))
	m[0] = echoRequest4
	if s.six {
		m[0] = echoRequest6
	}
	binary.BigEndian.PutUint16(m[4:], s.id) // a ping socket puts its own
	binary.BigEndian.PutUint16(m[6:], sequence)
	m = append(m, body...)
	if !s.six { // for IPv6 the kernel does it
		binary.BigEndian.PutUint16(m[2:], checksum(m))
	}
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: t.Address.As16()}
	if !s.six {
		to = &unix.SockaddrInet4{Addr: t.Address.As4()}
	}
	var sendErr error
	err := s.raw.Control(func(fd uintptr) {
		var control []byte
		if control, sendErr = packetInfo(int(fd), t); sendErr == nil {
			_, sendErr = unix.SendmsgN(int(fd), m, control, to, unix.MSG_DONTWAIT)
		}
	})
	if err := errors.Join(err, sendErr); err != nil {
		return fmt.Errorf("send to %s: %w", t.Address, err)
	}
	return nil
}

// packetInfo is the control message that chooses link and source of one packet, nil when
// the target leaves both to the kernel. The link is looked up by the socket, and so in
// its namespace, each time: a link that was made anew has another index.
func packetInfo(fd int, t Target) ([]byte, error) {
	if t.Link == "" && !t.Source.IsValid() {
		return nil, nil
	}
	index := uint32(0)
	if t.Link != "" {
		req, err := unix.NewIfreq(t.Link)
		if err != nil {
			return nil, fmt.Errorf("link %s: %w", t.Link, err)
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
			return nil, fmt.Errorf("link %s: %w", t.Link, err)
		}
		index = req.Uint32()
	}
	if t.Address.Is4() {
		return unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(index), Spec_dst: as4(t.Source)}), nil
	}
	info := &unix.Inet6Pktinfo{Ifindex: index}
	if t.Source.IsValid() {
		info.Addr = t.Source.As16()
	}
	return unix.PktInfo6(info), nil
}

// as4 is a's bytes, or zeros for the zero value.
func as4(a netip.Addr) [4]byte {
	if !a.IsValid() {
		return [4]byte{}
	}
	return a.As4()
}

// receive passes on the answers to probes with the given token until the socket is
// closed.
func (s *socket) receive(token [8]byte, answer func(from netip.Addr, number uint64, at time.Time)) {
	buf := make([]byte, 2048)
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := s.raw.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), buf, 0)
			return recvErr != unix.EAGAIN
		})
		if err != nil {
			return // closed
		}
		if recvErr != nil {
			continue // a queued ICMP error of some target
		}
		if number, ok := parse(buf[:n], s.six, s.ip, token); ok {
			answer(address(from), number, time.Now())
		}
	}
}

func address(sa unix.Sockaddr) netip.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(sa.Addr)
	}
	return netip.Addr{}
}

// parse reads the number of the probe that message m answers; header tells whether m
// begins with an IPv4 header.
func parse(m []byte, six, header bool, token [8]byte) (number uint64, ok bool) {
	if header {
		if len(m) == 0 || len(m) < int(m[0]&0xf)*4 {
			return 0, false
		}
		m = m[int(m[0]&0xf)*4:]
	}
	want := byte(echoReply4)
	if six {
		want = echoReply6
	}
	if len(m) != headerLen+len(token)+8 || m[0] != want || m[1] != 0 || [8]byte(m[headerLen:]) != token {
		return 0, false
	}
	return binary.BigEndian.Uint64(m[headerLen+len(token):]), true
}

// checksum is RFC 1071's, for a message of even length.
func checksum(m []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(m); i += 2 {
		sum += uint32(m[i])<<8 | uint32(m[i+1])
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
