package wireguard

import (
	"net"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// In user space a peer costs 19 KiB of queues and two goroutines, and yet it has nothing to
// do until it calls, unless we know where to reach it. So such a peer waits: it stands in
// applied only, and the device is told of it when its first handshake comes in and proves
// that the sender holds the peer's key, or in its turn when it is greeted.
//
// A replay of an earlier initiation passes that proof too, after a restart, since then
// nobody remembers its time stamp: it costs the memory of a peer that is configured anyway
// and one answer that the sender cannot use, as in every WireGuard.

// makeAtOnce is how many peers that are to be greeted one Set tells the device of; more of
// them wait for their turn.
const makeAtOnce = 500

// roster knows the peers that a device was not told of yet.
type roster interface {
	// waits does not block; it may be wrong for a moment.
	waits(k wgtypes.Key) bool
	// admit tells the device of a peer if it still waits.
	admit(k wgtypes.Key)
}

// hold marks the desired peers that wait. Who is on the device stays there.
func (a *applied) hold(want map[wgtypes.Key]peer, order []wgtypes.Key, replaced map[wgtypes.Key]wgtypes.Key) {
	greeted := 0
	for _, k := range order {
		p := want[k]
		old, known := a.peers[k]
		_, successor := replaced[k]
		switch {
		case known && !old.waits, successor:
			continue
		case !p.endpoint.IsValid():
			p.waits = true
		case p.initiate && known && p.endpoint == old.endpoint:
			p.waits = true // its turn comes
		case p.initiate:
			greeted++
			p.waits = greeted > makeAtOnce
		}
		want[k] = p
	}
}

// noteWaiting updates the hint after a change was recorded.
func (m *managed) noteWaiting(c *change) {
	for _, k := range c.gone {
		m.waiting.Delete(k)
	}
	for k, p := range c.peers {
		if p.waits {
			m.waiting.Store(k, nil)
		} else {
			m.waiting.Delete(k)
		}
	}
}

func (m *managed) waits(k wgtypes.Key) bool {
	_, ok := m.waiting.Load(k)
	return ok
}

func (m *managed) admit(k wgtypes.Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.make(k)
}

// make tells the device of a peer that waits, with what is desired of it now. It reports
// whether the device has the peer. The caller holds m.mu.
func (m *managed) make(k wgtypes.Key) bool {
	p, ok := m.applied.peers[k]
	if !ok || m.applied.unknown {
		return false
	}
	if !p.waits {
		return true
	}
	cfg, _ := m.applied.config(k)
	if p.endpoint.IsValid() {
		cfg.Endpoint = net.UDPAddrFromAddrPort(p.endpoint)
	}
	if err := m.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{cfg}}); err != nil {
		m.applied.unknown = true
		return false
	}
	p.waits = false
	m.applied.peers[k] = p
	m.waiting.Delete(k)
	return true
}
