package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, x := range s {
		out = append(out, netip.MustParsePrefix(x))
	}
	return out
}

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, x := range s {
		out = append(out, netip.MustParseAddr(x))
	}
	return out
}

func TestGatewayAddressAndLast(t *testing.T) {
	for _, c := range []struct{ r, first, last string }{
		{"10.99.0.0/24", "10.99.0.1", "10.99.0.255"},
		{"10.99.0.7/24", "10.99.0.1", "10.99.0.255"},
		{"10.99.0.0/30", "10.99.0.1", "10.99.0.3"},
		{"10.99.0.0/20", "10.99.0.1", "10.99.15.255"},
		{"10.99.0.5/32", "10.99.0.5", "10.99.0.5"},
		{"0.0.0.0/0", "0.0.0.1", "255.255.255.255"},
		{"fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff"},
		{"fd00::/126", "fd00::1", "fd00::3"},
	} {
		r := netip.MustParsePrefix(c.r)
		if got := GatewayAddress(r).String(); got != c.first {
			t.Errorf("GatewayAddress(%s) = %s, want %s", c.r, got, c.first)
		}
		if got := Last(r).String(); got != c.last {
			t.Errorf("Last(%s) = %s, want %s", c.r, got, c.last)
		}
	}
	if GatewayAddress(netip.Prefix{}).IsValid() {
		t.Error("GatewayAddress of the zero prefix is valid")
	}
}

func TestAssign(t *testing.T) {
	both := prefixes("10.99.0.0/29", "fd00:99::/125")
	for _, c := range []struct {
		name   string
		ranges []netip.Prefix
		in     []Request
		want   string
	}{
		{"first free skips network and gateway", both, []Request{{}, {}}, "10.99.0.2,fd00:99::2 | 10.99.0.3,fd00:99::3"},
		{"a wish is served before first free", both, []Request{{}, {Wishes: addrs("10.99.0.2")}}, "10.99.0.3,fd00:99::2 | 10.99.0.2,fd00:99::3"},
		{"the holder keeps what a newcomer wishes", both,
			[]Request{{Wishes: addrs("10.99.0.4")}, {Held: addrs("10.99.0.4", "fd00:99::7")}},
			"fd00:99::2 !10.99.0.4: the address is taken | 10.99.0.4,fd00:99::7"},
		{"a wish replaces what was held", both, []Request{{Wishes: addrs("10.99.0.6"), Held: addrs("10.99.0.4")}}, "10.99.0.6,fd00:99::2"},
		{"two wishes: the first gets it", prefixes("10.99.0.0/29"),
			[]Request{{Wishes: addrs("10.99.0.4")}, {Wishes: addrs("10.99.0.4")}}, "10.99.0.4 | !10.99.0.4: the address is taken"},
		{"held outside is forgotten", prefixes("10.99.0.0/29"), []Request{{Held: addrs("10.50.0.4")}}, "10.99.0.2"},
		{"reserved", both[:1], []Request{{Wishes: addrs("10.99.0.1")}, {Wishes: addrs("10.99.0.0")}, {Wishes: addrs("10.99.0.7")}, {Wishes: addrs("10.1.1.1")}},
			"!10.99.0.1 is the gateway's own address of 10.99.0.0/29: the address is reserved | " +
				"!10.99.0.0 is the network address of 10.99.0.0/29: the address is reserved | " +
				"!10.99.0.7 is the broadcast address of 10.99.0.0/29: the address is reserved | " +
				"!10.1.1.1: the address is in none of the ranges: 10.99.0.0/29"},
		{"exhausted, then the second range", prefixes("10.99.0.0/30", "10.98.0.0/30"), []Request{{}, {}, {}},
			"10.99.0.2 | 10.98.0.2 | !no free address is left in 10.99.0.0/30, 10.98.0.0/30"},
		{"no ranges", nil, []Request{{}}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, a := range Assign(c.ranges, c.in) {
				var s []string
				for _, x := range a.Addresses {
					s = append(s, x.String())
				}
				line := strings.Join(s, ",")
				if a.Err != nil {
					line = strings.TrimSpace(line + " !" + a.Err.Error())
				}
				got = append(got, line)
			}
			if g := strings.Join(got, " | "); g != c.want {
				t.Errorf("\n got %s\nwant %s", g, c.want)
			}
		})
	}
}

