package guard

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

func example(nodes int) *netstate.Guard {
	g := &netstate.Guard{
		Link: netstate.EncryptionLink, Port: 51821, Local: []string{"cni0", "veth*"}, AllTraffic: true, Strict: true,
		Pods:  []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244::/32")},
		Sites: []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24")},
		Exempt: []netstate.Exemption{{Name: "API server", Protocol: netstate.TCP, Address: netip.MustParseAddr("172.30.0.11"), Port: 6443},
			{Name: "API server", Protocol: netstate.TCP, Address: netip.MustParseAddr("fd00:30::11"), Port: 6443}},
	}
	for i := range nodes {
		g.Nodes = append(g.Nodes, netip.AddrFrom4([4]byte{172, 30, byte(i >> 8), byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00:30::%x", i+1)))
	}
	return g
}

// open makes a guard in a namespace of its own.
func open(t *testing.T, file string) (*labtest.Host, *Guard) {
	t.Helper()
	labtest.Require(t, "nft")
	h := labtest.New(t).Host("node")
	var g *Guard
	h.Do(func() (err error) { g, err = New(Options{File: file}); return err })
	return h, g
}

func set(t *testing.T, h *labtest.Host, x *Guard, g *netstate.Guard) (changed int) {
	t.Helper()
	h.Do(func() (err error) { changed, err = x.Set(context.Background(), g); return err })
	return changed
}

// What was counted stays when nodes come and go and the guard becomes lax and strict again;
// the second time changes nothing, also in a new process.
func TestCountsStay(t *testing.T) {
	h, x := open(t, "")
	if err := h.Up("lo", "10.9.9.9/32"); err != nil {
		t.Fatal(err)
	}
	h.IP("link", "add", "eth0", "type", "bridge")
	h.IP("link", "set", "eth0", "up")
	h.IP("route", "add", "10.244.0.0/16", "dev", "eth0", "src", "10.9.9.9")
	h.IP("neigh", "add", "10.244.7.7", "lladdr", "02:00:00:00:00:01", "dev", "eth0")
	send := func() {
		h.Do(func() error {
			c, err := net.Dial("udp", "10.244.7.7:9")
			if err == nil {
				_, _ = c.Write([]byte("x")) // refused: dropped on its way out
				err = c.Close()
			}
			return err
		})
	}
	dropped := func() (n uint64) {
		h.Do(func() error {
			o, err := x.Observe()
			n = o.Dropped["out_pods"]
			if err == nil && (len(o.Seen) != 1 || o.Seen[0] != Pair{"out_pods", netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("10.244.7.7"), 17}) {
				t.Errorf("seen %v", o.Seen)
			}
			return err
		})
		return n
	}
	set(t, h, x, example(2))
	send()
	if n := dropped(); n != 1 {
		t.Fatalf("%d packets were dropped, want 1", n)
	}
	for i, g := range []*netstate.Guard{example(3), example(1)} {
		g.Strict = i == 0
		if set(t, h, x, g) == 0 || set(t, h, x, g) != 0 {
			t.Errorf("guard %d: want a change, and then none", i)
		}
		send()
		if n := dropped(); n != uint64(i+2) {
			t.Errorf("guard %d: %d packets are counted, want %d", i, n, i+2)
		}
		var other *Guard
		h.Do(func() (err error) { other, err = New(Options{}); return err })
		if set(t, h, other, g) != 0 {
			t.Errorf("guard %d: a new process changed something", i)
		}
	}
	out := h.Run("nft", "list", "table", "inet", Table)
	if strings.Contains(out, "drop") {
		t.Error("a guard that is not strict drops")
	}
}

// A guard on disk comes back after a restart of the host; a removed one does not.
func TestRestore(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state", "guard.json")
	h, x := open(t, file)
	set(t, h, x, example(2))
	before := h.Run("nft", "list", "table", "inet", Table)
	h.Run("nft", "flush ruleset")
	restore := func() (standing bool) {
		h.Do(func() (err error) {
			fresh, err := New(Options{File: file})
			if err == nil {
				standing, err = fresh.Restore(context.Background())
			}
			return err
		})
		return standing
	}
	if !restore() {
		t.Error("nothing was restored")
	}
	if after := h.Run("nft", "list", "table", "inet", Table); after != before {
		t.Errorf("restored:\n%s\nwant\n%s", after, before)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v, %v; want 0600", file, st, err)
	}
	h.Do(func() error { return x.Remove(context.Background()) })
	if restore() {
		t.Error("a removed guard came back")
	}
	if out := h.Run("nft", "list", "tables"); strings.Contains(out, Table) {
		t.Errorf("removed, but there: %s", out)
	}
}

// One of 250 nodes that comes is quick to apply.
func TestManyNodes(t *testing.T) {
	h, x := open(t, "")
	set(t, h, x, example(250))
	best := time.Hour
	for i := range 5 {
		start := time.Now()
		if set(t, h, x, example(251+i)) == 0 {
			t.Fatal("nothing changed")
		}
		best = min(best, time.Since(start))
	}
	t.Logf("one more of 250 nodes: %s", best)
	if best > 60*time.Millisecond {
		t.Errorf("took %s, want 60 ms at most", best)
	}
}

// A guard stands when it drops, and nobody has flushed it.
func TestStanding(t *testing.T) {
	h, x := open(t, "")
	standing := func(want bool, what string) {
		t.Helper()
		h.Do(func() error {
			got, err := Standing()
			if got != want {
				t.Errorf("%s: standing %v", what, got)
			}
			return err
		})
	}
	standing(false, "no table")
	lax := example(1)
	lax.Strict = false
	set(t, h, x, lax)
	standing(false, "one that only counts")
	set(t, h, x, example(1))
	standing(true, "a strict one")
	h.Run("nft", "flush", "chain", "inet", Table, "postrouting")
	standing(false, "a chain was flushed")
	set(t, h, x, example(1))
	standing(true, "repaired")
	h.Run("nft", "flush", "table", "inet", Table)
	standing(false, "the table was flushed")
}

func TestHostileNames(t *testing.T) {
	for _, name := range []string{"", `x" accept; #`, "a b", "averyveryverylongname", "x;y", "*x", "x\n"} {
		g := example(1)
		g.Local = []string{name}
		if _, err := render(g); err == nil {
			t.Errorf("a local link named %q is accepted", name)
		}
	}
}
