package wireguard

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	wg "github.com/tailscale/wireguard-go/device"
	"github.com/tailscale/wireguard-go/tun"
	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// userSpace makes devices that live in this process.
type userSpace struct {
	ns    *namespace
	links *links
	log   *slog.Logger
}

func newUserSpace(ns *namespace, log *slog.Logger) (*userSpace, error) {
	l, err := newLinks(ns)
	if err != nil {
		return nil, err
	}
	return &userSpace{ns: ns, links: l, log: log}, nil
}

// Links of this datapath end with the process; what else is of ours comes from the
// kernel's datapath.
func (u *userSpace) stale() ([]string, error) { return u.links.kernelLinks() }

func (u *userSpace) remove(name string) error { return u.links.remove(name) }

func (u *userSpace) close() error { u.links.close(); return u.ns.close() }

func (u *userSpace) open(name string) (device, bool, error) {
	// The other datapath may have left one.
	stale, err := u.links.kernelLinks()
	if err != nil {
		return nil, false, err
	}
	for _, s := range stale {
		if s == name {
			if err := u.links.remove(name); err != nil {
				return nil, false, err
			}
		}
	}
	d := &tunDevice{name: name, ns: u.ns, links: u.links, made: make(chan struct{})}
	err = u.ns.do(func() error {
		t, err := tun.CreateTUN(name, wg.DefaultMTU)
		if err != nil {
			return fmt.Errorf("make the TUN link: %w", err)
		}
		link, err := u.links.byName(name)
		if err != nil {
			return errors.Join(err, t.Close())
		}
		d.index = link.Attrs().Index
		d.bind = newBind()
		d.bind.knocked = d.knocked
		d.tun = &nsTUN{Device: t, ns: u.ns, events: make(chan tun.Event, 4), sent: &d.bind.sent, flush: d.flush}
		d.dev = wg.NewDevice(d.tun, d.bind, d.logger(u.log))
		close(d.made)
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	go d.follow()
	return d, false, nil
}

// nsTUN is a TUN link that is asked about in its own namespace, and whose link state is
// followed by us instead of the library: sockets must be opened in the namespace too.
type nsTUN struct {
	tun.Device
	ns     *namespace
	events chan tun.Event

	received int64 // packets read from the link, for the reader alone
	sent     *atomic.Int64
	flush    func()
}

// The library keeps packets for peers that do not answer, up to 16,384 for each, in
// buffers of 64 KiB. So when many more packets were read than were sent, and waiting for
// the encryption does not help, what is kept for such peers is dropped.
const (
	unsentMax  = 4096
	unsentWait = 5 * time.Millisecond
)

func (t *nsTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	unsent := t.received - t.sent.Load()
	if unsent < 0 {
		t.received -= unsent
	}
	for waited := time.Duration(0); unsent > unsentMax; waited += unsentWait / 5 {
		if waited >= unsentWait {
			t.flush()
			t.received = t.sent.Load()
			break
		}
		time.Sleep(unsentWait / 5)
		unsent = t.received - t.sent.Load()
	}
	n, err := t.Device.Read(bufs, sizes, offset)
	t.received += int64(n)
	return n, err
}

func (t *nsTUN) Events() <-chan tun.Event { return t.events }

func (t *nsTUN) MTU() (mtu int, err error) {
	err = t.ns.do(func() error { mtu, err = t.Device.MTU(); return err })
	return mtu, err
}

// tunDevice is one in-process WireGuard on one TUN link.
type tunDevice struct {
	name  string
	index int
	ns    *namespace
	links *links
	tun   *nsTUN
	bind  *bind
	dev   *wg.Device
	made  chan struct{} // closed when dev is set

	peers atomic.Int64 // at the last reading, to know how much room is needed
	door  door

	mu     sync.Mutex
	port   int
	linkUp bool
	upErr  error // of the last attempt to listen
}

// flush drops the packets that wait for a handshake. Called by the one goroutine that
// queues them, so that peers with a session, whose queue is empty then, lose none.
func (d *tunDevice) flush() {
	<-d.made
	var keys []wg.NoisePublicKey
	d.dev.RemoveMatchingPeers(func(k wg.NoisePublicKey) bool { keys = append(keys, k); return false })
	for _, k := range keys {
		if p, ok := d.dev.LookupActivePeer(k); ok {
			p.FlushStagedPackets()
		}
	}
}

// logger hands the library's errors on, a few per second at most: some come per packet.
func (d *tunDevice) logger(log *slog.Logger) *wg.Logger {
	var mu sync.Mutex
	var last time.Time
	return &wg.Logger{Verbosef: wg.DiscardLogf, Errorf: func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) > time.Second {
			last = now
			log.Debug("WireGuard in user space: "+strings.TrimSpace(fmt.Sprintf(format, args...)), "link", d.name)
		}
	}}
}