// FAULTS 14: a thousand devices at once, no address twice.
func TestThousandAtOnce(t *testing.T) {
	ranges := prefixes("10.99.0.0/23", "10.98.0.0/22", "fd00:99::/64")
	requests := make([]Request, 1000)
	for i := range requests {
		if i%10 == 0 {
			requests[i].Wishes = []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.98.%d.%d", i%4, 2+i%250))}
		}
	}
	seen := map[netip.Addr]int{}
	for i, a := range Assign(ranges, requests) {
		if a.Err != nil && !errors.Is(a.Err, ErrTaken) {
			t.Fatalf("request %d: %v", i, a.Err)
		}
		for _, x := range a.Addresses {
			if j, ok := seen[x]; ok {
				t.Fatalf("%s was given to %d and %d", x, j, i)
			}
			seen[x] = i
		}
	}
	if len(seen) < 1900 {
		t.Errorf("only %d addresses given to 1000 requests of two families", len(seen))
	}
}

// The pool against the slowest possible model: a list of all addresses.
func TestPoolIsTheNaiveModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		choices := []string{"10.0.0.0/29", "10.0.1.0/30", "10.0.2.128/28", "fd00::/125", "fd00:1::/126"}
		var ranges []netip.Prefix
		for _, c := range choices {
			if rapid.Bool().Draw(t, c) {
				ranges = append(ranges, netip.MustParsePrefix(c))
			}
		}
		p := New(ranges...)
		var usable, universe []netip.Addr // in the order of first-free
		for _, c := range choices {
			r := netip.MustParsePrefix(c)
			for a := r.Addr(); r.Contains(a); a = a.Next() {
				universe = append(universe, a)
			}
		}
		for _, r := range ranges {
			for a := r.Addr().Next().Next(); r.Contains(a); a = a.Next() {
				if a.Is4() && !r.Contains(a.Next()) {
					continue
				}
				usable = append(usable, a)
			}
		}
		taken := map[netip.Addr]bool{}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			switch rapid.IntRange(0, 2).Draw(t, "op") {
			case 0:
				v6 := rapid.Bool().Draw(t, "v6")
				got, err := p.First(v6)
				i := slices.IndexFunc(usable, func(a netip.Addr) bool { return a.Is6() == v6 && !taken[a] })
				if i < 0 {
					if !errors.Is(err, ErrExhausted) {
						t.Fatalf("First(%v) = %s, %v; want exhausted", v6, got, err)
					}
					continue
				}
				if err != nil || got != usable[i] {
					t.Fatalf("First(%v) = %s, %v; want %s", v6, got, err, usable[i])
				}
				taken[got] = true
			case 1:
				a := rapid.SampledFrom(universe).Draw(t, "take")
				want := slices.Contains(usable, a) && !taken[a]
				if got := p.Take(a) == nil; got != want {
					t.Fatalf("Take(%s) = %v, want %v", a, got, want)
				}
				if want {
					taken[a] = true
				}
			case 2:
				a := rapid.SampledFrom(universe).Draw(t, "release")
				p.Release(a)
				delete(taken, a)
			}
			if p.Len() != len(taken) {
				t.Fatalf("Len = %d, want %d", p.Len(), len(taken))
			}
		}
	})
}

func TestFirstOverlapIsTheNaiveModel(t *testing.T) {
	gen := rapid.Custom(func(t *rapid.T) netip.Prefix {
		if rapid.Bool().Draw(t, "v6") {
			b := [16]byte{0xfd, 0, byte(rapid.IntRange(0, 255).Draw(t, "b"))}
			return netip.PrefixFrom(netip.AddrFrom16(b), rapid.IntRange(8, 24).Draw(t, "bits")).Masked()
		}
		b := [4]byte{10, byte(rapid.IntRange(0, 255).Draw(t, "b")), byte(rapid.IntRange(0, 255).Draw(t, "c"))}
		return netip.PrefixFrom(netip.AddrFrom4(b), rapid.IntRange(8, 24).Draw(t, "bits")).Masked()
	})
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.SliceOfN(gen, 0, 6).Draw(t, "a")
		b := rapid.SliceOfN(gen, 0, 6).Draw(t, "b")
		want := false
		for _, x := range a {
			for _, y := range b {
				want = want || x.Overlaps(y)
			}
		}
		x, y, got := FirstOverlap(a, b)
		if got != want {
			t.Fatalf("FirstOverlap = %v, want %v", got, want)
		}
		if got && (!x.Overlaps(y) || !slices.Contains(a, x) || !slices.Contains(b, y)) {
			t.Fatalf("FirstOverlap = %s, %s", x, y)
		}
	})
}

func BenchmarkAssign10000(b *testing.B) {
	ranges := prefixes("10.96.0.0/16", "fd00:99::/64")
	requests := make([]Request, 10000)
	for b.Loop() {
		Assign(ranges, requests)
	}
}
