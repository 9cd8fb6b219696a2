package relay

import (
	"cmp"
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// datagramBuffer is the receive buffer of a listening UDP socket, in bytes: all clients
// share it.
const datagramBuffer = 4 << 20

// listenControl prepares a listening socket: transparent, so that TPROXY may hand it
// packets for any address, and telling that address for UDP (Linux 2.6.37).
func listenControl(network, _ string, c syscall.RawConn) error {
	return control(c, func(fd int) error {
		if err := setTransparent(network, fd); err != nil {
			return err
		}
		switch network {
		case "tcp4", "tcp6":
			return keepAlives(fd)
		case "udp4":
			forceReceiveBuffer(fd)
			return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1)
		case "udp6":
			forceReceiveBuffer(fd)
			return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1)
		}
		return nil
	})
}

// keepAlives sets keepAlive on a listening socket. The kernel gives it to each connection that is accepted,
// which would take package net four system calls.
func keepAlives(fd int) error {
	seconds := func(d time.Duration) int { return int(d / time.Second) }
	return errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(keepAlive.Idle)),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(keepAlive.Interval)),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count))
}

// replyControl prepares a UDP socket that is bound to a service's address.
func replyControl(network, _ string, c syscall.RawConn) error {
	return control(c, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
		return setTransparent(network, fd)
	})
}

// markControl sets the firewall mark of a socket; 0 leaves it alone.
func markControl(mark uint32) func(network, address string, c syscall.RawConn) error {
	if mark == 0 {
		return nil
	}
	return func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		})
	}
}

func control(c syscall.RawConn, f func(fd int) error) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

func setTransparent(network string, fd int) error {
	if strings.HasSuffix(network, "6") {
		return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}

// forceReceiveBuffer does what it can; a smaller buffer only loses bursts.
func forceReceiveBuffer(fd int) {
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, datagramBuffer)
}

// controlSize is enough for the control message of either family.
var controlSize = unix.CmsgSpace(unix.SizeofSockaddrInet6)

// originalDestination finds the address that a datagram was sent to in its control
// messages (IP_ORIGDSTADDR, IPV6_ORIGDSTADDR).
func originalDestination(oob []byte) (netip.AddrPort, bool) {
	for len(oob) >= unix.CmsgLen(0) {
		header, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			break
		}
		switch {
		case header.Level == unix.SOL_IP && header.Type == unix.IP_ORIGDSTADDR && len(data) >= 8:
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(data[4:8])), binary.BigEndian.Uint16(data[2:])), true
		case header.Level == unix.SOL_IPV6 && header.Type == unix.IPV6_ORIGDSTADDR && len(data) >= 24:
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(data[8:24])).Unmap(), binary.BigEndian.Uint16(data[2:])), true
		}
		oob = rest
	}
	return netip.AddrPort{}, false
}

func wouldBlock(err error) bool { return errors.Is(err, unix.EAGAIN) }

// receiveNow reads one datagram of a connected socket without waiting.
func receiveNow(fd uintptr, b []byte) (int, error) {
	return retry(func() (int, error) { return unix.Read(int(fd), b) })
}

// refused says that an ICMP message told that nobody listens there.
func refused(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }

// sendNow sends a datagram on a connected socket without waiting. The error may be one
// that an earlier datagram caused.
func sendNow(c syscall.RawConn, b []byte) error {
	return attempt(c, func(fd int) error { return unix.Send(fd, b, unix.MSG_DONTWAIT) })
}

// sendToNow is sendNow on a socket that is not connected.
func sendToNow(c syscall.RawConn, b []byte, to unix.Sockaddr) error {
	return attempt(c, func(fd int) error { return unix.Sendto(fd, b, unix.MSG_DONTWAIT, to) })
}

func attempt(c syscall.RawConn, send func(fd int) error) error {
	var err error
	werr := c.Write(func(fd uintptr) bool {
		_, err = retry(func() (int, error) { return 0, send(int(fd)) })
		return true
	})
	return cmp.Or(werr, err)
}

func socketAddress(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return max(n, 0), err
		}
	}
}
