package model

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

const defaultDeviceKeepalive = 25

func (p *parser) device(e entry) {
	o := e.Object.(*v1alpha1.Device)
	r := p.report(e)
	d := &Device{
		ID: e.ref.ID, Generation: o.Generation,
		Access:                     access(r, o.Spec.Access.To),
		PresharedKey:               p.wireGuardPresharedKey(r, "spec.presharedKeySecretRef", o.Spec.PresharedKeySecretRef),
		PersistentKeepaliveSeconds: defaultDeviceKeepalive,
		Suspended:                  o.Spec.Suspend,
	}
	if o.Spec.PublicKey != "" {
		d.PublicKey = wireGuardKey(r, "spec.publicKey", o.Spec.PublicKey)
	}
	if k := o.Spec.PersistentKeepaliveSeconds; k != nil {
		d.PersistentKeepaliveSeconds = uint16(bounded(r, "spec.persistentKeepaliveSeconds", *k, 0, 65535, "seconds (0: off)"))
	}
	if t := o.Spec.ExpirationTime; t != nil {
		d.Expires = t.Time
	}
	deviceAddresses(r, d, o.Spec.Addresses)
	a := p.attach(r, o.Spec.GatewayRef)
	if a == nil {
		return
	}
	if ns := e.ref.ID.Namespace; !allowsNamespace(a.spec.AllowedDevices.Namespaces, a.gateway.Namespace, ns) {
		r.refuse("spec.gatewayRef", ReasonNotAllowed, "VPNGateway %s does not allow devices of namespace %s: ask its owner for an entry in spec.allowedDevices.namespaces", a.gateway.ID, ns)
	}
	if len(a.gateway.DeviceRanges) == 0 {
		r.refuse("spec.gatewayRef", ReasonNotAllowed, "VPNGateway %s has no ranges for devices: ask its owner for spec.deviceCIDRs", a.gateway.ID)
	}
	a.checkKey(r, "spec.publicKey", d.PublicKey)
	a.checkWishes(r, d, o.Spec.Addresses)
	if !r.ok() {
		return
	}
	if !d.PublicKey.IsZero() {
		a.keys[d.PublicKey] = e.ref.String()
	}
	for _, w := range d.Addresses {
		a.addresses[w] = e.ref.String()
	}
	a.gateway.Devices = append(a.gateway.Devices, d)
}

func deviceAddresses(r *report, d *Device, wishes []v1alpha1.IP) {
	atMost(r, "spec.addresses", len(wishes), 2)
	for i, w := range wishes {
		field := "spec.addresses[" + strconv.Itoa(i) + "]"
		addr, problem := parseAddr(string(w))
		if problem != "" {
			r.refuse(field, ReasonInvalidSpec, "%s", problem)
			continue
		}
		if j := slices.IndexFunc(d.Addresses, func(x netip.Addr) bool { return x.Is4() == addr.Is4() }); j >= 0 {
			r.refuse(field, ReasonInvalidSpec, "%s is of the same family as %s: ask for at most one IPv4 and one IPv6 address", addr, d.Addresses[j])
			continue
		}
		d.Addresses = append(d.Addresses, addr)
	}
	slices.SortFunc(d.Addresses, netip.Addr.Compare)
}

// checkWishes checks the addresses that a device asks for against its gateway and the
// devices before it.
func (a *attachments) checkWishes(r *report, d *Device, wishes []v1alpha1.IP) {
	ranges := a.gateway.DeviceRanges
	for i, s := range wishes {
		w, problem := parseAddr(string(s))
		if problem != "" || !slices.Contains(d.Addresses, w) {
			continue // said already
		}
		field := "spec.addresses[" + strconv.Itoa(i) + "]"
		if len(ranges) > 0 && !contained(netip.PrefixFrom(w, w.BitLen()), ranges) {
			r.refuse(field, ReasonInvalidSpec, "%s is in none of the ranges for devices of VPNGateway %s (%s): ask for one of those, or leave the field out", w, a.gateway.ID, joinPrefixes(ranges))
			continue
		}
		if why := reservedIn(ranges, w); why != "" {
			r.refuse(field, ReasonReservedRange, "%s is %s: ask for another one, or leave the field out", w, why)
			continue
		}
		if owner, ok := a.addresses[w]; ok {
			r.refuse(field, ReasonOverlap, "%s is what %s asked for, which came first and keeps it: ask for another one, or leave the field out", w, owner)
		}
	}
}
