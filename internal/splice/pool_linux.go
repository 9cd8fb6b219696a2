package splice

import (
	"sync"

	"golang.org/x/sys/unix"
)

// pipeSize is the capacity asked for, in bytes; the kernel may grant less
// (fs.pipe-user-pages-soft), which costs speed only.
const pipeSize = 1 << 20

// maxPipes bounds the pipes that exist at a time; further bulk data is copied.
const maxPipes = 256

// pipe is what splice(2) needs between two sockets.
type pipe struct{ r, w int }

func newPipe() (*pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, err
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{fds[0], fds[1]}, nil
}

func (p *pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// Pool keeps the pipes of any number of connections. The zero value is ready; its methods
// may be called concurrently.
type Pool struct {
	mu     sync.Mutex
	count  int // in use and free
	free   []*pipe
	unused int // the fewest free ones since the last trim
}

// get returns an empty pipe, or nil when there are too many already or no descriptors.
func (p *Pool) get() *pipe {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free); n > 0 {
		pipe := p.free[n-1]
		p.free = p.free[:n-1]
		p.unused = min(p.unused, n-1)
		return pipe
	}
	if p.count >= maxPipes {
		return nil
	}
	pipe, err := newPipe()
	if err != nil {
		return nil
	}
	p.count++
	return pipe
}

// put takes a pipe back; one that is not empty is closed.
func (p *Pool) put(pipe *pipe, empty bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !empty {
		pipe.close()
		p.count--
		return
	}
	p.free = append(p.free, pipe)
}

// Trim closes the pipes that nobody needed since the last call; call it now and then.
func (p *Pool) Trim() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for range p.unused {
		n := len(p.free) - 1
		p.free[n].close()
		p.free = p.free[:n]
		p.count--
	}
	p.unused = len(p.free)
}

// Close closes the pipes; no Copy may be under way.
func (p *Pool) Close() {
	p.Trim()
	p.Trim()
}
