package wireguard

import (
	"encoding/binary"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailscale/wireguard-go/conn"
	wg "github.com/tailscale/wireguard-go/device"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A gateway that restarts is greeted by all devices at once. The library then thinks
// itself under load (128 handshakes waiting) and admits 20 per second and source address,
// which for a thousand devices behind one NAT is most of a minute. So handshake
// initiations wait here instead, and go in at a pace that the library keeps up with. Only
// when far more come than can be served, for long, is the rest left to its limiter.
const (
	waitingMax     = 4096
	waitingTooLong = 4 * time.Second // by then the peer has sent another one
	floodAfter     = 10 * time.Second
	paceBatch      = 16
	insideMax      = 4 * paceBatch          // a busy machine does not keep up with the pace
	stuckAfter     = 250 * time.Millisecond // then the library dropped some
)

// pace is the time that a batch of handshakes takes this machine at most: four
// Curve25519 multiplications each.
var pace = paceBatch * 2 * time.Millisecond / time.Duration(runtime.NumCPU())

// initiation is a handshake initiation that waits.
type initiation struct {
	packet [wg.MessageInitiationSize]byte
	from   conn.Endpoint
	at     time.Time
}

// bind is the sockets of a device, with initiations held back.
type bind struct {
	sockets
	checker wg.CookieChecker
	waiting chan *initiation
	sent    atomic.Int64 // packets handed to the sockets
	// knocked is told of initiations by the peer's key before the library looks it up.
	knocked func(key wgtypes.Key, packet *[wg.MessageInitiationSize]byte)
	inside  atomic.Int64 // initiations that the library was given and has not looked at

	mu       sync.Mutex
	quit     chan struct{} // closed by Close
	fullFrom time.Time     // since when initiations find no room; zero: they do
}

func newBind() *bind {
	return &bind{waiting: make(chan *initiation, waitingMax)}
}

// Open adds a source of packets to the sockets': those that waited.
func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, actual, err := b.sockets.Open(port)
	if err != nil {
		return nil, 0, err
	}
	for i, fn := range fns {
		fns[i] = b.holdBack(fn)
	}
	quit := make(chan struct{})
	b.mu.Lock()
	b.quit = quit
	b.mu.Unlock()
	return append(fns, b.release(quit)), actual, nil
}

// Close ends all receiving.
func (b *bind) Close() error {
	b.mu.Lock()
	if b.quit != nil {
		close(b.quit)
		b.quit = nil
	}
	b.mu.Unlock()
	return b.sockets.Close()
}

// Send counts what it sends.
func (b *bind) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	b.sent.Add(int64(len(bufs)))
	if k, ok := to.(*knock); ok {
		to = k.Endpoint
	}
	return b.sockets.Send(bufs, to, offset)
}

func (b *bind) holdBack(fn conn.ReceiveFunc) conn.ReceiveFunc {
	return func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		n, err := fn(bufs, sizes, eps)
		for i := range sizes[:n] {
			if sizes[i] == wg.MessageInitiationSize && binary.LittleEndian.Uint32(bufs[i]) == wg.MessageInitiationType {
				w := &initiation{packet: [wg.MessageInitiationSize]byte(bufs[i]), from: eps[i], at: time.Now()}
				if b.hold(w) {
					sizes[i] = 0 // the library skips it
				} else {
					eps[i] = &knock{Endpoint: w.from, bind: b, packet: &w.packet}
				}
			}
		}
		return n, err
	}
}

// hold takes an initiation, or drops one that is not for our key; false: it goes in now.
func (b *bind) hold(w *initiation) bool {
	if !b.checker.CheckMAC1(w.packet[:]) {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case b.waiting <- w:
		if len(b.waiting) < waitingMax/2 {
			b.fullFrom = time.Time{}
		}
		return true
	default:
	}
	if b.fullFrom.IsZero() {
		b.fullFrom = w.at
	}
	return w.at.Sub(b.fullFrom) < floodAfter
}

// release receives what waited, paced.
func (b *bind) release(quit chan struct{}) conn.ReceiveFunc {
	var next time.Time
	return func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		var w *initiation
		select {
		case <-quit:
			return 0, net.ErrClosed
		case w = <-b.waiting:
		}
		if !b.room(next, quit) {
			return 0, net.ErrClosed
		}
		n := 0
		for now := time.Now(); ; {
			if now.Sub(w.at) < waitingTooLong {
				sizes[n], eps[n] = copy(bufs[n], w.packet[:]), &knock{Endpoint: w.from, bind: b, packet: &w.packet, counted: true}
				b.inside.Add(1)
				n++
			}
			if n == paceBatch || n == len(bufs) {
				break
			}
			select {
			case w = <-b.waiting:
				continue
			default:
			}
			break
		}
		next = time.Now().Add(pace * time.Duration(n) / paceBatch)
		return n, nil
	}
}

// room waits until the next initiations may go in; false: quit.
func (b *bind) room(next time.Time, quit chan struct{}) bool {
	for stuck := time.Now().Add(stuckAfter); ; next = time.Now().Add(time.Millisecond) {
		if d := time.Until(next); d > 0 {
			select {
			case <-quit:
				return false
			case <-time.After(d):
			}
		}
		if time.Now().After(stuck) {
			b.inside.Store(0)
		}
		if b.inside.Load() < insideMax {
			return true
		}
	}
}
