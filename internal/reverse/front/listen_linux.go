package front

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen opens a listening socket for Serve. Another process of the same user may listen
// on the same address at the same time (SO_REUSEPORT): so a successor starts before its
// predecessor stops.
func Listen(ctx context.Context, address string) (*net.TCPListener, error) {
	c := net.ListenConfig{KeepAliveConfig: keepAlive, Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	c.SetMultipathTCP(false) // a plain socket: splice(2) knows no other
	l, err := c.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("listen on %s: not TCP: %T", address, l), l.Close())
	}
	return tcp, nil
}
