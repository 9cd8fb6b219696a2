package guard

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Observation is what the guard has done.
type Observation struct {
	Present bool
	// Dropped counts packets by kind, see the package's comment; of a guard that is not
	// strict those that it would have dropped. All kinds are always there.
	Dropped map[string]uint64
	// Seen are who they were from and to in the last minutes, at most 128 pairs of each kind
	// and family.
	Seen []Pair
}

// Pair is who sent packets of a kind to whom.
type Pair struct {
	Kind     string
	From, To netip.Addr
	Protocol uint8 // IANA's number
}

var nftTable = &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}

// Observe reads the counters and who was seen.
func (x *Guard) Observe() (Observation, error) {
	o := Observation{Dropped: map[string]uint64{}}
	for _, k := range kinds {
		o.Dropped[k] = 0
	}
	err := o.read()
	if err != nil {
		err = fmt.Errorf("observe nftables table %s: %w", Table, err)
	}
	return o, err
}

func (o *Observation) read() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	objects, err := conn.GetObj(&nftables.CounterObj{Table: nftTable})
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, obj := range objects {
		c, ok := obj.(*nftables.CounterObj)
		if !ok {
			continue
		}
		o.Present = true
		o.Dropped[c.Name] = c.Packets
	}
	if !o.Present {
		return nil
	}
	for _, k := range kinds {
		if o.Dropped[k] == 0 {
			continue
		}
		for n, size := range map[string]int{"4": 4, "6": 16} {
			list, err := conn.GetSetElements(&nftables.Set{Table: nftTable, Name: "seen" + n + "_" + k})
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			for _, e := range list {
				if p, ok := pair(k, e.Key, size); ok {
					o.Seen = append(o.Seen, p)
				}
			}
		}
	}
	slices.SortFunc(o.Seen, func(a, b Pair) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	return nil
}

func pair(kind string, key []byte, size int) (Pair, bool) {
	if len(key) < 2*size+1 {
		return Pair{}, false
	}
	from, ok1 := netip.AddrFromSlice(key[:size])
	to, ok2 := netip.AddrFromSlice(key[size : 2*size])
	return Pair{kind, from, to, key[2*size]}, ok1 && ok2
}

// found is what can be told cheaply of the table in the kernel.
type found struct {
	stamp    string
	rules    map[string]int // by chain
	elements map[string]int // by set
}

// observe looks whether somebody changed the table: rules or elements that were removed
// show in their numbers.
func observe() (*found, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	f := &found{rules: map[string]int{}, elements: map[string]int{}}
	if err := f.readRules(); err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	if f.stamp == "" {
		return f, nil
	}
	for name := range setTypes {
		list, err := conn.GetSetElements(&nftables.Set{Table: nftTable, Name: name})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("list set %s: %w", name, err)
		}
		for _, e := range list {
			if !e.IntervalEnd {
				f.elements[name]++
			}
		}
	}
	return f, nil
}

// readRules counts the rules of every chain and reads the stamp, without looking at what the
// rules say.
func (f *found) readRules() error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_INET, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(Table)))
	messages, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, m := range messages {
		if len(m) < nl.SizeofNfgenmsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofNfgenmsg:])
		if err != nil {
			return err
		}
		var table, chain, comment string
		for _, a := range attrs {
			switch a.Attr.Type {
			case unix.NFTA_RULE_TABLE:
				table = nl.BytesToString(a.Value)
			case unix.NFTA_RULE_CHAIN:
				chain = nl.BytesToString(a.Value)
			case unix.NFTA_RULE_USERDATA:
				comment, _ = userdata.GetString(a.Value, userdata.TypeComment)
			}
		}
		if table != Table {
			continue
		}
		f.rules[chain]++
		if chain == stampChain {
			f.stamp = comment
		}
	}
	return nil
}

// Standing tells whether a guard that drops stands in the network namespace of the calling
// thread: one that this version, or another one, has put up and nobody has flushed. It needs no
// nft(8).
func Standing() (bool, error) {
	f := &found{rules: map[string]int{}}
	if err := f.readRules(); err != nil {
		return false, fmt.Errorf("list rules of nftables table %s: %w", Table, err)
	}
	return strings.HasPrefix(f.stamp, stampStrict) && f.rules["prerouting"] > 0 && f.rules["forward"] > 0 && f.rules["postrouting"] > 0, nil
}

// equal tells whether a table is what is in the kernel.
func (f *found) equal(t *table) bool {
	if f.stamp != t.stamp {
		return false
	}
	for name, c := range t.chains {
		if f.rules[name] != len(c.rules) {
			return false
		}
	}
	for name, list := range t.sets {
		if f.elements[name] != len(list) {
			return false
		}
	}
	return true
}
