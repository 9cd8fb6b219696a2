package mux

import (
	"errors"
	"io"
	"net"
	"syscall"
)

// direct returns how chunks are written to w without waiting, which returns how many bytes of them were; nil: not at
// all.
func direct(w io.Writer) func([]*chunk) (int, error) {
	switch w := w.(type) {
	case *target:
		return func(list []*chunk) (int, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			n, err := tryWrite(w.raw, list)
			w.reset = w.reset || errors.Is(err, syscall.ECONNRESET)
			return n, err
		}
	case *Held:
		return func(list []*chunk) (int, error) { return tryWrite(w.raw, list) }
	case *net.TCPConn:
		return directly(w)
	case *net.UnixConn:
		return directly(w)
	}
	return nil
}

func directly(c syscall.Conn) func([]*chunk) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	return func(list []*chunk) (int, error) { return tryWrite(raw, list) }
}

func tryWrite(raw syscall.RawConn, list []*chunk) (n int, err error) {
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		n, failed = writevAtOnce(int(fd), list)
		return true
	})
	switch {
	case err != nil:
		return 0, err
	case errors.Is(failed, syscall.EAGAIN):
		return 0, nil
	case failed != nil:
		return 0, failed
	}
	return n, nil
}
