package connect

import (
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/reverse/mux"
)

// awaitRead waits until the client has read the answer: kube-apiserver takes bytes of the
// target's that come along with it for an error, and a Unix socket hands out both in one
// read. Over TLS the answer is a record of its own, which is as good.
func awaitRead(conn net.Conn) {
	c, ok := conn.(*mux.Held)
	if !ok {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	const (
		first = 20 * time.Microsecond
		last  = 5 * time.Millisecond
	)
	deadline := time.Now().Add(headTimeout)
	for pause := first; time.Now().Before(deadline); pause = min(2*pause, last) {
		unread := 0
		// SIOCOUTQ: what the other end has not read yet (Linux, unix(7)).
		if raw.Control(func(fd uintptr) { unread, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }) != nil || err != nil || unread <= 0 {
			return
		}
		time.Sleep(pause)
	}
}
