package relay

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Whatever the endpoints, failures and affinity: candidates are different endpoints of
// the service, as many as asked for when there are, live ones before failed ones, and the
// affine one first unless it failed.
func TestCandidates(t *testing.T) {
	client := netip.MustParseAddr("10.1.0.2")
	rapid.Check(t, func(t *rapid.T) {
		r := &Relay{}
		r.affinity.init()
		r.failures.init()
		s := &service{affinity: time.Minute}
		live := 0
		for i := range rapid.IntRange(0, 8).Draw(t, "endpoints") {
			e := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 2, 0, byte(i)}), 80)
			s.endpoints = append(s.endpoints, e)
			if rapid.Bool().Draw(t, "failed") {
				r.failures.add(e)
			} else {
				live++
			}
		}
		var affine netip.AddrPort
		if len(s.endpoints) > 0 && rapid.Bool().Draw(t, "affine") {
			affine = rapid.SampledFrom(s.endpoints).Draw(t, "which")
			r.chosen(s, client, affine)
		}
		n := rapid.IntRange(1, 4).Draw(t, "n")
		got := r.candidates(s, client, n)
		if len(got) != min(n, len(s.endpoints)) {
			t.Fatalf("%d candidates of %d, asked for %d", len(got), len(s.endpoints), n)
		}
		for i, e := range got {
			if !s.has(e) || slices.Contains(got[:i], e) {
				t.Fatalf("candidates %v of %v", got, s.endpoints)
			}
			if failed := r.failures.has(e, time.Now()); failed != (i >= live) {
				t.Fatalf("candidate %d of %v: failed %v with %d live ones", i, got, failed, live)
			}
		}
		if affine.IsValid() && !r.failures.has(affine, time.Now()) && got[0] != affine {
			t.Fatalf("candidates %v, affine %s", got, affine)
		}
	})
}

func TestTenThousandServicesAreSetFast(t *testing.T) {
	var ports []netstate.ServicePort
	for i := range 10_000 {
		p := port(netstate.TCP, "10.96.0.1:80", "10.2.0.2:80", "10.2.0.3:80", "10.2.0.4:80")
		p.Address = netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})
		ports = append(ports, p)
	}
	start := time.Now()
	table, changed := (&table{}).update(ports)
	loaded := time.Since(start)
	if changed != len(ports) {
		t.Errorf("%d changed, want %d", changed, len(ports))
	}
	var times []time.Duration
	for range 9 {
		e := ports[4711].Endpoints
		ports[4711].Endpoints = append(slices.Clone(e[1:]), netip.AddrPortFrom(e[2].Addr().Next(), 80))
		start = time.Now()
		table, changed = table.update(ports)
		times = append(times, time.Since(start))
		if changed != 1 {
			t.Errorf("%d changed, want 1", changed)
		}
	}
	slices.Sort(times)
	one := times[len(times)/2]
	t.Logf("10,000 loaded in %s, one changed in %s (median of %s)", loaded, one, times)
	if loaded > 5*time.Second || one > 50*time.Millisecond {
		t.Error("want 5 s and 50 ms")
	}
}
