package nft

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// A part that builds on the last one is that which is made from nothing.
func TestNextFirewallEqualsFresh(t *testing.T) {
	ranges := prefixes("172.18.0.0/30", "10.0.0.0/8", "10.1.0.0/16", "fd02::/126")
	tunnel := rapid.Custom(func(t *rapid.T) netstate.Tunnel {
		tunnel := netstate.Tunnel{
			Name: fmt.Sprintf("device %d", rapid.IntRange(0, 20).Draw(t, "name")), Kind: netstate.TunnelDevice,
			Link:   rapid.SampledFrom([]string{"cvtwg0", "cvtwg0", "cvtwg1"}).Draw(t, "link"),
			Access: rapid.SampledFrom([]netstate.Access{3, 3, 3, 3, 1}).Draw(t, "access"),
		}
		for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(0, 40), 1, 3, rapid.ID).Draw(t, "hosts") {
			tunnel.Prefixes = append(tunnel.Prefixes, prefixes(fmt.Sprintf("172.18.0.%d/32", i), fmt.Sprintf("fd02::%x/128", i))...)
		}
		if rapid.IntRange(0, 15).Draw(t, "site") == 0 {
			tunnel.Kind = netstate.TunnelSite
		}
		if rapid.IntRange(0, 10).Draw(t, "range") == 0 {
			tunnel.Prefixes = append(tunnel.Prefixes, rapid.SampledFrom(ranges).Draw(t, "prefix"))
		}
		return tunnel
	})
	built := 0
	rapid.Check(t, func(t *rapid.T) {
		f := firewall(netstate.AccessPods | netstate.AccessServices)
		f.Tunnels = append(f.Tunnels, rapid.SliceOfN(tunnel, 0, 12).Draw(t, "tunnels")...)
		last, err := renderFirewall(f)
		if err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			last.stamp()
			f.Tunnels = slices.Clone(f.Tunnels)
			for range rapid.IntRange(0, 2).Draw(t, "gone") {
				if len(f.Tunnels) > 0 {
					i := rapid.IntRange(0, len(f.Tunnels)-1).Draw(t, "which")
					f.Tunnels = slices.Delete(f.Tunnels, i, i+1)
				}
			}
			f.Tunnels = append(f.Tunnels, rapid.SliceOfN(tunnel, 0, 2).Draw(t, "come")...)
			if rapid.Bool().Draw(t, "sorted") {
				slices.SortStableFunc(f.Tunnels, func(a, b netstate.Tunnel) int { return strings.Compare(a.Name, b.Name) })
			}
			if rapid.IntRange(0, 5).Draw(t, "else") == 0 {
				f.Masquerade = !f.Masquerade
			}
			got, err := nextFirewall(last, f)
			want, err2 := renderFirewall(f)
			if err != nil || err2 != nil {
				t.Fatal(err, err2)
			}
			if got.rest != (digest{}) {
				built++
			}
			bare := func(h []host) []host { // an owner is only for messages
				h = slices.Clone(h)
				for i := range h {
					h[i].owner = ""
				}
				return h
			}
			if d := cmp.Diff(bare(want.hosts), bare(got.hosts), cmp.AllowUnexported(host{}), cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
				t.Fatalf("hosts not as from nothing:\n%s", d)
			}
			if d := cmp.Diff(want.sets, got.sets); d != "" {
				t.Fatalf("sets not as from nothing:\n%s", d)
			}
			if got.stamp() != want.stamp() {
				t.Fatal("another stamp than from nothing")
			}
			if fmt.Sprint(got.firewall.conflict) != fmt.Sprint(want.firewall.conflict) {
				t.Fatalf("conflict %v, want %v", got.firewall.conflict, want.firewall.conflict)
			}
			last = got
		}
	})
	if built == 0 {
		t.Error("no part was built on the last one")
	}
	t.Logf("%d parts were built on the last one", built)
}

