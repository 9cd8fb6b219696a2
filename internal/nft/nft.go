// Package nft applies netstate.Firewall and netstate.Services as one nftables table,
// "inet culvert". It never changes any other table, and the names that people give to
// their objects never reach it.
//
// The table is a fixed frame (sets, maps, base chains) whose elements change: a device
// or an endpoint that comes or goes is a handful of element operations, however many
// others there are. Each change is one transaction.
//
//   - The firewall decides in prerouting, after translation: the source must be in the
//     map fw_hosts or fw_nets of its link, whose verdict is the chain of its access. What
//     leaves is checked in postrouting, where the outgoing link is final.
//   - Services in mode Translate: the map svc_picks leads to a chain for the number of
//     backends, which draws a slot; svc_slots turns it into an endpoint's number, svc_eps
//     into the endpoint. Numbers are never used twice, so that an affinity (svc_aff) to
//     an endpoint that is gone misses. Slot and number go from rule to rule in the
//     connection's mark (ct mark), of the first packet only: it is 0 again right after the
//     translation, so a mark that a foreign chain gave a connection to a service before
//     priority -100 is lost; a later one stays. The packet's own mark is not touched.
//   - Services in mode Proxy: TPROXY to netstate.RelayPort with netstate.MarkProxy.
//
// Changes go through the program nft(8) (1.0.6 or later; Linux 5.10): with 10,000
// services or devices in the table one that changes costs it about 4 ms of processor time,
// and the first load less than a second, so that writing over netlink would gain little.
// What keeps it fast is that the large sets are hashes or intervals in concatenations,
// which nft never lists to change them. Reading is another matter (any list command
// fetches all elements), so counters and stamps are read over netlink.
//
// A new process takes the table over. The table keeps a hash of each part of the desired
// state as a comment, so that an equal state is recognised without reading it; another
// one replaces that part's rules and elements in one transaction. The maps of the
// services are read back when services are set, so that endpoints keep their numbers and
// affinity survives.
package nft

