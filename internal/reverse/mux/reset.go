package mux

import (
	"errors"
	"net"
	"sync"
	"syscall"
)

// target is a TCP connection that a relay joins. It knows whether it was reset. The kernel tells of that once, to
// whoever asks first (Linux, sock_error): when that is a write, a read finds an end like any other,
// and half of an answer would be taken for all of it.
type target struct {
	*net.TCPConn
	raw  syscall.RawConn
	read int // bytes, up to bulkFrom

	mu    sync.Mutex // held while something is written
	reset bool
}

// watch makes a target of a TCP connection; everything else it returns as it is.
func watch(c Conn) Conn {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return c
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return c
	}
	return &target{TCPConn: t, raw: raw}
}

// receive reads what is there.
func (t *target) receive(fd int, b []byte) (int, error) {
	n, err := readAtOnce(fd, b)
	if n > 0 && t.read < bulkFrom {
		if t.read += n; t.read >= bulkFrom {
			keepClose(fd)
		}
	}
	return n, err
}

// Write implements net.Conn.
func (t *target) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, err := t.TCPConn.Write(b)
	t.reset = t.reset || errors.Is(err, syscall.ECONNRESET)
	return n, err
}

// writeAll writes several buffers at once.
func (t *target) writeAll(b net.Buffers) (int64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, err := b.WriteTo(t.TCPConn)
	t.reset = t.reset || errors.Is(err, syscall.ECONNRESET)
	return n, err
}

// ended says how the connection has ended of which a read has found the end: nil or ECONNRESET.
func (t *target) ended() error {
	dead := false
	if err := t.raw.Control(func(fd uintptr) { dead = hungUp(int(fd)) }); err != nil || !dead {
		return nil // only the other end's direction has ended
	}
	t.mu.Lock() // a write that is under way ends at once
	defer t.mu.Unlock()
	if t.reset {
		return syscall.ECONNRESET
	}
	return nil
}
