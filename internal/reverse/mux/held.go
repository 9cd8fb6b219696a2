package mux

import (
	"errors"
	"io"
	"net"
	"syscall"
)

// Held is a Unix socket of which the last byte that has come stays in the kernel, though it has
// been handed out, until more comes or Release is called. Closed meanwhile, with something
// unread, it is cut for the other end, which reads ECONNRESET (Linux, unix_release_sock); there
// is no other way to have it read anything but an end of file. Make it with Hold.
//
// Reads must be one at a time, as of any stream.
type Held struct {
	*net.UnixConn
	raw  syscall.RawConn
	held int     // 1: the next byte of the kernel's has been handed out
	skip [1]byte // where it is read to at last
}

// Hold makes a Held of a Unix socket; everything else it returns as it is.
func Hold(c net.Conn) net.Conn {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return c
	}
	return &Held{UnixConn: u, raw: raw}
}

// Read implements net.Conn.
func (h *Held) Read(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	var failed error
	err = h.raw.Read(func(fd uintptr) bool {
		n, failed = h.receive(int(fd), b)
		return !errors.Is(failed, syscall.EAGAIN)
	})
	if err == nil {
		err = failed
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// Release takes the byte off that is held, so that closing c is an end like any other, and
// returns the connection beneath. It does nothing for what is not a Held.
func Release(c net.Conn) net.Conn {
	h, ok := c.(*Held)
	if !ok {
		return c
	}
	if h.held > 0 {
		_ = h.raw.Control(func(fd uintptr) { _, _ = syscall.Read(int(fd), h.skip[:h.held]) })
		h.held = 0
	}
	return h.UnixConn
}