import (
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"sync"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Table is the name of the table, of family inet.
const Table = "culvert"

// Options configure an NFT. The zero value is usable.
type Options struct {
	// Program is the path of nft(8); empty: found in PATH.
	Program string
	// Logger hears of what no error reports: a table that had to be replaced as a whole,
	// flows that could not be ended. Nil: nobody does.
	Logger *slog.Logger
}

// NFT applies the firewall and the services in the network namespace of the calling
// thread. Its methods may be called from several goroutines.
type NFT struct {
	program string
	log     *slog.Logger

	mu     sync.Mutex
	kernel *contents        // what the table holds; nil: not known
	ports  *ports           // the translated ports that the table holds; see unread
	unread bool             // the ports must be read from the table first
	last   map[string]*part // as last set by this process
}

// New looks for nft(8). It changes nothing.
func New(o Options) (*NFT, error) {
	if o.Program == "" {
		o.Program = "nft"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	path, err := exec.LookPath(o.Program)
	if err != nil {
		return nil, fmt.Errorf("find nft(8): %w", err)
	}
	return &NFT{program: path, log: o.Logger, ports: newPorts(), last: map[string]*part{}}, nil
}

// SetFirewall makes f the firewall, in one transaction. It returns the number of
// elements and chains that it changed: 0 when f was in effect already.
//
// The services stay as they are: as set before, or as an earlier process left them. In a
// new table all service addresses are rejected until SetServices says otherwise.
//
// Of two tunnels of a link that overlap and have different access, one cannot have what
// it asks for: an inner range is treated as the outer one, a common address as the
// tunnel's whose name comes first. The error names both; everything else is in effect.
//
// The prefixes in f must not be changed afterwards.
func (n *NFT) SetFirewall(ctx context.Context, f netstate.Firewall) (changed int, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	want, err := nextFirewall(n.last[partFirewall], f)
	if err != nil {
		return 0, fmt.Errorf("set firewall: %w", err)
	}
	if changed, err = n.apply(ctx, want, nil); err != nil {
		return 0, fmt.Errorf("set firewall: %w", err)
	}
	if c := want.firewall.conflict; c != nil {
		return changed, fmt.Errorf("set firewall: %w", c)
	}
	return changed, nil
}

// SetServices makes s the services, in one transaction. It returns the number of
// elements and chains that it changed: 0 when s was in effect already. Afterwards it
// ends the UDP flows to endpoints that are gone, and those that ran to a service before
// its first endpoint came.
func (n *NFT) SetServices(ctx context.Context, s netstate.Services) (changed int, err error) {
	want, err := renderServices(s)
	if err != nil {
		return 0, fmt.Errorf("set services: %w", err)
	}
	var desired []netstate.ServicePort
	if s.Mode == netstate.ServicesTranslate {
		desired = s.Ports
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if changed, err = n.apply(ctx, want, desired); err != nil {
		return 0, fmt.Errorf("set services: %w", err)
	}
	return changed, nil
}

// apply brings one part of the table, and for the services part the translated ports,
// to what is wanted.
func (n *NFT) apply(ctx context.Context, want *part, desired []netstate.ServicePort) (int, error) {
	if err := n.load(want); err != nil {
		return 0, err
	}
	if want.name == partServices {
		n.readPorts()
	}
	if n.kernel == nil {
		return n.replace(ctx, want, desired)
	}
	var plan *portPlan
	if want.name == partServices {
		plan = n.ports.plan(desired)
		want.addPicks(plan.picks)
	}
	s := newScript(n.kernel)
	s.part(want)
	s.ports(plan)
	if s.changes > 0 {
		if err := n.run(ctx, s.String()); err != nil {
			if ctx.Err() != nil {
				n.kernel = nil
				return 0, err
			}
			n.log.Warn("replacing the nftables table as a whole", "table", Table, "cause", err)
			return n.replace(ctx, want, desired)
		}
	}
	n.kernel.set(want)
	n.last[want.name] = want
	if plan != nil {
		n.ports.commit(plan)
		n.endFlows(plan)
	}
	return s.changes, nil
}

// replace writes the whole table anew, in one transaction: there is no moment without
// rules, and established connections keep their translation. The part that is not being
// set keeps its last value, or starts closed.
func (n *NFT) replace(ctx context.Context, want *part, desired []netstate.ServicePort) (int, error) {
	n.readPorts()
	n.kernel = nil
	fresh := n.ports.renumbered()
	var plan *portPlan
	if want.name == partServices {
		plan = fresh.plan(desired)
		want.addPicks(plan.picks)
	} else {
		plan = fresh.plan(n.ports.desired())
	}
	c := newContents()
	s := newScript(newContents())
	s.frame()
	for _, name := range []string{partFirewall, partServices} {
		p := n.last[name]
		switch {
		case name == want.name:
			p = want
		case p == nil:
			p = closedPart(name)
			p.addPicks(plan.picks)
		}
		s.part(p)
		c.set(p)
	}
	s.ports(plan)
	if err := n.run(ctx, s.String()); err != nil {
		return 0, err
	}
	n.kernel, n.ports = c, fresh
	n.last[want.name] = want
	n.ports.commit(plan)
	n.endFlows(plan)
	return s.changes, nil
}

// Close deletes the table. What its rules let through is no longer checked: links and
// routes of tunnels must be gone before. A table that is not there is no error.
func (n *NFT) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.kernel, n.ports, n.unread, n.last = nil, newPorts(), false, map[string]*part{}
	// "add" first: deleting a table that does not exist is an error.
	script := "add table inet " + Table + "\ndelete table inet " + Table + "\n"
	if err := n.run(context.Background(), script); err != nil {
		return fmt.Errorf("delete nftables table %s: %w", Table, err)
	}
	return nil
}
