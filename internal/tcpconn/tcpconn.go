// Package tcpconn is TCP connections that know whether they were reset, for those who pass on bytes and must
// pass on as well how a connection has ended.
//
// The kernel tells of a reset once, to whoever asks first (Linux, sock_error). When that is a write, or the
// second half of a splice(2) of which only the first half is told, a read finds an end like any other, and
// half of an answer would be taken for all of it.
package tcpconn

import (
	"net"
	"syscall"
)

// Conn is a TCP connection that counts what is read from it. Whoever reads by other means than Read tells
// of it with Took. One goroutine reads at a time.
type Conn struct {
	*net.TCPConn
	Raw syscall.RawConn // the connection's

	read uint64 // bytes
}

// New makes a Conn of a connection of which nothing has been read.
func New(c *net.TCPConn) *Conn {
	raw, _ := c.SyscallConn() // fails for nil only
	return &Conn{TCPConn: c, Raw: raw}
}

// Resume makes a Conn of a connection of which something may have been read, and nobody reads meanwhile.
func Resume(t *net.TCPConn) *Conn {
	c := New(t)
	_ = c.Raw.Control(func(fd uintptr) { c.read = readUntilNow(int(fd)) }) // fails for one that is closed, as Ended will
	return c
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.Took(n)
	return n, err
}

// Took counts n bytes that were read.
func (c *Conn) Took(n int) { c.read += uint64(max(n, 0)) }

// Ended says how the other end's direction has ended, of which a read has found the end: with nil, as the
// other end has said; with ECONNRESET, without that; or, when the connection has been closed here meanwhile, perhaps by
// who was told of a reset, with net.ErrClosed.
func (c *Conn) Ended() error {
	said := true
	if err := c.Raw.Control(func(fd uintptr) { said = saidEnd(int(fd), c.read) }); err != nil {
		return err
	}
	if !said {
		return syscall.ECONNRESET
	}
	return nil
}

// Reset closes a connection so that its other end sees a reset.
func Reset(c interface {
	SetLinger(seconds int) error
	Close() error
}) {
	_ = c.SetLinger(0)
	_ = c.Close()
}
