// Package wireguard applies and observes WireGuard devices and their peers, behind one
// type for two datapaths: the kernel's (Linux 5.6 or later) and one in this process
// (a TUN link and user-space code).
//
// It makes and removes the links themselves. It knows nothing of addresses, routes or
// firewalls, nor of where a peer's configuration comes from. A link of ours is not
// brought up here: whoever sets its addresses does that, and peers are reached from then on.
package wireguard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Datapath says who encrypts.
type Datapath string

// The datapaths.
const (
	Kernel    Datapath = "kernel"    // the kernel's WireGuard, Linux 5.6
	UserSpace Datapath = "userspace" // in this process, on a TUN link
)

// linkPrefix starts the names of our links; others are never touched.
const linkPrefix = "cvt"

// Options for New; the zero value is usable.
type Options struct {
	Datapath Datapath     // empty: Kernel where a link can be made, else UserSpace
	Logger   *slog.Logger // nil: silent
}

// WireGuard holds the WireGuard devices of one network namespace. Its methods may be
// called from any goroutine.
type WireGuard struct {
	kind Datapath
	path datapath
	ns   *namespace
	log  *slog.Logger

	mu      sync.Mutex
	devices map[string]*managed
	closed  bool
}

// datapath makes devices; one implementation per kind.
type datapath interface {
	// open makes the link, or takes over one of the same kind and name; found tells which.
	open(name string) (d device, found bool, err error)
	// stale lists links of ours, by name and kind, that outlive a process.
	stale() ([]string, error)
	remove(name string) error
	close() error
}

// device is one WireGuard interface. The configuration's own types are wgctrl's on both
// datapaths.
type device interface {
	configure(cfg wgtypes.Config) error
	// read may leave out private and pre-shared keys.
	read() (*wgtypes.Device, error)
	// alive reports whether the link is still the one that was opened.
	alive() (bool, error)
	// listen makes sure that the device receives if its link is up.
	listen() error
	// up reports whether the link is up, so that packets can be sent.
	up() (bool, error)
	// initiate sends a handshake initiation now. retry: the previous one is younger than
	// the protocol's pause of rekeyTimeout. The peer's whole configuration is given; met:
	// it had a session, which is not to be lost.
	initiate(p wgtypes.PeerConfig, met, retry bool) error
	// admitBy asks to hold a handshake initiation of a peer that r says waits until r has
	// admitted it; false: the device must be told of all peers beforehand.
	admitBy(r roster) bool
	// close removes the link.
	close() error
}

// managed is an open device, what it was told, and its handshakes under way.
type managed struct {
	device
	name  string
	hello *initiator

	mu      sync.Mutex // of configuring and of sending handshakes
	applied applied
	waiting sync.Map // keys of peers that wait: a hint, applied is what counts
}

// New prepares to serve the network namespace of the calling thread: links, sockets and
// netlink stay there whichever thread calls later. It needs CAP_NET_ADMIN. With a forced
// Kernel datapath that the kernel does not offer it fails.
func New(o Options) (*WireGuard, error) {
	ns, err := currentNamespace()
	if err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	w := &WireGuard{ns: ns, log: o.Logger, devices: map[string]*managed{}}
	switch o.Datapath {
	case "", Kernel:
		k, err := newKernel(ns)
		if err == nil {
			w.kind, w.path = Kernel, k
			return w, nil
		}
		if o.Datapath == Kernel {
			return nil, fmt.Errorf("WireGuard in the kernel: %w", err)
		}
		w.log.Info("no WireGuard in the kernel, using user space", "cause", err)
		fallthrough
	case UserSpace:
		u, err := newUserSpace(ns, w.log)
		if err != nil {
			return nil, fmt.Errorf("WireGuard in user space: %w", err)
		}
		w.kind, w.path = UserSpace, u
		return w, nil
	}
	return nil, fmt.Errorf("unknown WireGuard datapath %q (%s, %s or empty)", o.Datapath, Kernel, UserSpace)
}

// Datapath tells which datapath is in use.
func (w *WireGuard) Datapath() Datapath { return w.kind }

