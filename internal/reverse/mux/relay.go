package mux

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// Conn is what Relay joins: a connection whose directions end one by one. *net.TCPConn,
// *net.UnixConn, *tls.Conn and *Stream are.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Relay copies between a and b, both ways, until both directions have ended, and closes
// them. When one side is cut the other one is cut as well, so that nobody takes half of
// an answer for all of it; the error is then the reason. The counts are bytes from a to b
// and back.
func Relay(a, b Conn) (there, back int64, err error) { return RelayAfter(func() {}, a, b) }

// RelayAfter is Relay that sends a nothing before ready has returned.
func RelayAfter(ready func(), a, b Conn) (there, back int64, err error) {
	var once sync.Once
	cut := func(cause error) {
		once.Do(func() {
			err = cause
			Cut(a)
			Cut(b)
		})
	}
	var wg sync.WaitGroup
	pump := func(dst, src Conn, n *int64) {
		var failed error
		if *n, failed = transfer(dst, src); failed == nil {
			failed = dst.CloseWrite()
		}
		if failed != nil && !ended(failed) {
			cut(failed)
		}
	}
	wg.Go(func() { ready(); pump(a, b, &back) })
	pump(b, a, &there)
	wg.Wait()
	_, _ = a.Close(), b.Close()
	return there, back, err
}

// ended reports errors of CloseWrite on what the other side closed completely: its data
// has been delivered.
func ended(err error) bool { return errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.EPIPE) }

// Cut closes a connection so that the other side does not take it for a clean end, as far
// as its kind allows.
func Cut(c Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		_ = c.SetLinger(0)
		_ = c.Close()
	case *tls.Conn:
		_ = c.NetConn().Close() // without close_notify
	default:
		_ = c.Close()
	}
}

const pumpBuffer = 64 << 10

var pumpPool = sync.Pool{New: func() any { b := make([]byte, pumpBuffer); return &b }}

func transfer(dst, src Conn) (int64, error) {
	if st, ok := src.(*Stream); ok {
		return st.WriteTo(dst)
	}
	if sc, ok := src.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			return pumpRaw(dst, raw)
		}
	}
	return pumpPlain(dst, src)
}

// pumpRaw takes a buffer only once there is something to read: a thousand idle
// connections hold none.
func pumpRaw(dst io.Writer, raw syscall.RawConn) (total int64, err error) {
	for {
		var buf *[]byte
		var n int
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			buf = pumpPool.Get().(*[]byte)
			for {
				n, failed = syscall.Read(int(fd), *buf)
				if !errors.Is(failed, syscall.EINTR) {
					break
				}
			}
			if errors.Is(failed, syscall.EAGAIN) {
				pumpPool.Put(buf)
				buf = nil
				return false
			}
			return true
		})
		if err == nil {
			err = failed
		}
		if n > 0 && err == nil {
			_, err = dst.Write((*buf)[:n])
		}
		if buf != nil {
			pumpPool.Put(buf)
		}
		if n <= 0 || err != nil {
			return total, err
		}
		total += int64(n)
	}
}

// pumpPlain waits with a small buffer and takes a large one while there is much to read.
func pumpPlain(dst io.Writer, src io.Reader) (total int64, err error) {
	small := make([]byte, 2<<10)
	b := small
	var large *[]byte
	release := func() {
		if large != nil {
			pumpPool.Put(large)
			large = nil
		}
	}
	defer release()
	for {
		n, err := src.Read(b)
		if n > 0 {
			if _, err := dst.Write(b[:n]); err != nil {
				return total, err
			}
			total += int64(n)
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		switch {
		case n == len(b) && large == nil:
			large = pumpPool.Get().(*[]byte)
			b = *large
		case n < len(small) && large != nil:
			release()
			b = small
		}
	}
}
