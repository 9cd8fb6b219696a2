package relay

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// bulkSize is the size of a copy buffer, in bytes. A direction that fills one at once
// carries bulk data and is spliced, until it no longer does.
const bulkSize = 32 << 10

var buffers = sync.Pool{New: func() any { return new([bulkSize]byte) }}

// pump moves bytes one way until the source ends, which it passes on as a half-close.
// Any other end resets the connection.
//
// It holds a buffer or a pipe only while there are bytes in it: idle connections cost
// neither. A slow destination stops it, and so, by TCP's window, the source.
type pump struct {
	src, dst syscall.RawConn
	pool     *pipePool

	n      int   // bytes of the last read
	left   int   // of these, still in the pipe
	err    error // of the last system call
	buffer *[bulkSize]byte
	pipe   *pipe
	nopipe bool
}

func (r *Relay) pump(c *tcpConn, dst, src *net.TCPConn, count *atomic.Uint64) {
	if err := r.pumpTo(c, dst, src, count); err != nil {
		c.end()
		return
	}
	if err := dst.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) {
		c.end()
	}
}

func (r *Relay) pumpTo(c *tcpConn, dst, src *net.TCPConn, count *atomic.Uint64) error {
	in, err := src.SyscallConn()
	if err != nil {
		return err
	}
	out, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	p := &pump{src: in, dst: out, pool: &r.pipes}
	defer p.release()
	// Made once: a method value is allocated each time it is formed.
	read, splice, drain := p.read, p.splice, p.drain
	for bulk := false; ; bulk = p.n >= bulkSize {
		p.nopipe = false
		if bulk {
			err = p.src.Read(splice)
		}
		if !bulk || p.nopipe {
			err = p.src.Read(read)
		}
		if err := errors.Join(err, p.err); err != nil {
			return err
		}
		if p.n == 0 {
			return nil
		}
		count.Add(uint64(p.n))
		c.clock.touch()
		if p.buffer != nil {
			_, err = dst.Write(p.buffer[:p.n])
			p.giveBuffer()
		} else {
			p.left = p.n
			err = p.dst.Write(drain)
			if err == nil && p.err == nil && p.left != 0 {
				err = io.ErrShortWrite
			}
		}
		if err := errors.Join(err, p.err); err != nil {
			return err
		}
		c.clock.touch()
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

// drain empties the pipe.
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
