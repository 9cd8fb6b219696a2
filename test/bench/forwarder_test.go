package bench

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// forwarder is a TCP path with a delay: half a round trip each way. Everybody's traffic goes through
// one. Without a delay the kernel passes the bytes on (splice), so that the forwarder is no bottleneck
// of its own.
type forwarder struct {
	half atomic.Int64 // nanoseconds

	mu    sync.Mutex
	open  map[*net.TCPConn]bool
	ended int64 // bytes of connections that are no longer open
}

// forward listens on a host and passes connections on to another address there.
func forward(h *labtest.Host, listen, to string) *forwarder {
	f := &forwarder{open: map[*net.TCPConn]bool{}}
	labtest.Serve(h.Listen(listen), func(c net.Conn) {
		d, err := dial(h, "tcp", to)
		if err != nil {
			return
		}
		one, other := c.(*net.TCPConn), d.(*net.TCPConn)
		var both sync.WaitGroup
		both.Go(func() { f.pass(one, other) })
		f.pass(other, one)
		both.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, x := range []*net.TCPConn{one, other} {
			f.ended += received(x)
			delete(f.open, x)
			_ = x.Close()
		}
	})
	return f
}

// delay makes a round trip so long from now on.
func (f *forwarder) delay(rtt time.Duration) {
	f.half.Store(int64(rtt / 2))
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.open { // whoever passes bytes on without a delay looks again
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
}

// bytes is how many have come in, both ways.
func (f *forwarder) bytes() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	sum := f.ended
	for c := range f.open {
		sum += received(c)
	}
	return sum
}

func received(c *net.TCPConn) (n int64) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = int64(info.Bytes_received)
		}
	})
	return n
}

// piece is a part of what is under way; none: whoever waits for drained is to go on.
type piece struct {
	due time.Time
	b   []byte
}

var pieces = sync.Pool{New: func() any { b := make([]byte, 128<<10); return &b }}

// pass carries one direction; its end ends both.
func (f *forwarder) pass(to, from *net.TCPConn) {
	f.mu.Lock()
	f.open[from] = true
	f.mu.Unlock()
	way, drained := make(chan piece, 2048), make(chan struct{})
	go func() {
		defer close(way)
		f.read(to, from, way, drained)
	}()
	failed := false
	for p := range way {
		if p.b == nil {
			drained <- struct{}{}
			continue
		}
		if d := time.Until(p.due); d > 0 {
			time.Sleep(d)
		}
		if !failed {
			_, err := to.Write(p.b)
			failed = err != nil
		}
		b := p.b[:cap(p.b)]
		pieces.Put(&b)
	}
	_, _ = to.CloseWrite(), to.CloseRead()
}

// read puts on the way what comes, and, while there is no delay, passes it on itself.
func (f *forwarder) read(to, from *net.TCPConn, way chan<- piece, drained <-chan struct{}) {
	for {
		var err error
		if half := time.Duration(f.half.Load()); half == 0 {
			way <- piece{} // what is under way goes first
			<-drained
			if _, err = to.ReadFrom(from); err == nil {
				return // the end
			}
		} else {
			b := *pieces.Get().(*[]byte)
			var read int
			if read, err = from.Read(b); read > 0 {
				way <- piece{time.Now().Add(half), b[:read]}
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) { // the delay is another one
			_ = from.SetReadDeadline(time.Time{})
			continue
		}
		if err != nil {
			return
		}
	}
}