// Set makes the devices and peers as desired: missing links are made, links of ours that
// are not desired are removed, and only what differs is told to a device. A pre-shared
// key counts from the next handshake on (at most 2 minutes), as in every WireGuard; a
// change of our own private key makes all peers of the device shake hands again at once.
//
// It returns the number of links, device settings and peers that were changed. On an
// error the rest is still applied, and the next Set tries again. The prefixes in desired must
// not be changed afterwards.
func (w *WireGuard) Set(ctx context.Context, desired []netstate.WireGuard) (changed int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, errors.New("set WireGuard: closed")
	}
	want := map[string]bool{}
	var errs []error
	for _, d := range desired {
		want[d.Link] = true
	}
	n, err := w.removeOthers(want)
	changed += n
	errs = append(errs, err)
	for _, d := range desired {
		if err := ctx.Err(); err != nil {
			return changed, errors.Join(append(errs, err)...)
		}
		n, err := w.setDevice(d)
		changed += n
		if err != nil {
			errs = append(errs, fmt.Errorf("WireGuard device %s: %w", d.Link, err))
		}
	}
	return changed, errors.Join(errs...)
}

func (w *WireGuard) removeOthers(want map[string]bool) (changed int, err error) {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(w.devices)) {
		if want[name] {
			continue
		}
		if err := w.devices[name].stop(); err != nil {
			errs = append(errs, fmt.Errorf("remove WireGuard device %s: %w", name, err))
			continue
		}
		delete(w.devices, name)
		changed++
	}
	names, err := w.path.stale()
	errs = append(errs, err)
	for _, name := range names {
		if want[name] || w.devices[name] != nil {
			continue
		}
		if err := w.path.remove(name); err != nil {
			errs = append(errs, fmt.Errorf("remove WireGuard link %s: %w", name, err))
			continue
		}
		changed++
	}
	return changed, errors.Join(errs...)
}

func (w *WireGuard) setDevice(d netstate.WireGuard) (changed int, err error) {
	m, opened, err := w.deviceFor(d.Link)
	if err != nil {
		return 0, err
	}
	if opened {
		changed++
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c, err := m.applied.diff(d, time.Now())
	if c == nil {
		return changed, err
	}
	errs := []error{err}
	m.askAgain(c)
	if !c.empty() {
		if err := m.configure(c.config); err != nil {
			m.applied.unknown = true
			return changed, errors.Join(append(errs, err)...)
		}
		m.hello.forget(c.gone)
		m.applied.record(c)
		m.noteWaiting(c)
		changed += c.count
	}
	m.applied.asked = c.device.asked
	m.hello.start(c.hello)
	return changed, errors.Join(append(errs, m.listen())...)
}

// askAgain adds what a change of a key needs, ours or a peer's, so that traffic does not
// wait for the protocol's timers: handshakes with all who had a session, and the old
// key's last address for the new key.
func (m *managed) askAgain(c *change) {
	if !c.privateKey && len(c.replaced) == 0 || len(m.applied.peers) == 0 {
		return
	}
	d, err := m.read()
	if err != nil {
		return // the peers' own timers remain
	}
	now := time.Now()
	at := map[wgtypes.Key]*net.UDPAddr{}
	for _, p := range d.Peers {
		if p.Endpoint == nil || time.Since(p.LastHandshakeTime) > sessionLifetime {
			continue
		}
		at[p.PublicKey] = p.Endpoint
		if c.privateKey {
			c.hello[p.PublicKey] = greeting{after: now, eager: true}
		}
	}
	for i := range c.config.Peers {
		p := &c.config.Peers[i]
		if old, ok := c.replaced[p.PublicKey]; ok && p.Endpoint == nil {
			p.Endpoint = at[old]
		}
	}
}

// deviceFor finds the open device of a name, or makes one when there is none or its link
// is gone.
func (w *WireGuard) deviceFor(name string) (m *managed, opened bool, err error) {
	if !strings.HasPrefix(name, linkPrefix) {
		return nil, false, fmt.Errorf("link names start with %q", linkPrefix)
	}
	if m := w.devices[name]; m != nil {
		ok, err := m.alive()
		if err != nil {
			return nil, false, err
		}
		if ok && m.known() {
			return m, false, nil
		}
		if !ok {
			w.log.Warn("WireGuard link is gone, making it again", "link", name)
			_ = m.stop()
			delete(w.devices, name)
		} else if _, err := m.observe(true); err != nil {
			return nil, false, err
		} else {
			return m, false, nil
		}
	}
	d, found, err := w.path.open(name)
	if err != nil {
		return nil, false, err
	}
	m = &managed{device: d, name: name, applied: applied{peers: map[wgtypes.Key]peer{}}}
	m.applied.lazy = d.admitBy(m)
	if found {
		if _, err := m.observe(true); err != nil {
			return nil, false, errors.Join(err, d.close())
		}
	}
	m.hello = newInitiator(m, w.ns, w.log)
	w.devices[name] = m
	return m, !found, nil
}

// known: what the device holds is what applied says.
func (m *managed) known() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.applied.unknown
}

