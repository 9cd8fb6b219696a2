package nft

import (
	"fmt"
	"slices"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Priorities of the chains of pins: after translation, which uses the connection's mark for
// itself, and before anything is rejected, since the refusal takes the same way back.
const (
	priorityPins    = -94
	priorityPinsOut = -150 // mangle: of what the host sends itself
	priorityPinned  = 10
)

// pins keep connections on their paths. The opener's packets say which one that is, also
// when they change over; what goes back the other way is led there by its mark.
func (r *firewallSets) pins(pins []netstate.Pin) {
	if len(pins) == 0 {
		return
	}
	var set, follow, leave []string
	for _, p := range pins {
		l := r.link(p.Link)
		mark := fmt.Sprintf("ct mark set ct mark & %#x | %#x", ^uint32(netstate.MarkMask), p.Mark)
		set = append(set, fmt.Sprintf("iifname %s ct direction original %s", l, mark))
		leave = append(leave, fmt.Sprintf("oifname %s ct direction original %s", l, mark))
		follow = append(follow, fmt.Sprintf("meta mark & %#x == 0 ct mark & %#x == %#x meta mark set meta mark & %#x | %#x",
			netstate.MarkMask, netstate.MarkMask, p.Mark, ^uint32(netstate.MarkMask), p.Mark))
	}
	r.part.base("pins_in", "filter", "prerouting", priorityPins, slices.Concat(set, []string{"iifname @fw_links accept"}, follow)...)
	r.part.base("pins_out", "route", "output", priorityPinsOut, follow...)
	r.part.base("pins_leave", "filter", "postrouting", priorityPinned, leave...)
}
