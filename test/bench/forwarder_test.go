package bench

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// forwarder is a TCP path with a delay: half a round trip each way. Everybody's traffic
// goes through one, with and without delay.
type forwarder struct {
	half  atomic.Int64 // nanoseconds
	bytes atomic.Int64 // both ways
}

// forward listens on a host and passes connections on to another address there.
func forward(h *labtest.Host, listen, to string) *forwarder {
	f := &forwarder{}
	labtest.Serve(h.Listen(listen), func(c net.Conn) {
		d, err := dial(h, "tcp", to)
		if err != nil {
			return
		}
		go f.pass(c, d)
		f.pass(d, c)
	})
	return f
}

// piece is a part of what is under way.
type piece struct {
	due time.Time
	b   []byte
}

var pieces = sync.Pool{New: func() any { b := make([]byte, 128<<10); return &b }}

// pass carries one direction; its end ends both.
func (f *forwarder) pass(to, from net.Conn) {
	way := make(chan piece, 2048)
	go func() {
		defer close(way)
		for {
			b := *pieces.Get().(*[]byte)
			n, err := from.Read(b)
			if n > 0 {
				way <- piece{time.Now().Add(time.Duration(f.half.Load())), b[:n]}
			}
			if err != nil {
				return
			}
		}
	}()
	failed := false
	for p := range way {
		if d := time.Until(p.due); d > 0 {
			time.Sleep(d)
		}
		if !failed {
			n, err := to.Write(p.b)
			f.bytes.Add(int64(n))
			failed = err != nil
		}
		b := p.b[:cap(p.b)]
		pieces.Put(&b)
	}
	_, _ = to.Close(), from.Close()
}