// follow brings the device up and down with its link and hands on changes of the MTU.
func (d *tunDevice) follow() {
	defer close(d.tun.events)
	for e := range d.tun.Device.Events() {
		if e&tun.EventUp != 0 {
			d.setUp(true)
		}
		if e&tun.EventDown != 0 {
			d.setUp(false)
		}
		if e&tun.EventMTUUpdate != 0 {
			d.tun.events <- tun.EventMTUUpdate
		}
	}
}

func (d *tunDevice) setUp(up bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.linkUp = up
	if up {
		d.upErr = d.open()
		return
	}
	d.upErr = d.dev.Down()
}

// open brings the device up. The library forgets the port when it cannot be had, and
// would take any the next time.
func (d *tunDevice) open() error {
	return d.ns.do(func() error {
		err := d.dev.Up()
		if err != nil {
			return errors.Join(err, d.dev.IpcSetOperation(writeUAPI(wgtypes.Config{ListenPort: &d.port})))
		}
		return nil
	})
}

func (d *tunDevice) listen() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.linkUp && d.upErr != nil {
		d.upErr = d.open()
	}
	if d.upErr != nil {
		return fmt.Errorf("listen on UDP port %d: %w", d.port, d.upErr)
	}
	return nil
}

func (d *tunDevice) configure(cfg wgtypes.Config) error {
	text := writeUAPI(cfg)
	if cfg.PrivateKey != nil {
		d.bind.checker.Init(wg.NoisePublicKey(cfg.PrivateKey.PublicKey()))
		d.door.open(*cfg.PrivateKey)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if cfg.ListenPort == nil { // no socket is opened
		return d.dev.IpcSetOperation(text)
	}
	return d.ns.do(func() error {
		err := d.dev.IpcSetOperation(text)
		if err != nil { // the old port may still be free
			return errors.Join(err, d.dev.IpcSetOperation(writeUAPI(wgtypes.Config{ListenPort: &d.port})))
		}
		d.port = *cfg.ListenPort
		return nil
	})
}

func (d *tunDevice) read() (*wgtypes.Device, error) {
	r := uapiReader{device: &wgtypes.Device{
		Name: d.name, Type: wgtypes.Userspace, Peers: make([]wgtypes.Peer, 0, d.peers.Load()),
	}}
	if err := d.dev.IpcGetOperation(&r); err != nil {
		return nil, err
	}
	d.peers.Store(int64(len(r.device.Peers)))
	return r.device, r.err
}

func (d *tunDevice) alive() (bool, error) {
	select {
	case <-d.dev.Wait():
		return false, nil
	default:
	}
	l, err := d.links.byName(d.name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return l.Attrs().Index == d.index, nil
}

func (d *tunDevice) up() (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.linkUp && d.upErr == nil, nil
}

func (d *tunDevice) initiate(p wgtypes.PeerConfig, _, retry bool) error {
	peer, ok := d.dev.LookupActivePeer(wg.NoisePublicKey(p.PublicKey))
	if !ok {
		return nil
	}
	if retry {
		// Forgets the unanswered handshake, and with it the library's pause of 5 s.
		peer.ExpireCurrentKeypairs()
	}
	return peer.SendHandshakeInitiation(false)
}

func (d *tunDevice) close() error {
	d.dev.Close()
	return nil
}
