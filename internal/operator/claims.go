package operator

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/ipam"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// recentClaim was made and may not be in the cache yet.
type recentClaim struct {
	claim workload.Claim
	at    time.Time
}

// holderOf is the device as a claim names it.
func holderOf(d *v1alpha1.Device) workload.Holder { return workload.Holder{ID: idOf(d), UID: d.UID} }

// orphanedClaims releases the addresses of devices that are gone for good. The API server
// is asked about each: a device that the cache has not seen yet may be another operator's.
func (r *round) orphanedClaims(ctx context.Context) error {
	var orphans []string
	for name, c := range r.seen.claims {
		d, ok := r.seen.devices[c.Holder.ID]
		if c.lease != nil && (!ok || d.UID != c.Holder.UID) {
			orphans = append(orphans, name)
		}
	}
	slices.Sort(orphans)
	var mu sync.Mutex
	claimOf := func(name string) heldClaim {
		mu.Lock()
		defer mu.Unlock()
		return r.seen.claims[name]
	}
	return each(ctx, orphans, func(ctx context.Context, name string) error {
		c := claimOf(name)
		var d v1alpha1.Device
		err := r.Live.Get(ctx, types.NamespacedName{Namespace: c.Holder.Namespace, Name: c.Holder.Name}, &d)
		if err == nil && d.UID == c.Holder.UID {
			return nil
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("look for the holder of address %s: %w", c.Address, err)
		}
		if err := r.remove(ctx, leaseKind, c.lease.ObjectMeta); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		delete(r.seen.claims, name)
		return nil
	})
}

// claims gives every accepted device its addresses. Who holds one keeps it.
func (r *round) claims(ctx context.Context) error {
	var wanted []workload.Claim
	for _, id := range sortedIDs(r.gateways) {
		wanted = append(wanted, r.assign(r.gateways[id])...)
	}
	return each(ctx, wanted, r.claim)
}

// assign decides the addresses of one gateway's devices, and returns the claims that are
// missing.
func (r *round) assign(g *gatewayState) []workload.Claim {
	held := map[types.UID][]netip.Addr{}
	taken := map[netip.Addr]bool{}
	for _, c := range r.seen.claims {
		if c.Gateway == g.ID {
			held[c.Holder.UID] = append(held[c.Holder.UID], c.Address)
			taken[c.Address] = true
		}
	}
	var requests []ipam.Request
	var devices []*deviceState
	known := map[types.UID]bool{}
	for _, d := range g.Devices {
		state, ok := r.devices[d.ID]
		if !ok {
			continue
		}
		known[state.uid] = true
		devices = append(devices, state)
		requests = append(requests, ipam.Request{Wishes: d.Addresses, Held: r.heldBy(state, held[state.uid], taken)})
	}
	// What devices hold that are not in effect stays theirs.
	for uid, addrs := range held {
		if !known[uid] {
			for _, a := range addrs {
				requests = append(requests, ipam.Request{Wishes: []netip.Addr{a}, Held: []netip.Addr{a}})
			}
		}
	}
	var missing []workload.Claim
	for i, answer := range ipam.Assign(g.DeviceRanges, requests) {
		if i >= len(devices) {
			break
		}
		d := devices[i]
		for _, a := range answer.Addresses {
			d.addresses = append(d.addresses, a.String())
			if !slices.Contains(held[d.uid], a) {
				missing = append(missing, workload.Claim{Gateway: g.ID, Address: a, Holder: workload.Holder{ID: d.ID, UID: d.uid}})
			}
		}
		if answer.Err != nil {
			d.refused = &model.Problem{
				Kind: model.KindDevice, Object: d.ID, Field: "spec.addresses", Reason: reasonNoAddress,
				Message: oneLine(answer.Err) + ": enlarge the gateway's spec.deviceCIDRs, remove a device, or ask for another address",
			}
		}
	}
	return missing
}

// heldBy is what a device has, the address that its status shows first; one that nobody
// claims any more is the device's own still.
func (r *round) heldBy(d *deviceState, claimed []netip.Addr, taken map[netip.Addr]bool) []netip.Addr {
	slices.SortFunc(claimed, netip.Addr.Compare)
	var out []netip.Addr
	for _, text := range r.seen.devices[d.ID].Status.Addresses {
		a, err := netip.ParseAddr(text)
		if err == nil && (slices.Contains(claimed, a) || !taken[a]) {
			out = append(out, a)
		}
	}
	for _, a := range claimed {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// claim makes an address a device's. A claim that somebody else has made meanwhile is left
// alone: the next round sees it and takes another address.
func (r *round) claim(ctx context.Context, c workload.Claim) error {
	d := r.devices[c.Holder.ID]
	lease := c.Lease(d.gateway.uid)
	err := r.Writer.Create(ctx, lease, client.FieldOwner(Manager))
	if apierrors.IsAlreadyExists(err) {
		err = r.heldAlready(ctx, c)
	}
	if err != nil {
		claimLock.Lock()
		defer claimLock.Unlock()
		d.undecided = true
		return fmt.Errorf("claim %s for device %s: %w", c.Address, c.Holder.ID, err)
	}
	claimLock.Lock()
	defer claimLock.Unlock()
	r.claimed[idOf(lease).String()] = recentClaim{c, r.Now()}
	return nil
}

var claimLock sync.Mutex

// heldAlready is nil when the claim that exists is the same device's.
func (r *round) heldAlready(ctx context.Context, c workload.Claim) error {
	var lease coordinationv1.Lease
	key := types.NamespacedName{Namespace: c.Gateway.Namespace, Name: workload.ClaimName(c.Gateway.Name, c.Address)}
	if err := r.Live.Get(ctx, key, &lease); err != nil {
		return err
	}
	if have, ok := workload.ParseClaim(&lease); ok && have.Holder == c.Holder {
		return nil
	}
	return fmt.Errorf("the address is taken by %s", lease.Annotations[workload.AnnotationDevice])
}

// releasedClaims gives back what a device held beside the addresses that it has now, once
// its status, which gateways follow, says so.
func (r *round) releasedClaims(ctx context.Context) error {
	var released []heldClaim
	for _, c := range r.seen.claims {
		d, ok := r.seen.devices[c.Holder.ID]
		state, accepted := r.devices[c.Holder.ID]
		if c.lease == nil || !ok || d.UID != c.Holder.UID || !accepted {
			continue
		}
		inUse := state.gateway.ID == c.Gateway && slices.Contains(state.addresses, c.Address.String())
		if !inUse && len(state.addresses) > 0 && slices.Equal(state.addresses, d.Status.Addresses) {
			released = append(released, c)
		}
	}
	return each(ctx, released, func(ctx context.Context, c heldClaim) error {
		var d v1alpha1.Device
		err := r.Live.Get(ctx, types.NamespacedName{Namespace: c.Holder.Namespace, Name: c.Holder.Name}, &d)
		if err != nil || !slices.Equal(d.Status.Addresses, r.devices[c.Holder.ID].addresses) {
			return client.IgnoreNotFound(err)
		}
		return r.remove(ctx, leaseKind, c.lease.ObjectMeta)
	})
}

// oneLine is an error as part of a message.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
