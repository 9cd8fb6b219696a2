package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// elementsOf applies scripts of element operations as the kernel would: what is deleted
// must be there, what is added must not.
type elementsOf map[string]map[string]string

func (e elementsOf) apply(t *rapid.T, p *portPlan) int {
	ops := 0
	for set, keys := range p.gone {
		for _, k := range keys {
			if _, ok := e[set][k]; !ok {
				t.Fatalf("delete %s from %s: not there", k, set)
			}
			delete(e[set], k)
			ops++
		}
	}
	for set, elements := range p.come {
		if e[set] == nil {
			e[set] = map[string]string{}
		}
		for _, el := range elements {
			k, v, _ := strings.Cut(el, " : ")
			if _, ok := e[set][k]; ok {
				t.Fatalf("add %s to %s: already there", k, set)
			}
			e[set][k] = v
			ops++
		}
	}
	return ops
}

// meaning resolves picks, slots and endpoints to what a packet would find.
func (e elementsOf) meaning(t *rapid.T) map[string][]string {
	out := map[string][]string{}
	slots, eps := 0, 0
	for _, n := range []string{"4", "6"} {
		for key, verdict := range e["svc_picks"+n] {
			var ends []string
			for i := 0; ; i++ {
				number, ok := e["svc_slots"+n][fmt.Sprintf("%s . %d", key, i)]
				if !ok {
					break
				}
				end, ok := e["svc_eps"+n][number]
				if !ok {
					t.Fatalf("slot %d of %s: endpoint %s is not there", i, key, number)
				}
				ends = append(ends, end)
			}
			slots += len(ends)
			slices.Sort(ends)
			out[key+" "+verdict] = ends
		}
		slots -= len(e["svc_slots"+n])
		eps += len(e["svc_eps"+n]) - len(e["svc_slots"+n])
	}
	if slots != 0 || eps != 0 {
		t.Fatalf("orphans: slots %d, endpoints %d", slots, eps)
	}
	return out
}

func TestIncrementalEqualsFresh(t *testing.T) {
	endpoint := func(v6 bool) *rapid.Generator[netip.AddrPort] {
		return rapid.Map(rapid.IntRange(1, 6), func(i int) netip.AddrPort {
			if v6 {
				return netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("fd00::%d", i)), 80)
			}
			return netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("10.0.0.%d", i)), 80)
		})
	}
	servicePort := rapid.Custom(func(t *rapid.T) netstate.ServicePort {
		v6 := rapid.Bool().Draw(t, "v6")
		p := netstate.ServicePort{
			Address: netip.MustParseAddr("10.96.0.1"), Protocol: rapid.SampledFrom([]netstate.Protocol{netstate.TCP, netstate.UDP, netstate.SCTP}).Draw(t, "proto"),
			Port: uint16(rapid.IntRange(1, 2).Draw(t, "port")), AffinitySeconds: rapid.SampledFrom([]int{0, 0, 60, 10800}).Draw(t, "affinity"),
			Endpoints: rapid.SliceOfN(endpoint(v6), 0, 6).Draw(t, "endpoints"),
		}
		if v6 {
			p.Address = netip.MustParseAddr("fd06::1")
		}
		return p
	})
	rapid.Check(t, func(t *rapid.T) {
		s, kernel := newPorts(), elementsOf{}
		used := map[string]string{} // endpoint numbers, by family
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			desired := rapid.SliceOfN(servicePort, 0, 8).Draw(t, "ports")
			before := map[string]string{}
			for _, n := range []string{"4", "6"} {
				maps.Copy(before, kernel["svc_eps"+n])
			}
			p := s.plan(desired)
			kernel.apply(t, p)
			s.commit(p)
			for _, n := range []string{"4", "6"} {
				for number, e := range kernel["svc_eps"+n] {
					if _, old := before[number]; !old && used[number] != "" {
						t.Fatalf("number %s of %s was given again to %s", number, used[number], e)
					}
					used[number] = e
				}
			}

			fresh, want := newPorts(), elementsOf{}
			fp := fresh.plan(desired)
			want.apply(t, fp)
			if d := cmp.Diff(want.meaning(t), kernel.meaning(t)); d != "" {
				t.Fatalf("not as rendered afresh:\n%s", d)
			}
			if !maps.Equal(p.picks, fp.picks) {
				t.Fatalf("chains %v, want %v", p.picks, fp.picks)
			}
			if again := s.plan(desired); len(again.gone)+len(again.come) != 0 {
				t.Fatalf("second plan is not empty: %v %v", again.gone, again.come)
			}
			// What a new process reads is what this one knows.
			read, err := portsOf(kernel)
			if err != nil {
				t.Fatal(err)
			}
			if again := read.plan(desired); len(again.gone)+len(again.come) != 0 {
				t.Fatalf("plan after reading back is not empty: %v %v", again.gone, again.come)
			}
		}
	})
}

func TestOneEndpointIsAHandfulOfOperations(t *testing.T) {
	eps := func(n ...int) (out []netip.AddrPort) {
		for _, i := range n {
			out = append(out, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 80))
		}
		return out
	}
	s := newPorts()
	for i, step := range [][]netip.AddrPort{eps(1, 2, 3, 4, 5), eps(1, 3, 4, 5), eps(1, 2, 3, 4, 5), eps(1, 2, 3, 4, 6), eps(1)} {
		p := s.plan([]netstate.ServicePort{{Address: netip.MustParseAddr("10.96.0.1"), Protocol: netstate.UDP, Port: 53, Endpoints: step}})
		s.commit(p)
		ops := 0
		for _, m := range []map[string][]string{p.gone, p.come} {
			for _, l := range m {
				ops += len(l)
			}
		}
		if i > 0 && i < 4 && ops > 6 {
			t.Errorf("step %d: %d operations: %v %v", i, ops, p.gone, p.come)
		}
	}
}
