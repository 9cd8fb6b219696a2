package plan

import (
	"net/netip"
	"slices"

	"github.com/culvert-vpn/culvert/internal/ipam"
	"github.com/culvert-vpn/culvert/internal/model"
)

// Addresses gives every device of the gateway its addresses, one per family of the
// gateway's ranges: what it holds already (by "namespace/name"), else its wish, else the
// first free one. Whoever holds an address keeps it. A device that cannot have one is
// named in the problems. Changed tells whether the result differs from held.
func Addresses(gw *model.Gateway, held map[string][]netip.Addr) (given map[model.ID][]netip.Addr, changed bool, problems []model.Problem) {
	requests := make([]ipam.Request, len(gw.Devices))
	for i, d := range gw.Devices {
		requests[i] = ipam.Request{Wishes: d.Addresses, Held: held[d.ID.String()]}
	}
	given = make(map[model.ID][]netip.Addr, len(gw.Devices))
	for i, answer := range ipam.Assign(gw.DeviceRanges, requests) {
		d := gw.Devices[i]
		if len(answer.Addresses) > 0 {
			given[d.ID] = answer.Addresses
		}
		if answer.Err != nil {
			problems = append(problems, model.Problem{
				Kind: "Device", Object: d.ID, Field: "spec.addresses", Reason: "NoAddress",
				Message: answer.Err.Error() + ": enlarge the gateway's spec.deviceCIDRs, remove a device, or wish for another address",
			})
		}
		changed = changed || !slices.Equal(requests[i].Held, answer.Addresses)
	}
	return given, changed || len(held) != len(given), problems
}

// AddressBook is the result of Addresses in the form that is kept.
func AddressBook(given map[model.ID][]netip.Addr) map[string][]netip.Addr {
	book := make(map[string][]netip.Addr, len(given))
	for id, addrs := range given {
		book[id.String()] = addrs
	}
	return book
}
