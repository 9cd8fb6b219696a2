package mux

import (
	"net"

	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

// target is a TCP connection that a relay joins.
type target struct {
	*tcpconn.Conn
	read int // bytes, up to bulkFrom
}

// watch makes a target of a TCP connection; everything else it returns as it is.
func watch(c Conn) Conn {
	if t, ok := c.(*net.TCPConn); ok {
		return &target{Conn: tcpconn.Resume(t)}
	}
	return c
}

// receive reads what is there.
func (t *target) receive(fd int, b []byte) (int, error) {
	n, err := readAtOnce(fd, b)
	t.Took(n)
	if n > 0 && t.read < bulkFrom {
		if t.read += n; t.read >= bulkFrom {
			keepClose(fd)
		}
	}
	return n, err
}
