package nft

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
)

var nftTable = &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}

// load makes sure that n.kernel is what the table holds, as far as setting a part needs
// it; it stays nil when there is no table, or none that can be taken over.
func (n *NFT) load(want *part) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	stamps, err := readStamps(conn)
	if err != nil {
		return fmt.Errorf("read nftables table %s: %w", Table, err)
	}
	if len(stamps) < 2 {
		n.kernel, n.unread = nil, false
		return nil
	}
	if n.kernel == nil || n.kernel.stamps[partFirewall] != stamps[partFirewall] || n.kernel.stamps[partServices] != stamps[partServices] {
		n.kernel, n.unread = newContents(), true
		n.kernel.stamps = stamps
		err = readChains(conn, n.kernel)
	}
	if k := n.kernel; err == nil && want.name == partFirewall && k.parts[partFirewall] == nil && k.ranges == nil && stamps[partFirewall] != want.stamp() {
		k.ranges, err = readRanges(conn)
	}
	if err != nil {
		n.log.Warn("cannot take the nftables table over", "table", Table, "cause", err)
		n.kernel = nil
	}
	return nil
}

// readPorts makes sure that n.ports is what the table holds. The services of a table that
// makes no sense are written anew, with the whole table.
func (n *NFT) readPorts() {
	if !n.unread {
		return
	}
	n.unread = false
	conn, err := nftables.New()
	var p *ports
	if err == nil {
		p, err = readPorts(conn)
	}
	if err != nil {
		n.log.Warn("cannot take the nftables table's services over", "table", Table, "cause", err)
		n.kernel, p = nil, newPorts()
	}
	p.next = max(p.next, n.ports.next)
	n.ports = p
}

// readStamps reads the hashes of both parts; none without a table.
func readStamps(conn *nftables.Conn) (map[string]string, error) {
	stamps := map[string]string{}
	for _, part := range []string{partFirewall, partServices} {
		rules, err := conn.GetRules(nftTable, &nftables.Chain{Name: stampChain(part), Table: nftTable})
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			if s, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok {
				stamps[part] = s
			}
		}
	}
	return stamps, nil
}

// readChains reads the names and hooks of the chains.
func readChains(conn *nftables.Conn, c *contents) error {
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	for _, ch := range chains {
		if ch.Table.Name != Table {
			continue
		}
		have := chain{}
		if suffix, ok := strings.CutPrefix(ch.Name, "svc_sticky6_"); ok {
			have.affinity6 = affinityMap + suffix
		}
		if ch.Hooknum != nil && ch.Priority != nil {
			have.hook = baseHook(string(ch.Type), hookName(*ch.Hooknum), int(*ch.Priority))
		}
		c.chains[ch.Name] = have
	}
	return nil
}

// readPorts reads the translated ports.
func readPorts(conn *nftables.Conn) (*ports, error) {
	elements, err := readSets(conn, func(s *nftables.Set) bool { return byPorts(s.Name) }, elementTexts)
	if err != nil {
		return nil, err
	}
	return portsOf(elements)
}

// readRanges reads the sets slowToFlush.
func readRanges(conn *nftables.Conn) (map[string]map[string]string, error) {
	decl := map[string]setDecl{}
	for _, d := range frame {
		if slowToFlush(d) {
			decl[d.name] = d
		}
	}
	return readSets(conn, func(s *nftables.Set) bool { _, ok := decl[s.Name]; return ok },
		func(set string, list []nftables.SetElement) (map[string]string, error) {
			return rangeTexts(decl[set], list)
		})
}

// readSets reads the elements of some sets as text.
func readSets(conn *nftables.Conn, which func(*nftables.Set) bool,
	texts func(set string, list []nftables.SetElement) (map[string]string, error)) (map[string]map[string]string, error) {
	sets, err := conn.GetSets(nftTable)
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	elements := map[string]map[string]string{}
	for _, set := range sets {
		if !which(set) {
			continue
		}
		list, err := conn.GetSetElements(set)
		if err != nil {
			return nil, fmt.Errorf("list set %s: %w", set.Name, err)
		}
		if elements[set.Name], err = texts(set.Name, list); err != nil {
			return nil, fmt.Errorf("list set %s: %w", set.Name, err)
		}
	}
	return elements, nil
}

func hookName(h nftables.ChainHook) string {
	for name, hook := range map[string]*nftables.ChainHook{
		"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput, "forward": nftables.ChainHookForward, "postrouting": nftables.ChainHookPostrouting,
	} {
		if *hook == h {
			return name
		}
	}
	return fmt.Sprintf("hook-%d", h)
}
