package mux

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Corked is a connection whose small writes can be collected into large ones. It goes
// under a tls.Conn, which writes each record of 16 KiB by itself. Make it with Cork.
type Corked struct {
	net.Conn
	raw    syscall.RawConn // nil: it cannot be used without waiting
	heard  func()          // called with every read that brings something; nil: nobody asks
	idle   func()          // called before a read waits; nil: nobody asks
	over   bool            // a read has found the end of the connection, which TLS does not need to end
	mu     sync.Mutex
	corked bool
	buf    *[]byte
	sent   int // bytes of buf
	err    error
}

// Cork wraps a connection; until a Session or Relay uses it, it changes nothing.
func Cork(c net.Conn) *Corked {
	k := &Corked{Conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		k.raw, _ = sc.SyscallConn()
	}
	return k
}

// NetConn is the connection underneath.
func (c *Corked) NetConn() net.Conn { return c.Conn }

// corkLimit is when collected bytes go out even though more will come.
const corkLimit = 256 << 10

var corkPool = sync.Pool{New: func() any { b := make([]byte, 0, corkLimit+32<<10); return &b }}

// Read implements net.Conn. What arrives is a sign of life, also when it is not yet a whole record, let
// alone a frame: a slow path is not a dead one.
func (c *Corked) Read(p []byte) (int, error) {
	n, err := c.read(p)
	c.over = c.over || errors.Is(err, io.EOF)
	if n > 0 && c.heard != nil {
		c.heard()
	}
	return n, err
}

func (c *Corked) read(p []byte) (n int, err error) {
	if c.idle == nil {
		return c.Conn.Read(p)
	}
	if c.raw != nil && len(p) > 0 {
		var failed error
		err = c.raw.Read(func(fd uintptr) bool {
			n, failed = readAtOnce(int(fd), p)
			return true
		})
		switch {
		case err != nil:
			return 0, err
		case failed == nil && n == 0:
			return 0, io.EOF
		case failed == nil:
			return n, nil
		case !errors.Is(failed, syscall.EAGAIN):
			return 0, os.NewSyscallError("read", failed)
		}
	}
	// Not in the function above: it would keep the connection from being closed.
	c.idle()
	return c.Conn.Read(p)
}

// Write implements net.Conn.
func (c *Corked) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.corked {
		return c.Conn.Write(p)
	}
	if c.err != nil {
		return 0, c.err
	}
	if c.buf == nil {
		c.buf = corkPool.Get().(*[]byte)
	}
	*c.buf = append(*c.buf, p...)
	if len(*c.buf) >= corkLimit {
		c.flush()
	}
	return len(p), c.err
}

// flush writes what was collected.
func (c *Corked) flush() {
	if c.buf == nil || c.err != nil {
		return
	}
	_, c.err = c.Conn.Write((*c.buf)[c.sent:])
	*c.buf, c.sent = (*c.buf)[:0], 0
}

// cork starts collecting.
func (c *Corked) cork() {
	c.mu.Lock()
	c.corked = true
	c.mu.Unlock()
}

// uncork writes what was collected and stops collecting.
func (c *Corked) uncork() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flush()
	c.release()
	return c.err
}

// end writes what was collected, and behind it what closeWrite of the tls.Conn above writes, however long the other
// end takes to read: by itself, crypto/tls gives its end five seconds, and then ends all writing, what is left
// here included.
func (c *Corked) end(closeWrite func() error) error {
	if err := c.uncork(); err != nil {
		return err
	}
	c.cork()
	err := closeWrite()
	_ = c.SetWriteDeadline(time.Time{})
	return errors.Join(err, c.uncork())
}

// tryUncork is uncork that does not wait: rest reports that something is left, and that uncork has
// to be called before anything else is written.
func (c *Corked) tryUncork() (rest bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buf != nil && c.err == nil {
		b := (*c.buf)[c.sent:]
		var n int
		var failed error
		err := c.raw.Write(func(fd uintptr) bool {
			n, failed = writeAtOnce(int(fd), b)
			return true
		})
		if errors.Is(failed, syscall.EAGAIN) {
			n, failed = 0, nil
		}
		if err == nil && failed != nil {
			err = os.NewSyscallError("write", failed)
		}
		if c.err = err; err == nil && n < len(b) {
			c.sent += n
			return true, nil
		}
	}
	c.release()
	return false, c.err
}

// free reports whether nothing waits to be written, and nobody is at it.
func (c *Corked) free() bool {
	if !c.mu.TryLock() {
		return false
	}
	defer c.mu.Unlock()
	return c.buf == nil
}

// release stops collecting, with nothing collected.
func (c *Corked) release() {
	c.corked, c.sent = false, 0
	if c.buf != nil {
		*c.buf = (*c.buf)[:0]
		corkPool.Put(c.buf)
		c.buf = nil
	}
}

// corkOf finds the corked connection under a tls.Conn; nil when there is none.
func corkOf(c net.Conn) *Corked {
	t, ok := c.(interface{ NetConn() net.Conn })
	if !ok {
		return nil
	}
	k, _ := t.NetConn().(*Corked)
	return k
}
