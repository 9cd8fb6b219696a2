package nft

import (
	"maps"
	"slices"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// nextFirewall makes the part for f. With ten thousand devices in the table, one that
// comes or goes must not cost a look at each: when no more than such tunnels changed, it
// builds on the last part, which may be nil.
func nextFirewall(last *part, f netstate.Firewall) (*part, error) {
	if last != nil && last.firewall != nil && last.firewall.conflict == nil && !last.firewall.shared && sameApartFromTunnels(last.firewall.from, f) {
		gone, come := changedTunnels(last.firewall.from.Tunnels, f.Tunnels)
		if p := last.withTunnels(f, gone, come); p != nil {
			return p, nil
		}
	}
	return renderFirewall(f)
}

func sameApartFromTunnels(a, b netstate.Firewall) bool {
	return a.Masquerade == b.Masquerade && slices.Equal(a.Pods, b.Pods) && slices.Equal(a.Services, b.Services) &&
		slices.Equal(a.Nodes, b.Nodes) && slices.Equal(a.Clamps, b.Clamps) && slices.Equal(a.Pins, b.Pins) &&
		slices.Equal(a.Unmasqueraded, b.Unmasqueraded) && sameNodeLink(a.NodeLink, b.NodeLink) &&
		slices.EqualFunc(a.Pools, b.Pools, func(a, b netstate.Pool) bool {
			return a.Link == b.Link && slices.Equal(a.Prefixes, b.Prefixes)
		})
}

// changedTunnels compares lists that are usually sorted by name. In others it may report
// an equal tunnel as gone and come.
func changedTunnels(have, want []netstate.Tunnel) (gone, come []netstate.Tunnel) {
	i, j := 0, 0
	for i < len(have) && j < len(want) {
		switch a, b := &have[i], &want[j]; {
		case sameTunnel(a, b):
			i, j = i+1, j+1
		case a.Name <= b.Name:
			gone = append(gone, *a)
			i++
		default:
			come = append(come, *b)
			j++
		}
	}
	return append(gone, have[i:]...), append(come, want[j:]...)
}

func sameTunnel(a, b *netstate.Tunnel) bool {
	return a.Name == b.Name && a.Kind == b.Kind && a.Link == b.Link && a.Access == b.Access && slices.Equal(a.Prefixes, b.Prefixes)
}

// withTunnels is the part after some tunnels went and others came, which makes it that for
// f; nil when more than hosts would change.
func (p *part) withTunnels(f netstate.Firewall, gone, come []netstate.Tunnel) *part {
	out := &part{name: p.name, chains: p.chains, sets: p.sets, sum: p.sum, rest: p.rest}
	users := maps.Clone(p.firewall.users)
	less, ok := hostsOf(gone, users, -1)
	more, ok2 := hostsOf(come, users, 1)
	if !ok || !ok2 {
		return nil
	}
	for name, n := range users {
		if n == 0 || p.firewall.users[name] == 0 {
			return nil // a link or a chain goes or comes
		}
	}
	p.firewall.bare(more)
	if out.hosts, ok = mergeHosts(p.hosts, less, more, &out.sum); !ok {
		return nil
	}
	f.Tunnels = slices.Clone(f.Tunnels)
	out.firewall = &rendered{from: f, ranges: p.firewall.ranges, users: users}
	return out
}

// hostsOf sorts the hosts of tunnels that have nothing else, and adds to the users of
// what they need; not ok: they have something else.
func hostsOf(tunnels []netstate.Tunnel, users map[string]int, add int) (hosts []host, ok bool) {
	for _, t := range tunnels {
		l, err := link(t.Link)
		if err != nil || t.Kind == netstate.TunnelSite {
			return nil, false
		}
		to := verdict(t.Access)
		users[l] += add
		users[to] += add
		for _, p := range t.Prefixes {
			if !p.IsSingleIP() {
				return nil, false
			}
			hosts = append(hosts, host{l, p.Addr(), to, false, t.Name})
		}
	}
	slices.SortFunc(hosts, compareHosts)
	return hosts, true
}

// mergeHosts takes some hosts out of a list and puts others in; all are sorted. The sum
// follows. Not ok: one that goes is not there, or one that comes is.
func mergeHosts(list, gone, come []host, sum *digest) (out []host, ok bool) {
	out = make([]host, 0, len(list)+len(come))
	for len(gone)+len(come) > 0 {
		leaves := len(come) == 0 || len(gone) > 0 && compareHosts(gone[0], come[0]) <= 0
		next := come
		if leaves {
			next = gone
		}
		i, found := slices.BinarySearchFunc(list, next[0], compareHosts)
		out, list = append(out, list[:i]...), list[i:]
		if leaves {
			if !found {
				return nil, false
			}
			sum.subtract(list[0].digest())
			list, gone = list[1:], gone[1:]
			continue
		}
		if found || len(out) > 0 && compareHosts(out[len(out)-1], come[0]) == 0 {
			return nil, false
		}
		sum.add(come[0].digest())
		out, come = append(out, come[0]), come[1:]
	}
	return append(out, list...), true
}
