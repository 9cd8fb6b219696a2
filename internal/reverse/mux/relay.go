package mux

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Conn is what Relay joins: a connection whose directions end one by one. *net.TCPConn,
// *net.UnixConn, *Held, *tls.Conn and *Stream are.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Relay copies between a and b, both ways, until both directions have ended, and closes
// them. When one side is cut the other one is cut as well, so that nobody takes half of
// an answer for all of it; what came before the cut is delivered. The error is the reason.
// The counts are bytes from a to b and back.
func Relay(a, b Conn) (there, back int64, err error) { return RelayAfter(func() {}, a, b) }

// RelayAfter is Relay that sends a nothing before ready has returned.
func RelayAfter(ready func(), a, b Conn) (there, back int64, err error) {
	a, b = watch(a), watch(b)
	var mu sync.Mutex
	note := func(cause error) {
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			err = cause
		}
	}
	var wg sync.WaitGroup
	pump := func(dst, src Conn, n *int64) {
		var failed error
		if *n, failed = transfer(dst, src); failed == nil {
			failed = closeWrite(dst)
			if failed == nil || ended(failed) {
				return
			}
			failed = &writeError{failed}
		}
		note(failed)
		var write *writeError
		if errors.As(failed, &write) {
			// Who no longer reads may have said something before: the other direction brings
			// that, and ends by itself. Meanwhile nothing may pile up here, since closing a
			// socket with something to read throws away what is still to be sent. A Unix socket
			// does not, and it is how its other end is told of a cut: see Held.
			if !(isStream(dst) && isUnix(src)) {
				discard(src)
			}
			return
		}
		if st, ok := dst.(*Stream); ok {
			st.Reset(Cause(failed).Append(nil)) // its other end may log why
		}
		Cut(dst)
		_ = src.Close()
	}
	wg.Go(func() { ready(); pump(a, b, &back) })
	pump(b, a, &there)
	wg.Wait()
	if err == nil {
		_, _ = Release(a), Release(b)
	}
	_, _ = a.Close(), b.Close()
	return there, back, err
}

// closeWrite ends the direction to a connection, behind all that was written to it.
func closeWrite(c Conn) error {
	if k := corkOf(c); k != nil {
		return k.end(c.CloseWrite)
	}
	return c.CloseWrite()
}

func isStream(c Conn) bool { _, ok := c.(*Stream); return ok }

func isUnix(c Conn) bool {
	switch c.(type) {
	case *net.UnixConn, *Held:
		return true
	}
	return false
}

// discardFor is how long the rest of a direction that nobody reads is taken off.
const discardFor = 5 * time.Second

func discard(src Conn) {
	if st, ok := src.(*Stream); ok {
		st.stopReading()
		return
	}
	_ = src.SetReadDeadline(time.Now().Add(discardFor))
	_, _ = io.Copy(io.Discard, src)
}

// writeError is an error of the connection that was written to.
type writeError struct{ error }

// Unwrap returns the cause.
func (e *writeError) Unwrap() error { return e.error }

// ended reports errors of CloseWrite on what the other side closed completely: its data
// has been delivered.
func ended(err error) bool { return errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.EPIPE) }

// Cause says why a stream was cut: the error is one of Relay's, or of a stream. Nil: it was
// not.
func Cause(err error) *wire.Refusal {
	var reset *ResetError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &reset):
		return wire.ParseRefusal(reset.Reason)
	case errors.Is(err, ErrSessionLost):
		return wire.Refuse(wire.ReasonLost, "%v", err)
	}
	return wire.Refuse(wire.ReasonCut, "%v", err)
}

// Cut closes a connection so that the other side does not take it for a clean end, as far
// as its kind allows. A Unix socket's other end reads ECONNRESET only when something that
// it wrote has not been read here, else an end (Linux, unix_release_sock): see Held.
func Cut(c Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		_ = c.SetLinger(0)
		_ = c.Close()
	case *target:
		Cut(c.TCPConn)
	case *tls.Conn:
		// Without close_notify, and with a reset: many take an end of the connection between two
		// records for an end of the stream (RFC 8446, section 6.1, but crypto/tls does, too).
		raw := c.NetConn()
		if corked, ok := raw.(*Corked); ok {
			raw = corked.NetConn()
		}
		if t, ok := raw.(*net.TCPConn); ok {
			_ = t.SetLinger(0)
		}
		_ = c.NetConn().Close()
	default:
		_ = c.Close()
	}
}

func transfer(dst, src Conn) (int64, error) {
	if st, ok := src.(*Stream); ok {
		return st.WriteTo(dst)
	}
	if h, ok := src.(*Held); ok {
		return pumpRaw(dst, h.raw, h.receive)
	}
	if t, ok := src.(*target); ok {
		n, err := pumpRaw(dst, t.Raw, t.receive)
		if err == nil {
			err = t.Ended()
		}
		return n, err
	}
	if sc, ok := src.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			return pumpRaw(dst, raw, readAtOnce)
		}
	}
	return pumpPlain(dst, src)
}

// pumpRaw takes a buffer only once there is something to read: a thousand idle
// connections hold none.
func pumpRaw(dst io.Writer, raw syscall.RawConn, receive func(fd int, b []byte) (int, error)) (total int64, err error) {
	onward, _ := dst.(*Stream)
	for {
		var c *chunk
		var n int
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			c = largePool.Get().(*chunk)
			n, failed = receive(int(fd), c.buf[headroom:])
			if n > 0 {
				c.end = headroom + n
				return true
			}
			c.free()
			if !errors.Is(failed, syscall.EAGAIN) {
				return true
			}
			if onward != nil {
				onward.session.flush()
			}
			return false
		})
		if err == nil {
			err = failed
		}
		if n <= 0 || err != nil {
			return total, err
		}
		if _, err := writeChunks(dst, []*chunk{c}); err != nil {
			return total, &writeError{err}
		}
		total += int64(n)
	}
}

// errNoCloseNotify is the end of a TLS connection whose other end has not said that it ends, as when its
// process was killed: a cut (RFC 8446, section 6.1). crypto/tls takes it for an end where it falls between two records.
var errNoCloseNotify = errors.New("the TLS connection ended without close_notify: its other end was cut off")

// pumpPlain waits with a small buffer and takes a large one while there is much to read.
func pumpPlain(dst io.Writer, src net.Conn) (total int64, err error) {
	flush := func() {}
	if onward, ok := dst.(*Stream); ok {
		flush = onward.session.flush
	}
	if k := corkOf(src); k != nil {
		k.idle, flush = flush, func() {}
		defer func() { k.idle = nil }()
	}
	small := make([]byte, smallChunk/2)
	for {
		n, err := src.Read(small)
		if n > 0 {
			if _, err := dst.Write(small[:n]); err != nil {
				return total, &writeError{err}
			}
			total += int64(n)
		}
		for n == len(small) && err == nil { // there is more
			c := largePool.Get().(*chunk)
			var k int
			k, err = src.Read(c.buf[headroom:])
			c.end = headroom + k
			if k == 0 {
				c.free()
				break
			}
			if _, err := writeChunks(dst, []*chunk{c}); err != nil {
				return total, &writeError{err}
			}
			flush()
			total += int64(k)
			if k < len(small) {
				break
			}
		}
		if errors.Is(err, io.EOF) {
			if k := corkOf(src); k != nil && k.over {
				return total, errNoCloseNotify
			}
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}
