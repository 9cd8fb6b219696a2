package wireguard

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// sessionLifetime is how long a session serves without a new handshake
// (Reject-After-Time).
const sessionLifetime = 180 * time.Second

// rekeyTimeout is the protocol's pause between two handshakes (Rekey-Timeout).
const rekeyTimeout = 5 * time.Second

// applied is the configuration that a device was given last.
type applied struct {
	privateKey secret.Bytes
	publicKey  wgtypes.Key
	port       uint16
	mark       uint32
	peers      map[wgtypes.Key]peer
	// asked is what peers is of, if nobody else has changed them since and no two of them claim
	// the same: only what differs from it is looked at (asked.go).
	asked []netstate.WireGuardPeer
	// lazy: the device is told of a peer that cannot be reached when that peer calls.
	lazy bool
	// unknown: the last attempt failed half way, read the device before the next one.
	unknown bool
}

// peer is what one peer was given last.
type peer struct {
	name     string
	psk      secret.Bytes
	endpoint netip.AddrPort // as desired then, not where the peer is now
	// adopted: found on the device with an endpoint, which wins over a desired one.
	adopted bool
	// waits: the device was not told of it yet (lazy.go).
	waits     bool
	initiate  bool
	keepalive uint16 // seconds
	allowed   []netip.Prefix
}

// change leads a device from what was applied to what is desired.
type change struct {
	config     wgtypes.Config
	count      int  // settings and peers that differ
	privateKey bool // the device's identity changes
	device     applied
	peers      map[wgtypes.Key]peer // to record
	gone       []wgtypes.Key
	// replaced maps a new peer to the one of the same name that goes: its key changed.
	replaced map[wgtypes.Key]wgtypes.Key
	// hello says which peers to send handshakes to until they answer.
	hello map[wgtypes.Key]greeting
}

// diff works out the least that must be told to the device. Peers that cannot be
// configured are left out and named in the error.
func (a *applied) diff(d netstate.WireGuard, now time.Time) (*change, error) {
	c := &change{
		peers: map[wgtypes.Key]peer{}, hello: map[wgtypes.Key]greeting{},
		replaced: map[wgtypes.Key]wgtypes.Key{},
		device: applied{
			privateKey: d.PrivateKey, publicKey: wgtypes.Key(d.PublicKey), port: d.ListenPort, mark: d.FirewallMark,
			lazy: a.lazy,
		},
	}
	if err := c.deviceSettings(a, d); err != nil {
		return nil, err
	}
	w, had, err := a.look(d)
	if err == nil && !w.shared {
		c.device.asked = slices.Clone(d.Peers)
	}
	c.leave(a, w, had)
	if a.lazy {
		a.hold(w.peers, w.order, c.replaced)
	}
	claimed := a.claims(w.peers)
	for _, k := range w.order {
		old, known := a.peers[k]
		c.setPeer(k, old, known, w.peers[k], claimed, now)
	}
	for _, k := range c.gone {
		if !a.peers[k].waits {
			c.config.Peers = append(c.config.Peers, wgtypes.PeerConfig{PublicKey: k, Remove: true, UpdateOnly: true})
		}
		c.count++
	}
	return c, err
}

// leave lists those of had that go, and which ones come in their place. Who waited had no
// session that another could take over.
func (c *change) leave(a *applied, w wanted, had iter.Seq[wgtypes.Key]) {
	gone := map[string]wgtypes.Key{} // by name
	for k := range had {
		if _, ok := w.peers[k]; !ok {
			c.gone = append(c.gone, k)
			if p := a.peers[k]; !p.waits {
				gone[p.name] = k
			}
		}
	}
	slices.SortFunc(c.gone, func(a, b wgtypes.Key) int { return slices.Compare(a[:], b[:]) })
	for _, k := range w.order {
		name := w.peers[k].name
		prev, ok := gone[name]
		if _, known := a.peers[k]; ok && !known && name != "" {
			c.replaced[k] = prev
		}
	}
}

func (c *change) deviceSettings(a *applied, d netstate.WireGuard) error {
	if !a.privateKey.Equal(d.PrivateKey) {
		b := d.PrivateKey.Reveal()
		if len(b) != wgtypes.KeyLen {
			return errors.New("the private key must have 32 bytes")
		}
		k := wgtypes.Key(b)
		if k.PublicKey() != wgtypes.Key(d.PublicKey) {
			return fmt.Errorf("public key %s is not that of the private key", d.PublicKey)
		}
		c.config.PrivateKey, c.privateKey = &k, true
		c.count++
	}
	if a.port != d.ListenPort {
		p := int(d.ListenPort)
		c.config.ListenPort = &p
		c.count++
	}
	if a.mark != d.FirewallMark {
		m := int(d.FirewallMark)
		c.config.FirewallMark = &m
		c.count++
	}
	return nil
}