// One tunnel's mistake concerns no other.
func TestConflictingTunnels(t *testing.T) {
	n := newNetwork(t)
	for _, c := range []struct {
		prefix string
		want   []string
	}{
		{"172.16.1.0/25", []string{"site x/newcomer", "172.16.1.0/25", "172.16.1.0/24", "site default/a"}},
		{"172.18.0.5/32", []string{"site x/newcomer", "172.18.0.5", "device default/a"}},
	} {
		f := firewall(netstate.AccessPods)
		f.Tunnels = append([]netstate.Tunnel{{Name: "site x/newcomer", Kind: netstate.TunnelSite, Link: "cvtwg0", Prefixes: prefixes(c.prefix), Access: netstate.AccessNodes}}, f.Tunnels...)
		set := func() (changed int, err error) {
			n.gw.Do(func() error { changed, err = n.nft.SetFirewall(context.Background(), f); return nil })
			if err == nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: error %v, want one line", c.prefix, err)
			}
			return changed, err
		}
		_, err := set()
		for _, w := range c.want {
			if !strings.Contains(fmt.Sprint(err), w) {
				t.Errorf("error %q does not name %s", err, w)
			}
		}
		if changed, _ := set(); changed != 0 {
			t.Errorf("%s: second Set: %d changes", c.prefix, changed)
		}
		for _, from := range []string{"site a", "device a"} {
			if !n.reached(t, "udp", 4, from, "pod 1") || n.reach(t, "udp", 4, from, "node") {
				t.Errorf("%s: %s lost its access, or has the newcomer's", c.prefix, from)
			}
		}
	}
	if n.setFirewall(firewall(netstate.AccessPods)) == 0 {
		t.Error("the newcomer is gone, and nothing changes")
	}
}

// A link that is only clamped, or only a source of services, is no tunnel's.
func TestLinksWithoutTunnels(t *testing.T) {
	n := newNetwork(t)
	f, s := firewall(netstate.AccessPods), services(servicePorts(0, "pod 1")...)
	f.Clamps = []netstate.Clamp{{Link: "eth0", MSS4: 1000, MSS6: 1000}, {Link: "absent", MSS4: 1000}}
	s.Sources = append(s.Sources, "eth0", "absent")
	n.setFirewall(f)
	n.setServices(s)
	everyFamily(t, func(t *testing.T, family int, proto string) {
		if !n.reached(t, proto, family, "pod 1", "device a") || !n.reached(t, proto, family, "device a", "pod 1") || !n.reached(t, proto, family, "pod 1", "gateway") {
			t.Error("traffic of a link without tunnels is touched")
		}
	})
	// Not "spoofed": the veth that stands in for the tunnel has IPv6 chatter of its own.
	if o := n.observe(); o.Dropped["denied"]+o.Dropped["leak"] != 0 {
		t.Errorf("dropped: %v", o.Dropped)
	}
}

// A new process that finds another firewall in the table makes it its own.
func TestTakeOverAnotherFirewall(t *testing.T) {
	n := newNetwork(t)
	f := firewall(netstate.AccessPods)
	for i := range 20 {
		f.Tunnels = append(f.Tunnels, device(i), netstate.Tunnel{Name: fmt.Sprint("site x/", i), Kind: netstate.TunnelSite, Link: "cvtwg0",
			Prefixes: prefixes(fmt.Sprintf("10.77.%d.0/%d", i, 24+i%8), fmt.Sprintf("fd77:%x::/%d", i, 32+i))})
	}
	n.setFirewall(f)
	var log bytes.Buffer
	var err error
	if n.nft, err = New(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}); err != nil {
		t.Fatal(err)
	}
	f.Tunnels = slices.Delete(f.Tunnels, 10, 14)
	f.Tunnels[20].Access = netstate.AccessNodes
	f.Tunnels = append(f.Tunnels, netstate.Tunnel{Name: "site y/y", Kind: netstate.TunnelSite, Link: "cvtwg1", Prefixes: prefixes("10.78.0.0/16", "fd78::/16")})
	n.setFirewall(f)
	list := func() []string {
		words := strings.FieldsFunc(n.gw.Run("nft", "-s", "list", "table", "inet", Table), func(r rune) bool { return r == ' ' || r == ',' || r == '\n' || r == '\t' })
		slices.Sort(words)
		return words
	}
	got := list()
	n.gw.Do(n.nft.Close)
	n.setFirewall(f)
	if d := cmp.Diff(list(), got); d != "" {
		t.Errorf("not as in a new table:\n%s", d)
	}
	if log.Len() > 0 {
		t.Errorf("not taken over as it was: %s", &log)
	}
}
