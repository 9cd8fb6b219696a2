package route

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// addVXLAN makes a VXLAN link without far ends (ip-link(8), type vxlan). It is bound to no
// address and no other link: the routes decide where encapsulated packets leave, and with
// which source address. It has no address of its own, not even a link-local one: a link with an
// address and routes is one of the node's uplinks for Cilium, which then deletes permanent
// neighbours there whenever its agent restarts.
func (r *Route) addVXLAN(w netstate.Link) (netlink.Link, error) {
	if w.VXLAN == nil {
		return nil, fmt.Errorf("link %s: a VXLAN link needs its network identifier and far ends", w.Name)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = w.Name
	attrs.MTU = w.MTU
	attrs.HardwareAddr = w.VXLAN.MAC[:]
	l := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: int(w.VXLAN.ID), Port: int(w.VXLAN.Port), UDPCSum: true}
	if w.VXLAN.Family == netstate.IPv6 {
		l.Group = net.IPv6unspecified // no group: only says which family the socket is of
	}
	if err := r.h.LinkAdd(l); err != nil {
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			err = fmt.Errorf("%w: this kernel has no VXLAN (CONFIG_VXLAN)", err)
		case errors.Is(err, unix.EEXIST):
			err = fmt.Errorf("%w: another link has network identifier %d at UDP port %d", err, w.VXLAN.ID, w.VXLAN.Port)
		}
		return nil, linkError(w.Name, "add", err)
	}
	made, err := r.h.LinkByName(w.Name)
	if err != nil {
		return nil, linkError(w.Name, "find", err)
	}
	err = r.h.LinkSetIP6AddrGenMode(made, nl.IN6_ADDR_GEN_MODE_NONE)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) { // no IPv6 here
		return nil, linkError(w.Name, "have no link-local address", err)
	}
	return made, nil
}

// sameVXLAN tells whether l is what w asks for, in what can only be set when it is made.
// The address is one of these here, since it also tells the family of the outer packets,
// which the kernel does not list.
func sameVXLAN(l *netlink.Vxlan, w netstate.Link) bool {
	return w.VXLAN != nil && l.VxlanId == int(w.VXLAN.ID) && l.Port == int(w.VXLAN.Port) && !l.Learning &&
		l.VtepDevIndex == 0 && slices.Equal(l.HardwareAddr, w.VXLAN.MAC[:])
}

// entry is one line of a forwarding database (bridge(8)) or neighbour table: packets for
// mac go to the outer address, or packets for the next hop go to mac.
type entry struct {
	family int
	mac    netstate.MAC
	addr   netip.Addr
}

// setPeers makes the forwarding database and the neighbours of a VXLAN link exactly those
// of its far ends. New ones come before old ones go.
func (r *Route) setPeers(l netlink.Link, w netstate.VXLAN) (changed int, err error) {
	have, err := r.entries(l)
	if err != nil {
		return 0, err
	}
	want := map[entry]bool{}
	for _, p := range w.Peers {
		want[entry{unix.AF_BRIDGE, p.MAC, p.Outer}] = true
		for _, via := range p.Via {
			want[entry{kernelFamily[netstate.FamilyOf(via)], p.MAC, via}] = true
		}
	}
	var errs failures
	// A far end with two outer addresses would get every packet twice: the database has one
	// line per address of the inner side, which is replaced.
	for e := range want {
		if have[e] {
			continue
		}
		if err := r.h.NeighSet(e.neighbour(l)); err != nil {
			errs.add(linkError(nameOf(l), "add "+e.String(), err))
			continue
		}
		for old := range maps.Clone(have) {
			if old.replacedBy(e) {
				delete(have, old)
			}
		}
		changed++
	}
	for e := range have {
		if want[e] {
			continue
		}
		if err := r.h.NeighDel(e.neighbour(l)); err != nil && !errors.Is(err, unix.ENOENT) {
			errs.add(linkError(nameOf(l), "delete "+e.String(), err))
			continue
		}
		changed++
	}
	return changed, errs.join()
}

func nameOf(l netlink.Link) string { return l.Attrs().Name }

// replacedBy tells whether the kernel puts n into e's place: the database is looked up by
// mac, neighbours by address.
func (e entry) replacedBy(n entry) bool {
	if e.family != n.family {
		return false
	}
	if e.family == unix.AF_BRIDGE {
		return e.mac == n.mac
	}
	return e.addr == n.addr
}

// String is "fdb 02:… dst 172.30.0.12".
func (e entry) String() string {
	if e.family == unix.AF_BRIDGE {
		return fmt.Sprintf("fdb %s dst %s", e.mac, e.addr)
	}
	return fmt.Sprintf("neighbour %s lladdr %s", e.addr, e.mac)
}

func (e entry) neighbour(l netlink.Link) *netlink.Neigh {
	n := &netlink.Neigh{
		LinkIndex: l.Attrs().Index, Family: e.family, State: netlink.NUD_PERMANENT,
		IP: e.addr.AsSlice(), HardwareAddr: e.mac[:],
	}
	if e.family == unix.AF_BRIDGE {
		n.Flags = netlink.NTF_SELF
	}
	return n
}

// entries lists the permanent entries of a link.
func (r *Route) entries(l netlink.Link) (map[entry]bool, error) {
	out := map[entry]bool{}
	for _, family := range []int{unix.AF_BRIDGE, netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump(func() ([]netlink.Neigh, error) { return r.h.NeighList(l.Attrs().Index, family) })
		if err != nil {
			return nil, linkError(nameOf(l), "list far ends", err)
		}
		for _, n := range list {
			if n.State&netlink.NUD_PERMANENT == 0 || len(n.HardwareAddr) != 6 {
				continue // multicast addresses
			}
			out[entry{family, netstate.MAC(n.HardwareAddr), addr(n.IP)}] = true
		}
	}
	return out, nil
}

// observedVXLAN is a VXLAN link as the kernel has it; the names of the far ends are lost.
func (r *Route) observedVXLAN(x *netlink.Vxlan) (*netstate.VXLAN, error) {
	v := &netstate.VXLAN{ID: uint32(x.VxlanId), Port: uint16(x.Port), Family: netstate.IPv4}
	if len(x.HardwareAddr) == 6 {
		v.MAC = netstate.MAC(x.HardwareAddr)
	}
	entries, err := r.entries(x)
	if err != nil {
		return nil, err
	}
	for e := range entries {
		if e.family != unix.AF_BRIDGE {
			continue
		}
		p := netstate.VXLANPeer{Outer: e.addr, MAC: e.mac}
		v.Family = netstate.FamilyOf(e.addr)
		for n := range entries {
			if n.family != unix.AF_BRIDGE && n.mac == e.mac {
				p.Via = append(p.Via, n.addr)
			}
		}
		v.Peers = append(v.Peers, p)
	}
	return v, nil
}
