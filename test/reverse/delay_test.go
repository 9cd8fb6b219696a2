package reverse

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// delay makes a path that takes half a round trip each way; while it is frozen nothing
// gets through, as on a path that has died without a word.
type delay struct {
	half   time.Duration
	frozen atomic.Bool
}

type block struct {
	at time.Time
	b  []byte
}

// delayed is one connection over such a path.
type delayed struct {
	net.Conn
	path *delay

	out  chan block
	in   chan block
	rest []byte
	once sync.Once
	done chan struct{}
	err  atomic.Value
}

func (d *delay) wrap(c net.Conn) net.Conn {
	x := &delayed{Conn: c, path: d, out: make(chan block, 4096), in: make(chan block, 4096), done: make(chan struct{})}
	go x.writer()
	go x.reader()
	return x
}

func (x *delayed) wait(b block) {
	time.Sleep(time.Until(b.at))
	for x.path.frozen.Load() {
		select {
		case <-x.done:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (x *delayed) writer() {
	for {
		select {
		case <-x.done:
			return
		case b := <-x.out:
			x.wait(b)
			if _, err := x.Conn.Write(b.b); err != nil {
				return
			}
		}
	}
}

func (x *delayed) reader() {
	defer close(x.in)
	for {
		b := make([]byte, 64<<10)
		n, err := x.Conn.Read(b)
		if n > 0 {
			select {
			case x.in <- block{time.Now().Add(x.path.half), b[:n]}:
			case <-x.done:
				return
			}
		}
		if err != nil {
			x.err.Store(err)
			return
		}
	}
}

// Read implements net.Conn.
func (x *delayed) Read(b []byte) (int, error) {
	for len(x.rest) == 0 {
		select {
		case next, ok := <-x.in:
			if !ok {
				err, _ := x.err.Load().(error)
				if err == nil {
					err = net.ErrClosed
				}
				return 0, err
			}
			x.wait(next)
			x.rest = next.b
		case <-x.done:
			return 0, net.ErrClosed
		}
	}
	n := copy(b, x.rest)
	x.rest = x.rest[n:]
	return n, nil
}

// Write implements net.Conn.
func (x *delayed) Write(b []byte) (int, error) {
	select {
	case x.out <- block{time.Now().Add(x.path.half), append([]byte(nil), b...)}:
		return len(b), nil
	case <-x.done:
		return 0, net.ErrClosed
	}
}

// Close implements net.Conn.
func (x *delayed) Close() error {
	x.once.Do(func() { close(x.done) })
	return x.Conn.Close()
}