// wanted are desired peers by key.
type wanted struct {
	peers  map[wgtypes.Key]peer
	order  []wgtypes.Key
	shared bool // several claim one prefix: it belongs to the last one, as in WireGuard itself
}

// desiredPeers indexes the peers by key.
func desiredPeers(d netstate.WireGuard) (w wanted, err error) {
	w.peers = make(map[wgtypes.Key]peer, len(d.Peers))
	owner := make(map[netip.Prefix]wgtypes.Key, len(d.Peers))
	var errs []error
	for _, p := range d.Peers {
		k := wgtypes.Key(p.PublicKey)
		if other, ok := w.peers[k]; ok {
			errs = append(errs, fmt.Errorf("peer %q is left out: %q has the same public key %s", p.Name, other.name, p.PublicKey))
			continue
		}
		if p.PublicKey.IsZero() || p.PublicKey == d.PublicKey {
			errs = append(errs, fmt.Errorf("peer %q is left out: its public key is %s", p.Name, map[bool]string{true: "zero", false: "our own"}[p.PublicKey.IsZero()]))
			continue
		}
		if n := len(p.PresharedKey.Reveal()); n != 0 && n != wgtypes.KeyLen {
			errs = append(errs, fmt.Errorf("peer %q is left out: the pre-shared key must have 32 bytes, has %d", p.Name, n))
			continue
		}
		x := peer{
			name: p.Name, psk: p.PresharedKey, endpoint: p.Endpoint, initiate: p.Initiate,
			keepalive: p.PersistentKeepaliveSeconds, allowed: tidy(p.AllowedIPs),
		}
		for _, ip := range x.allowed {
			other, taken := owner[ip]
			w.shared = w.shared || taken && other != k
			owner[ip] = k
		}
		w.peers[k] = x
		w.order = append(w.order, k)
	}
	if w.shared {
		for k, p := range w.peers {
			p.allowed = slices.DeleteFunc(slices.Clone(p.allowed), func(ip netip.Prefix) bool { return owner[ip] != k })
			w.peers[k] = p
		}
	}
	return w, errors.Join(errs...)
}

// tidy is the list masked, sorted and without doubles; most are already.
func tidy(list []netip.Prefix) []netip.Prefix {
	ok := true
	for i, ip := range list {
		ok = ok && ip == ip.Masked() && (i == 0 || netstate.ComparePrefixes(list[i-1], ip) < 0)
	}
	if ok {
		return list
	}
	out := make([]netip.Prefix, len(list))
	for i, ip := range list {
		out[i] = ip.Masked()
	}
	slices.SortFunc(out, netstate.ComparePrefixes)
	return slices.Compact(out)
}

// claims lists the prefixes that a peer on the device gets anew: whoever had one loses it
// without being told. To a peer that waits nothing is given, so whoever had it is told.
func (a *applied) claims(want map[wgtypes.Key]peer) map[netip.Prefix]bool {
	claimed := map[netip.Prefix]bool{}
	for k, p := range want {
		if p.waits {
			continue
		}
		if had := a.told(k).allowed; !slices.Equal(had, p.allowed) {
			for _, ip := range missing(p.allowed, had) {
				claimed[ip] = true
			}
		}
	}
	return claimed
}

// told is what the device has of a peer: nothing as long as it waits.
func (a *applied) told(k wgtypes.Key) peer {
	if p := a.peers[k]; !p.waits {
		return p
	}
	return peer{}
}

// missing lists what of a is not in b.
func missing(a, b []netip.Prefix) []netip.Prefix {
	in := make(map[netip.Prefix]bool, len(b))
	for _, p := range b {
		in[p] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(p netip.Prefix) bool { return in[p] })
}

// setPeer adds what differs from what the device has of the peer, and counts what differs
// from what was desired before.
func (c *change) setPeer(k wgtypes.Key, old peer, known bool, p peer, claimed map[netip.Prefix]bool, now time.Time) {
	has, told := old, known && !old.waits
	if !told {
		has = peer{}
	}
	pc := wgtypes.PeerConfig{PublicKey: k, UpdateOnly: told}
	tell := !told
	if !has.psk.Equal(p.psk) {
		pc.PresharedKey = &wgtypes.Key{}
		if b := p.psk.Reveal(); b != nil {
			pc.PresharedKey = (*wgtypes.Key)(b)
		}
		tell = true
	}
	if has.keepalive != p.keepalive {
		d := time.Duration(p.keepalive) * time.Second
		pc.PersistentKeepaliveInterval = &d
		tell = true
	}
	if has.movesTo(p.endpoint) {
		pc.Endpoint = net.UDPAddrFromAddrPort(p.endpoint)
		tell = true
	}
	if !slices.Equal(has.allowed, p.allowed) {
		add, lost := missing(p.allowed, has.allowed), missing(has.allowed, p.allowed)
		lost = slices.DeleteFunc(lost, func(ip netip.Prefix) bool { return claimed[ip] })
		if len(lost) > 0 {
			pc.ReplaceAllowedIPs, add = true, p.allowed
		}
		pc.AllowedIPs = ipNets(add)
		tell = tell || pc.ReplaceAllowedIPs || len(add) > 0
	}
	if tell && !p.waits {
		c.config.Peers = append(c.config.Peers, pc)
	}
	moved := old.movesTo(p.endpoint)
	differs := !known || moved || !old.alike(p)
	if differs {
		c.count++
	}
	_, renamed := c.replaced[k]
	switch {
	case renamed:
		c.hello[k] = greeting{after: now, eager: true}
	case p.initiate && (!known || !old.initiate || moved):
		c.hello[k] = greeting{after: now.Add(-sessionLifetime)}
	}
	if differs || old.adopted || !old.noted(p) {
		c.peers[k] = p
	}
}

