package wireguard

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// kernel makes devices of the kernel's WireGuard.
type kernel struct {
	ns    *namespace
	links *links
	wg    *wgctrl.Client
}

// probeLink is made and removed to find out whether the kernel has WireGuard: no list of
// modules tells, and making it loads the module.
const probeLink = linkPrefix + "probe"

func newKernel(ns *namespace) (*kernel, error) {
	l, err := newLinks(ns)
	if err != nil {
		return nil, err
	}
	k := &kernel{ns: ns, links: l}
	if err := k.probe(); err != nil {
		l.close()
		return nil, err
	}
	return k, nil
}

func (k *kernel) probe() error {
	err := k.links.add(probeLink)
	if err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make a link of type wireguard: %w", err)
	}
	if err := k.links.remove(probeLink); err != nil {
		return fmt.Errorf("remove link %s: %w", probeLink, err)
	}
	err = k.ns.do(func() (err error) { k.wg, err = wgctrl.New(); return err })
	if err != nil {
		return fmt.Errorf("open WireGuard's generic netlink: %w", err)
	}
	return nil
}

func (k *kernel) stale() ([]string, error) { return k.links.kernelLinks() }

func (k *kernel) remove(name string) error { return k.links.remove(name) }

func (k *kernel) close() error {
	k.links.close()
	return errors.Join(k.wg.Close(), k.ns.close())
}

func (k *kernel) open(name string) (device, bool, error) {
	err := k.links.add(name)
	found := errors.Is(err, os.ErrExist)
	if err != nil && !found {
		return nil, false, fmt.Errorf("make the link: %w", err)
	}
	l, err := k.links.byName(name)
	if err != nil {
		return nil, false, err
	}
	if l.Type() != wireGuardKind {
		return nil, false, fmt.Errorf("the name is taken by a link of type %s that is not ours: remove or rename it", l.Type())
	}
	return &kernelDevice{kernel: k, name: name, index: l.Attrs().Index}, found, nil
}

// kernelDevice is one kernel WireGuard link.
type kernelDevice struct {
	*kernel
	name  string
	index int
}

// chunk is how many peers go into one message: wgctrl sends one per peer above 32.
const chunk = 32

func (d *kernelDevice) configure(cfg wgtypes.Config) error {
	rest := cfg.Peers
	cfg.Peers = rest[:min(chunk, len(rest))]
	for {
		if err := d.wg.ConfigureDevice(d.name, cfg); err != nil {
			return fmt.Errorf("configure: %w", err)
		}
		rest = rest[len(cfg.Peers):]
		if len(rest) == 0 {
			return nil
		}
		cfg = wgtypes.Config{Peers: rest[:min(chunk, len(rest))]}
	}
}

func (d *kernelDevice) read() (*wgtypes.Device, error) { return d.wg.Device(d.name) }

func (d *kernelDevice) listen() error { return nil }

func (d *kernelDevice) alive() (bool, error) {
	l, err := d.links.byName(d.name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return l.Attrs().Index == d.index && l.Type() == wireGuardKind, nil
}

func (d *kernelDevice) up() (bool, error) {
	l, err := d.links.byName(d.name)
	if err != nil {
		return false, err
	}
	return l.Attrs().Flags&net.FlagUp != 0, nil
}

// initiate makes the kernel send a keepalive, which without a session is a handshake, by
// turning keepalives on. The kernel sends a peer at most one handshake in 5 s; a peer
// that is made anew has not been sent one yet, and without a session nothing is lost.
func (d *kernelDevice) initiate(p wgtypes.PeerConfig, met, retry bool) error {
	set := func(interval time.Duration) wgtypes.PeerConfig {
		return wgtypes.PeerConfig{PublicKey: p.PublicKey, UpdateOnly: true, PersistentKeepaliveInterval: &interval}
	}
	interval := *p.PersistentKeepaliveInterval
	steps := []wgtypes.PeerConfig{set(0)}
	if retry && !met {
		p.PersistentKeepaliveInterval = nil
		steps = []wgtypes.PeerConfig{{PublicKey: p.PublicKey, Remove: true}, p}
	}
	if interval > 0 {
		steps = append(steps, set(interval))
	} else {
		steps = append(steps, set(time.Minute), set(0))
	}
	return d.wg.ConfigureDevice(d.name, wgtypes.Config{Peers: steps})
}

func (d *kernelDevice) admitBy(roster) bool { return false }

func (d *kernelDevice) close() error { return d.links.remove(d.name) }
