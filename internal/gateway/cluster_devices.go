package gateway

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipam"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// Devices implements backing: the operator allocates addresses and makes keys, and tells
// in each Device's status. What it says is checked as far as isolation depends on it: an
// address lies in the gateway's ranges, and belongs to the Device that came first.
func (c *cluster) Devices(gw *model.Gateway, facts *plan.Facts) ([]model.Problem, error) {
	facts.NodeName, facts.PodIPs = c.opts.Node, c.opts.PodIPs
	facts.Addresses = make(map[model.ID][]netip.Addr, len(gw.Devices))
	facts.DeviceKeys = map[model.ID]netstate.Key{}
	list := slices.Clone(gw.Devices)
	slices.SortStableFunc(list, func(a, b *model.Device) int {
		return c.created(a.ID).Compare(c.created(b.ID))
	})
	owners, keys := map[netip.Addr]model.ID{}, map[netstate.Key]model.ID{}
	for _, d := range list { // keys of specs come first: Parse has checked them
		if !d.PublicKey.IsZero() {
			keys[d.PublicKey] = d.ID
		}
	}
	var problems []model.Problem
	for _, d := range list {
		o := c.devices[d.ID]
		if o == nil { // a kept version of a Device that is gone: it cannot be
			continue
		}
		refuse := func(field, message string) {
			problems = append(problems, model.Problem{Kind: model.KindDevice, Object: d.ID, Field: field, Reason: model.ReasonDuplicate, Message: message})
		}
		for _, a := range usable(gw, o.Status.Addresses) {
			if owner, taken := owners[a]; taken {
				refuse("status.addresses", fmt.Sprintf("%s is that of Device %s already: the operator gives each address once; see whether two of them run", a, owner))
				continue
			}
			owners[a] = d.ID
			facts.Addresses[d.ID] = append(facts.Addresses[d.ID], a)
		}
		if !d.PublicKey.IsZero() || o.Status.PublicKey == "" {
			continue
		}
		key, err := netstate.ParseKey(o.Status.PublicKey)
		if owner, taken := keys[key]; err != nil || key.IsZero() || taken {
			if taken {
				refuse("status.publicKey", fmt.Sprintf("%s is the key of Device %s already: delete this Device and make it anew", key, owner))
			}
			continue
		}
		keys[key] = d.ID
		facts.DeviceKeys[d.ID] = key
	}
	return problems, nil
}

func (c *cluster) created(id model.ID) time.Time {
	if o := c.devices[id]; o != nil {
		return o.CreationTimestamp.Time
	}
	return time.Time{}
}

// usable are the addresses that a device of the gateway may have.
func usable(gw *model.Gateway, list []string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		a, err := netip.ParseAddr(s)
		if err != nil {
			continue
		}
		i := slices.IndexFunc(gw.DeviceRanges, func(r netip.Prefix) bool { return r.Contains(a) })
		if i >= 0 && ipam.Reserved(gw.DeviceRanges[i], a) == "" && !slices.ContainsFunc(out, func(b netip.Addr) bool { return a.Is4() == b.Is4() }) {
			out = append(out, a)
		}
	}
	return out
}
