package wireguard

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	"pgregory.net/rapid"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// TestDifferingIsEnough: looking only at the peers that differ from those asked for before
// leads to the very change that looking at all leads to.
func TestDifferingIsEnough(t *testing.T) {
	short, whole := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		a := applied{peers: map[wgtypes.Key]peer{}, lazy: rapid.Bool().Draw(t, "lazy")}
		own := func(i int) netstate.WireGuardPeer {
			p := drawPeer(t, i)
			p.Name = fmt.Sprint("p", i%5) // two may have one name
			p.AllowedIPs = []netip.Prefix{netip.PrefixFrom(deviceAddress(100+i), 32)}
			return p
		}
		d := netstate.WireGuard{Peers: []netstate.WireGuardPeer{own(1), own(2), own(3), own(4), own(5)}}
		for range rapid.IntRange(10, 30).Draw(t, "steps") {
			if _, _, ok := a.differing(d); ok {
				short++
			} else {
				whole++
			}
			all, now := a, time.Now()
			all.asked = nil
			got, err := a.diff(d, now)
			want, errAll := all.diff(d, now)
			if fmt.Sprint(err) != fmt.Sprint(errAll) || !reflect.DeepEqual(got, want) {
				t.Fatalf("%+v, %v\nwant %+v, %v", got, err, want, errAll)
			}
			a.record(got)
			for k, p := range a.peers {
				if p.waits && rapid.Bool().Draw(t, "calls") {
					p.waits = false
					a.peers[k] = p
				}
			}
			d.Peers = slices.Clone(d.Peers)
			for range rapid.IntRange(0, 2).Draw(t, "changes") {
				i := rapid.IntRange(0, len(d.Peers)).Draw(t, "at")
				other := own(rapid.IntRange(1, 9).Draw(t, "peer"))
				if rapid.IntRange(0, 2).Draw(t, "claims") == 0 {
					other.AllowedIPs = append(other.AllowedIPs, own(rapid.IntRange(1, 9).Draw(t, "whose")).AllowedIPs...)
				}
				switch n := rapid.IntRange(0, 2).Draw(t, "what"); {
				case n == 0 || i == len(d.Peers):
					d.Peers = slices.Insert(d.Peers, i, other)
				case n == 1:
					d.Peers = slices.Delete(d.Peers, i, i+1)
				default:
					d.Peers[i] = other
				}
			}
		}
	})
	if short < 100 || whole < 10 {
		t.Errorf("%d short ways, %d whole ones: the test tests little", short, whole)
	}
}
