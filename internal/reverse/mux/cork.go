package mux

import (
	"net"
	"sync"
)

// Corked is a connection whose small writes can be collected into large ones. It goes
// under a tls.Conn, which writes each record of 16 KiB by itself. Make it with Cork.
type Corked struct {
	net.Conn
	heard  func() // called with every read that brings something; nil: nobody asks
	mu     sync.Mutex
	corked bool
	buf    *[]byte
	err    error
}

// Cork wraps a connection; until Session (or WriteAll) uses it, it changes nothing.
func Cork(c net.Conn) *Corked { return &Corked{Conn: c} }

// NetConn is the connection underneath.
func (c *Corked) NetConn() net.Conn { return c.Conn }

// corkLimit is when collected bytes go out even though more will come.
const corkLimit = 256 << 10

var corkPool = sync.Pool{New: func() any { b := make([]byte, 0, corkLimit+32<<10); return &b }}

// Read implements net.Conn. What arrives is a sign of life, also when it is not yet a whole record, let
// alone a frame: a slow path is not a dead one.
func (c *Corked) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && c.heard != nil {
		c.heard()
	}
	return n, err
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

func (c *Corked) flush() {
	if c.buf == nil || len(*c.buf) == 0 {
		return
	}
	if _, err := c.Conn.Write(*c.buf); err != nil && c.err == nil {
		c.err = err
	}
	*c.buf = (*c.buf)[:0]
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
	c.corked = false
	c.flush()
	if c.buf != nil {
		corkPool.Put(c.buf)
		c.buf = nil
	}
	return c.err
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
