package wireguard

import (
	"errors"
	"fmt"
	"net"
	"reflect"

	"github.com/tailscale/wireguard-go/conn"
	"golang.org/x/sys/unix"
)

// mayFragment lets routers fragment what we send over IPv4, as the kernel's own WireGuard
// does: inner packets of 1280 bytes, which IPv6 demands, make outer ones of 1340, and where
// messages that say "too big" are blocked these would be lost on a smaller path. Over IPv6
// nobody but the sender fragments, and by default it does.
//
// The library does not offer its sockets: they are found by their fields' names, and a
// library without these fields is an error.
func mayFragment(b *conn.StdNetBind) error {
	c, err := socket(b, "ipv4")
	if err != nil || c == nil { // nil: the host has no IPv4
		return err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	})
	if err = errors.Join(err, set); err != nil {
		return fmt.Errorf("let routers fragment packets: %w", err)
	}
	return nil
}

func socket(b *conn.StdNetBind, field string) (*net.UDPConn, error) {
	f := reflect.ValueOf(b).Elem().FieldByName(field)
	if !f.IsValid() || f.Type() != reflect.TypeFor[*net.UDPConn]() {
		return nil, fmt.Errorf("the WireGuard library has no socket %q", field)
	}
	return (*net.UDPConn)(f.UnsafePointer()), nil
}

// tooLong: the packets cannot be handed over in one piece, since the kernel segments only
// into what needs no fragments: EINVAL, since Linux 6.13 EMSGSIZE.
func tooLong(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EMSGSIZE)
}
