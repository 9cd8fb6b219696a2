package route

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// kernelFamily maps address families.
var kernelFamily = map[netstate.Family]int{
	netstate.IPv4: netlink.FAMILY_V4,
	netstate.IPv6: netlink.FAMILY_V6,
}

// setRules makes our rules exactly those that are wanted. New ones come in the order of
// their priority before old ones go in the reverse order, so that the rule for
// encapsulated packets always precedes the one that would send them into a tunnel.
func (r *Route) setRules(rules []netstate.Rule) (changed int, err error) {
	have, err := r.rules()
	if err != nil {
		return 0, err
	}
	var errs failures
	want := slices.Clone(rules)
	slices.SortStableFunc(want, func(a, b netstate.Rule) int { return cmp.Compare(a.Priority, b.Priority) })
	for i, w := range want {
		if w.Mark != 0 && w.MarkMask == 0 {
			w.MarkMask = ^uint32(0) // as the kernel lists it
			want[i] = w
		}
		if slices.ContainsFunc(have, func(k netlink.Rule) bool { return observedRule(k) == w && plain(k) }) {
			continue
		}
		if err := r.addRule(w); err != nil {
			errs.add(err)
			continue
		}
		changed++
	}
	slices.SortStableFunc(have, func(a, b netlink.Rule) int { return cmp.Compare(b.Priority, a.Priority) })
	for _, k := range have {
		if slices.Contains(want, observedRule(k)) && plain(k) {
			continue
		}
		if err := r.h.RuleDel(&k); err != nil && !errors.Is(err, unix.ENOENT) {
			errs.add(fmt.Errorf("delete %s: %w", describeRule(observedRule(k)), err))
			continue
		}
		changed++
	}
	return changed, errs.join()
}

func (r *Route) addRule(w netstate.Rule) error {
	switch {
	case kernelFamily[w.Family] == 0:
		return fmt.Errorf("%s: unknown address family", describeRule(w))
	case w.Forwarded && (w.Mark != 0 || w.MarkMask != 0):
		return fmt.Errorf("%s: selects by mark and by being forwarded; one of them is possible", describeRule(w))
	case w.UDPPort != 0 && (w.Forwarded || w.Mark != 0 || w.MarkMask != 0):
		return fmt.Errorf("%s: selects by port and by something else; one of them is possible", describeRule(w))
	case w.Priority < r.options.MinPriority || w.Priority > r.options.MaxPriority:
		return fmt.Errorf("%s: the priority is not one of ours (%d to %d)", describeRule(w), r.options.MinPriority, r.options.MaxPriority)
	}
	k := netlink.NewRule()
	k.Family = kernelFamily[w.Family]
	k.Priority = w.Priority
	k.Table = w.Table
	k.Protocol = netstate.RouteProtocol
	if w.Mark != 0 || w.MarkMask != 0 {
		k.Mark = w.Mark
		k.Mask = &w.MarkMask
	}
	if w.Forwarded {
		k.IifName, k.Invert = "lo", true // what the host sends itself counts as coming from lo
	}
	if w.UDPPort != 0 {
		k.IPProto, k.Dport = unix.IPPROTO_UDP, netlink.NewRulePortRange(w.UDPPort, w.UDPPort)
	}
	if err := r.h.RuleAdd(k); err != nil {
		return fmt.Errorf("add %s: %w", describeRule(w), err)
	}
	return nil
}

// rules lists our rules in the kernel.
func (r *Route) rules() ([]netlink.Rule, error) {
	var out []netlink.Rule
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump(func() ([]netlink.Rule, error) { return r.h.RuleList(family) })
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		for _, k := range list {
			if k.Protocol == netstate.RouteProtocol && r.ownPriority(k.Priority) && k.Family == family {
				out = append(out, k)
			}
		}
	}
	return out, nil
}

func (r *Route) ownPriority(p int) bool {
	return p >= r.options.MinPriority && p <= r.options.MaxPriority
}

func observedRule(k netlink.Rule) netstate.Rule {
	o := netstate.Rule{Family: netstate.IPv4, Priority: k.Priority, Mark: k.Mark, Table: k.Table}
	if k.Family == netlink.FAMILY_V6 {
		o.Family = netstate.IPv6
	}
	if k.Mask != nil {
		o.MarkMask = *k.Mask
	}
	o.Forwarded = forwarded(k)
	if ported(k) {
		o.UDPPort = k.Dport.Start
	}
	return o
}

// ported tells whether a rule selects UDP packets for one port.
func ported(k netlink.Rule) bool {
	return k.IPProto == unix.IPPROTO_UDP && k.Dport != nil && k.Dport.Start == k.Dport.End && k.Mark == 0 && k.IifName == ""
}

// forwarded tells whether a rule selects packets that came in over a link.
func forwarded(k netlink.Rule) bool { return k.IifName == "lo" && k.Invert && k.Mark == 0 }

// plain tells whether a rule selects by nothing but the mark or, instead, by being
// forwarded or by a UDP port, as all of ours do.
func plain(k netlink.Rule) bool {
	return k.Src == nil && k.Dst == nil && (forwarded(k) || k.IifName == "" && !k.Invert) && k.OifName == "" && k.Tos == 0 && k.TunID == 0 &&
		(ported(k) || k.IPProto == 0 && k.Dport == nil) && k.Sport == nil && k.UIDRange == nil &&
		k.SuppressPrefixlen < 0 && k.SuppressIfgroup < 0 && k.Goto < 0
}

func describeRule(x netstate.Rule) string {
	what := ""
	if x.Forwarded {
		what = " forwarded"
	}
	if x.UDPPort != 0 {
		what += fmt.Sprintf(" udp %d", x.UDPPort)
	}
	return fmt.Sprintf("rule ipv%d priority %d fwmark %#x/%#x%s lookup %d", x.Family, x.Priority, x.Mark, x.MarkMask, what, x.Table)
}
