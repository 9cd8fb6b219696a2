package mux

import (
	"crypto/tls"
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
		return func(list []*chunk) (int, error) { return tryWrite(w.Raw, list) }
	case *Held:
		return func(list []*chunk) (int, error) { return tryWrite(w.raw, list) }
	case *net.TCPConn:
		return directly(w)
	case *net.UnixConn:
		return directly(w)
	case *tls.Conn:
		if k := corkOf(w); k != nil && k.raw != nil {
			return func(list []*chunk) (int, error) { return tryWriteTLS(w, k, list) }
		}
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

// tryWriteTLS encrypts a few chunks at a time, as many as the cork takes. What the kernel does not take at once is
// left to a goroutine, and nothing is written until that has done it.
func tryWriteTLS(w *tls.Conn, k *Corked, list []*chunk) (n int, err error) {
	const few = flushLimit / largeChunk
	for len(list) > 0 && k.free() {
		k.cork()
		for _, c := range list[:min(few, len(list))] {
			m, err := w.Write(c.bytes())
			if n += m; err != nil {
				return n, err
			}
		}
		rest, err := k.tryUncork()
		if err != nil {
			return n, err
		}
		if rest {
			go func() { _ = k.uncork() }() // whoever writes next is told of an error
			return n, nil
		}
		list = list[min(few, len(list)):]
	}
	return n, nil
}
