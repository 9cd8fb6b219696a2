package wireguard

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Pace of handshakes that we begin. Their answers must not fill the queue behind which
// WireGuard thinks itself under load (128 on both datapaths) and lets only 20 handshakes
// per second and source address pass.
const (
	initiateTick = 50 * time.Millisecond
	initiateMax  = 50 // per tick
)

// retryAfter is the pause after the nth unanswered handshake. A handshake replaces the one
// before, so that an answer which takes longer than the pause comes too late: some
// pauses are longer.
func retryAfter(n int, eager bool) time.Duration {
	switch {
	case eager && n < 10:
		return 250 * time.Millisecond
	case n%10 == 0:
		return 3 * time.Second
	case n < 60:
		return time.Second
	case n < 180:
		return 5 * time.Second
	}
	return time.Minute
}

// greeting says how a handshake is wanted.
type greeting struct {
	after time.Time // an answer younger than this ends it
	eager bool      // a key changed: traffic is waiting
}

// handshake is one that is wanted.
type handshake struct {
	greeting
	due      time.Time
	attempts int
	last     time.Time      // the last attempt; zero: none
	home     netip.AddrPort // where the peer was when this began
}

// searchMax is how many attempts look for the peer among those who call (see callers).
const searchMax = 60

// initiator sends handshakes for one device until they are answered.
type initiator struct {
	m       *managed
	log     *slog.Logger
	pending map[wgtypes.Key]*handshake // guarded by m.mu
	callers callers                    // guarded by m.mu
	wake    chan struct{}
	quit    chan struct{}
	done    chan struct{}
}

func newInitiator(m *managed, ns *namespace, log *slog.Logger) *initiator {
	i := &initiator{
		m: m, log: log, pending: map[wgtypes.Key]*handshake{}, callers: callers{ns: ns},
		wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
	}
	go i.run()
	return i
}

func (i *initiator) stop() {
	close(i.quit)
	<-i.done
}

// start wants handshakes with peers. The caller holds m.mu.
func (i *initiator) start(peers map[wgtypes.Key]greeting) {
	now := time.Now()
	for k, g := range peers {
		i.pending[k] = &handshake{greeting: g, due: now}
	}
	if len(peers) > 0 {
		select {
		case i.wake <- struct{}{}:
		default:
		}
	}
}

// forget drops peers that are gone. The caller holds m.mu.
func (i *initiator) forget(keys []wgtypes.Key) {
	for _, k := range keys {
		delete(i.pending, k)
	}
}

func (i *initiator) run() {
	defer close(i.done)
	for {
		pause := initiateTick
		i.m.mu.Lock()
		if len(i.pending) == 0 {
			pause = 0
		} else if up, err := i.m.up(); err == nil && up {
			pause = i.tick()
		}
		i.m.mu.Unlock()
		var timer <-chan time.Time
		if pause > 0 {
			timer = time.After(pause)
		}
		select {
		case <-i.quit:
			return
		case <-i.wake:
		case <-timer:
		}
	}
}

// due is a handshake whose time has come.
type due struct {
	*handshake
	peer     wgtypes.Key
	endpoint *net.UDPAddr
	met      bool // there was a session before
	turned   bool // the endpoint is not the device's
}

// tick sends what is due and tells when to come again.
func (i *initiator) tick() time.Duration {
	began := time.Now()
	d, err := i.m.read()
	if err != nil {
		i.log.Debug("read WireGuard device", "link", i.m.name, "error", err)
		return time.Second
	}
	cost := time.Since(began)
	var list []due
	for n := range d.Peers {
		p := &d.Peers[n]
		h := i.pending[p.PublicKey]
		switch {
		case h == nil:
		case p.LastHandshakeTime.After(h.after), p.Endpoint == nil: // answered, or it must call
			delete(i.pending, p.PublicKey)
		default:
			// A session from before a change of keys is of no more use.
			list = append(list, due{handshake: h, peer: p.PublicKey, endpoint: p.Endpoint, met: !p.LastHandshakeTime.IsZero() && !h.eager})
		}
	}
	for k, h := range i.pending {
		if p := i.m.applied.peers[k]; p.waits && p.endpoint.IsValid() {
			list = append(list, due{handshake: h, peer: k, endpoint: net.UDPAddrFromAddrPort(p.endpoint)})
		}
	}
	slices.SortFunc(list, func(a, b due) int { return a.due.Compare(b.due) })
	i.search(d, list)
	next := began.Add(time.Minute)
	for n, x := range list {
		if n < initiateMax && !x.due.After(began) {
			i.send(x)
		}
		if x.due.Before(next) {
			next = x.due
		}
	}
	// Reading 10,000 peers takes a while: spend a fifth of the time on it at most.
	return max(initiateTick, 4*cost, time.Until(next))
}

// search turns those whose first handshake was not answered, in turn, to where packets come
// from and to where they were.
func (i *initiator) search(d *wgtypes.Device, list []due) {
	began := time.Now()
	var taken map[netip.AddrPort]bool
	for n := range min(len(list), initiateMax) {
		x := &list[n]
		now, at := netip.AddrPortFrom(x.endpoint.AddrPort().Addr().Unmap(), x.endpoint.AddrPort().Port()), x.home
		if x.attempts == 0 {
			x.home = now
		}
		if x.attempts == 0 || x.attempts > searchMax || x.met || x.due.After(began) {
			continue
		}
		if taken == nil {
			i.callers.look(uint16(d.ListenPort))
			taken = i.taken(d)
		}
		if found := i.callers.from(x.home, taken); len(found) > 0 {
			at = turn(found, x.home, x.attempts)
		}
		if at != now {
			x.endpoint, x.turned = net.UDPAddrFromAddrPort(at), true
		}
	}
}

// taken are the endpoints of peers with a session, and where the others were: what comes from
// there is most likely theirs.
func (i *initiator) taken(d *wgtypes.Device) map[netip.AddrPort]bool {
	taken := map[netip.AddrPort]bool{}
	for n := range d.Peers {
		p := &d.Peers[n]
		if h := i.pending[p.PublicKey]; h != nil && h.home.IsValid() {
			taken[h.home] = true
		} else if p.Endpoint != nil {
			at := p.Endpoint.AddrPort()
			taken[netip.AddrPortFrom(at.Addr().Unmap(), at.Port())] = true
		}
	}
	return taken
}

// turn is where the nth attempt goes, 1 and up: one after the other of those found, and home
// in between.
func turn(found []netip.AddrPort, home netip.AddrPort, n int) netip.AddrPort {
	if n%2 == 0 {
		return home
	}
	return found[n/2%len(found)]
}

func (i *initiator) send(x due) {
	cfg, ok := i.m.applied.config(x.peer)
	if ok {
		ok = i.m.make(x.peer)
	}
	if !ok {
		delete(i.pending, x.peer)
		return
	}
	cfg.Endpoint = x.endpoint
	if x.turned {
		move := wgtypes.PeerConfig{PublicKey: x.peer, UpdateOnly: true, Endpoint: x.endpoint}
		if err := i.m.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{move}}); err != nil {
			i.log.Debug("turn a WireGuard handshake elsewhere", "link", i.m.name, "peer", x.peer.String(), "error", err)
		}
	}
	now := time.Now()
	retry := !x.last.IsZero() && now.Sub(x.last) < rekeyTimeout
	if err := i.m.initiate(cfg, x.met, retry); err != nil {
		i.log.Debug("send a WireGuard handshake", "link", i.m.name, "peer", x.peer.String(), "error", err)
	}
	x.attempts++
	x.handshake.last, x.handshake.due = now, now.Add(retryAfter(x.attempts, x.eager))
}