func (m *managed) stop() error {
	m.hello.stop()
	return m.close()
}

// Device is what one device knows of its peers.
type Device struct {
	Link       string
	PublicKey  netstate.Key
	ListenPort uint16
	Peers      []Peer // ordered by public key
}

// Peer is what is known of one peer.
type Peer struct {
	PublicKey     netstate.Key
	Endpoint      netip.AddrPort // where it last sent from, or was configured; zero: not known
	LastHandshake time.Time      // zero: never
	ReceivedBytes uint64         // of outer packets' payloads, since the peer was added
	SentBytes     uint64
	AllowedIPs    []netip.Prefix
}

// Observe reads all devices that Set made. On the kernel datapath it also notices what
// others changed, which the next Set then repairs.
func (w *WireGuard) Observe(ctx context.Context) ([]Device, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []Device
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(w.devices)) {
		if err := ctx.Err(); err != nil {
			return out, errors.Join(append(errs, err)...)
		}
		d, err := w.devices[name].observe(w.kind == Kernel)
		if err != nil {
			errs = append(errs, fmt.Errorf("read WireGuard device %s: %w", name, err))
			continue
		}
		out = append(out, d)
	}
	return out, errors.Join(errs...)
}

// observe reads the device; adopting, what it holds counts as applied.
func (m *managed) observe(adopting bool) (Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.read()
	if err != nil {
		return Device{}, err
	}
	if adopting {
		m.applied = appliedFrom(d, m.applied)
	}
	return m.observed(d), nil
}

func (m *managed) observed(d *wgtypes.Device) Device {
	out := Device{
		Link: m.name, PublicKey: netstate.Key(d.PublicKey), ListenPort: uint16(d.ListenPort),
		Peers: make([]Peer, 0, max(len(d.Peers), len(m.applied.peers))),
	}
	for i := range d.Peers {
		p := &d.Peers[i]
		o := Peer{
			PublicKey: netstate.Key(p.PublicKey), LastHandshake: p.LastHandshakeTime,
			ReceivedBytes: uint64(p.ReceiveBytes), SentBytes: uint64(p.TransmitBytes),
			AllowedIPs: prefixes(p.AllowedIPs),
		}
		o.Endpoint = addrPort(p.Endpoint)
		out.Peers = append(out.Peers, o)
	}
	for k, p := range m.applied.peers {
		if p.waits {
			out.Peers = append(out.Peers, Peer{
				PublicKey: netstate.Key(k), Endpoint: p.endpoint, AllowedIPs: slices.Clone(p.allowed),
			})
		}
	}
	slices.SortFunc(out.Peers, func(a, b Peer) int { return bytes.Compare(a.PublicKey[:], b.PublicKey[:]) })
	return out
}

// Close removes all links that Set made. On both datapaths that ends the tunnels.
func (w *WireGuard) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(w.devices)) {
		if err := w.devices[name].stop(); err != nil {
			errs = append(errs, fmt.Errorf("remove WireGuard device %s: %w", name, err))
		}
	}
	clear(w.devices)
	return errors.Join(append(errs, w.path.close())...)
}
