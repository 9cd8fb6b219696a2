package wireguard

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// look gives the desired peers that may differ from what was applied, and the keys of those
// applied that may go. Usually that is a handful of ten thousand: those that differ from what
// was asked for before, when none of them has to do with another one.
func (a *applied) look(d netstate.WireGuard) (w wanted, had iter.Seq[wgtypes.Key], err error) {
	if gone, come, ok := a.differing(d); ok {
		part := d
		part.Peers = come
		if w, err = desiredPeers(part); err == nil && !w.shared {
			return w, keysOf(gone), nil
		}
	}
	w, err = desiredPeers(d)
	return w, maps.Keys(a.peers), err
}

// differing lists the peers that differ from what was asked for before. Not ok: that is not
// known, or one of them has a key or a prefix that another one has.
func (a *applied) differing(d netstate.WireGuard) (gone, come []netstate.WireGuardPeer, ok bool) {
	if a.asked == nil || a.publicKey != wgtypes.Key(d.PublicKey) {
		return nil, nil, false
	}
	gone, come = a.asked, d.Peers
	for len(gone) > 0 && len(come) > 0 && samePeer(&gone[0], &come[0]) {
		gone, come = gone[1:], come[1:]
	}
	first := len(d.Peers) - len(come)
	for len(gone) > 0 && len(come) > 0 && samePeer(&gone[len(gone)-1], &come[len(come)-1]) {
		gone, come = gone[:len(gone)-1], come[:len(come)-1]
	}
	keys, prefixes := map[netstate.Key]bool{}, map[netip.Prefix]bool{}
	for _, p := range come {
		keys[p.PublicKey] = true
		for _, ip := range p.AllowedIPs {
			prefixes[ip.Masked()] = true
		}
	}
	for i := range d.Peers {
		if i >= first && i < first+len(come) {
			continue
		}
		p := &d.Peers[i]
		if keys[p.PublicKey] || slices.ContainsFunc(p.AllowedIPs, func(ip netip.Prefix) bool { return prefixes[ip.Masked()] }) {
			return nil, nil, false
		}
	}
	return gone, come, true
}

func samePeer(a, b *netstate.WireGuardPeer) bool {
	return a.PublicKey == b.PublicKey && a.Name == b.Name && a.Endpoint == b.Endpoint && a.Initiate == b.Initiate &&
		a.PersistentKeepaliveSeconds == b.PersistentKeepaliveSeconds && slices.Equal(a.AllowedIPs, b.AllowedIPs) && a.PresharedKey.Equal(b.PresharedKey)
}

func keysOf(list []netstate.WireGuardPeer) iter.Seq[wgtypes.Key] {
	return func(yield func(wgtypes.Key) bool) {
		for i := range list {
			if !yield(wgtypes.Key(list[i].PublicKey)) {
				return
			}
		}
	}
}