// alike compares what WireGuard knows of a peer, its endpoint aside.
func (p *peer) alike(q peer) bool {
	return p.psk.Equal(q.psk) && p.keepalive == q.keepalive && slices.Equal(p.allowed, q.allowed)
}

// noted compares what is only recorded.
func (p *peer) noted(q peer) bool {
	return p.waits == q.waits && p.name == q.name && p.endpoint == q.endpoint && p.initiate == q.initiate
}

// movesTo tells whether a desired endpoint is to be set.
func (p *peer) movesTo(endpoint netip.AddrPort) bool {
	return endpoint.IsValid() && endpoint != p.endpoint && !p.adopted
}

// empty: there is nothing to tell or to record.
func (c *change) empty() bool {
	return c.count == 0 && len(c.peers) == 0
}

// record notes a change that the device took.
func (a *applied) record(c *change) {
	peers := a.peers
	for _, k := range c.gone {
		delete(peers, k)
	}
	for k, p := range c.peers {
		peers[k] = p
	}
	*a = c.device
	a.peers = peers
}

// config is the whole configuration of a recorded peer.
func (a *applied) config(k wgtypes.Key) (wgtypes.PeerConfig, bool) {
	p, ok := a.peers[k]
	if !ok {
		return wgtypes.PeerConfig{}, false
	}
	keepalive := time.Duration(p.keepalive) * time.Second
	pc := wgtypes.PeerConfig{
		PublicKey: k, PersistentKeepaliveInterval: &keepalive,
		ReplaceAllowedIPs: true, AllowedIPs: ipNets(p.allowed),
	}
	if b := p.psk.Reveal(); b != nil {
		pc.PresharedKey = (*wgtypes.Key)(b)
	}
	return pc, true
}

// appliedFrom takes what a device holds as applied. What a device does not know (names,
// desired endpoints, whether to initiate) is kept from before.
func appliedFrom(d *wgtypes.Device, before applied) applied {
	a := applied{
		publicKey: d.PublicKey, port: uint16(d.ListenPort), mark: uint32(d.FirewallMark),
		peers: make(map[wgtypes.Key]peer, len(d.Peers)), lazy: before.lazy,
	}
	for k, p := range before.peers {
		if p.waits {
			a.peers[k] = p
		}
	}
	if d.PrivateKey != (wgtypes.Key{}) {
		a.privateKey = secret.New(d.PrivateKey[:])
	}
	for i := range d.Peers {
		p := &d.Peers[i]
		old, known := before.peers[p.PublicKey]
		n := peer{
			name: old.name, endpoint: old.endpoint, initiate: old.initiate,
			adopted:   old.adopted || !known && p.Endpoint != nil,
			keepalive: uint16(p.PersistentKeepaliveInterval / time.Second),
			allowed:   prefixes(p.AllowedIPs),
		}
		if p.PresharedKey != (wgtypes.Key{}) {
			n.psk = secret.New(p.PresharedKey[:])
		}
		a.peers[p.PublicKey] = n
	}
	return a
}

// ipNets converts prefixes to what wgctrl takes.
func ipNets(in []netip.Prefix) []net.IPNet {
	out := make([]net.IPNet, len(in))
	for i, p := range in {
		out[i] = net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	}
	return out
}

// prefixes converts from what wgctrl gives, sorted.
func prefixes(in []net.IPNet) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(in))
	for _, n := range in {
		if a, ok := netip.AddrFromSlice(n.IP); ok {
			bits, _ := n.Mask.Size()
			if len(n.Mask) == net.IPv4len {
				a = a.Unmap()
			}
			out = append(out, netip.PrefixFrom(a, bits))
		}
	}
	slices.SortFunc(out, netstate.ComparePrefixes)
	return out
}

func addrPort(a *net.UDPAddr) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
