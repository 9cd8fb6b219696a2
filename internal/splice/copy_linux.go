// Package splice moves bytes from one TCP connection to another at the least cost: idle
// connections hold neither a buffer nor a pipe, small messages are copied, and bulk data
// is spliced (splice(2)) without coming into this process.
//
// Go's own io.Copy between TCP connections takes a pipe before the first byte, which is
// two more file descriptors for every idle direction.
package splice

import (
	"errors"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

// bulkSize is the size of a copy buffer, in bytes. A direction that fills one at once
// carries bulk data and is spliced, until it no longer does.
const bulkSize = 32 << 10

var buffers = sync.Pool{New: func() any { return new([bulkSize]byte) }}

// pump moves bytes one way. It holds a buffer or a pipe only while there are bytes in it.
type pump struct {
	src, dst *tcpconn.Conn
	pool     *Pool

	n      int   // bytes of the last read
	left   int   // of these, still in the pipe
	err    error // of the last system call
	buffer *[bulkSize]byte
	pipe   *pipe
	nopipe bool
}

// Copy moves bytes from src to dst until src ends, which it passes on as a half-close,
// and then returns nil. A source that was reset is an error, also where who writes
// to it was told of that. A slow destination stops it, and so, by TCP's window, the
// source. It closes neither connection; closing one of them from elsewhere ends it.
//
// moved is called with the number of bytes of each read, and with 0 when these have been
// written; it must be quick.
func (p *Pool) Copy(dst, src *tcpconn.Conn, moved func(n int)) error {
	if err := p.pump(dst, src, moved); err != nil {
		return err
	}
	if err := dst.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) {
		return err
	}
	return nil
}

func (p *Pool) pump(dst, src *tcpconn.Conn, moved func(n int)) error {
	c := &pump{src: src, dst: dst, pool: p}
	defer c.release()
	// Made once: a method value is allocated each time it is formed.
	read, splice, drain := c.read, c.splice, c.drain
	for bulk := false; ; bulk = c.n >= bulkSize {
		c.nopipe = false
		var err error
		if bulk {
			err = src.Raw.Read(splice)
		}
		if !bulk || c.nopipe {
			err = src.Raw.Read(read)
		}
		if err := errors.Join(err, c.err); err != nil {
			return err
		}
		if c.n == 0 {
			return src.Ended()
		}
		src.Took(c.n)
		moved(c.n)
		if c.buffer != nil {
			_, err = dst.Write(c.buffer[:c.n])
			c.giveBuffer()
		} else {
			err = c.pour(drain)
		}
		if err != nil {
			return err
		}
		moved(0)
	}
}

// read reads into a buffer once there is something to read.
func (p *pump) read(fd uintptr) bool {
	p.releasePipe()
	p.buffer, _ = buffers.Get().(*[bulkSize]byte)
	p.n, p.err = retry(func() (int, error) { return unix.Read(int(fd), p.buffer[:]) })
	if errors.Is(p.err, unix.EAGAIN) {
		p.err = nil
		p.giveBuffer()
		return false
	}
	return true
}

// splice moves what there is into a pipe; without a pipe to be had it sets nopipe.
func (p *pump) splice(fd uintptr) bool {
	if p.pipe == nil {
		if p.pipe = p.pool.get(); p.pipe == nil {
			p.nopipe = true
			return true
		}
	}
	p.n, p.err = retry(func() (int, error) {
		return move(int(fd), p.pipe.w, pipeSize)
	})
	if errors.Is(p.err, unix.EAGAIN) {
		p.err = nil
		p.releasePipe()
		return false
	}
	return true
}

// pour empties the pipe.
func (p *pump) pour(drain func(fd uintptr) bool) error {
	p.left = p.n
	err := errors.Join(p.dst.Raw.Write(drain), p.err)
	if err == nil && p.left != 0 {
		err = io.ErrShortWrite
	}
	return err
}

// drain is what a system call of pour does.
func (p *pump) drain(fd uintptr) bool {
	for p.left > 0 {
		var n int
		n, p.err = retry(func() (int, error) {
			return move(p.pipe.r, int(fd), p.left)
		})
		if errors.Is(p.err, unix.EAGAIN) {
			p.err = nil
			return false
		}
		if p.err != nil || n == 0 {
			return true
		}
		p.left -= n
	}
	return true
}

func (p *pump) giveBuffer() {
	buffers.Put(p.buffer)
	p.buffer = nil
}

func (p *pump) releasePipe() {
	if p.pipe != nil {
		p.pool.put(p.pipe, p.left == 0)
		p.pipe = nil
	}
}

func (p *pump) release() {
	if p.buffer != nil {
		p.giveBuffer()
	}
	p.releasePipe()
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return max(n, 0), err
		}
	}
}

// move is splice(2) without the scheduler's knowledge. It never waits, but it takes longer
// than the 20 µs after which Go hands the processor to another thread, which then looks
// for work in vain, at the cost of those who have some.
func move(from, to, n int) (int, error) {
	const flags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK
	moved, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), flags)
	if errno != 0 {
		return 0, errno
	}
	return int(moved), nil
}
