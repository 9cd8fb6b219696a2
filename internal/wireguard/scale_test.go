package wireguard

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// manyPeers makes n peers with random keys and an address each out of 10.64.0.0/10.
func manyPeers(n int) []netstate.WireGuardPeer {
	peers := make([]netstate.WireGuardPeer, n)
	for i := range peers {
		p := &peers[i]
		p.Name = fmt.Sprintf("device default/d%d", i)
		_, _ = rand.Read(p.PublicKey[:])
		p.AllowedIPs = []netip.Prefix{netip.PrefixFrom(deviceAddress(i), 32)}
	}
	return peers
}

func deviceAddress(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 64 + byte(i>>16), byte(i >> 8), byte(i)})
}

// figures is what one process with many peers needed.
type figures struct {
	Configured time.Duration // first Set, link up, until the last peer is there
	Added      time.Duration // a Set that adds one peer
	Unchanged  time.Duration // a Set with nothing new
	Observed   time.Duration
	RSS        int64 // bytes, idle
}

const scaleEnv = "WIREGUARD_TEST_SCALE"

// TestScale: 1,000 and 10,000 peers, each in a process of its own.
func TestScale(t *testing.T) {
	if n, kind, ok := strings.Cut(os.Getenv(scaleEnv), " "); ok {
		scaleProcess(t, n, Datapath(kind))
		return
	}
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		for _, c := range []struct {
			peers      int
			configured time.Duration
			rss        int64
		}{{1000, 300 * time.Millisecond, 80 << 20}, {10000, 3 * time.Second, 350 << 20}} {
			t.Run(strconv.Itoa(c.peers), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestScale$", "-test.v")
				cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", scaleEnv, c.peers, kind))
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				_, line, _ := strings.Cut(string(out), "figures: ")
				line, _, _ = strings.Cut(line, "\n")
				var f figures
				if err := json.Unmarshal([]byte(line), &f); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				t.Logf("configured %v, one added %v, none %v, observed %v, RSS %d MiB",
					f.Configured, f.Added, f.Unchanged, f.Observed, f.RSS>>20)
				if f.Configured > c.configured {
					t.Errorf("configured in %v, want %v", f.Configured, c.configured)
				}
				if f.Added > 100*time.Millisecond {
					t.Errorf("one peer added in %v, want 100 ms", f.Added)
				}
				if f.RSS > c.rss {
					t.Errorf("RSS %d MiB, want %d", f.RSS>>20, c.rss>>20)
				}
			})
		}
	})
}

func scaleProcess(t *testing.T, peers string, kind Datapath) {
	n, err := strconv.Atoi(peers)
	if err != nil {
		t.Fatal(err)
	}
	h := labtest.New(t).Host("gw")
	w := newWireGuard(t, h, kind)
	k := newKeys(t)
	d := netstate.WireGuard{Link: "cvtwg0", PrivateKey: k.secret(), PublicKey: k.public, ListenPort: 51820, Peers: manyPeers(n)}
	var f figures
	began := time.Now()
	set(t, w, n+3, d)
	if err := h.Up("cvtwg0", "10.64.0.0/10"); err != nil {
		t.Fatal(err)
	}
	f.Configured = time.Since(began)
	labtest.Eventually(t, 5*time.Second, "listening", func() error {
		up, err := w.devices["cvtwg0"].up()
		if err == nil && !up {
			err = fmt.Errorf("not up")
		}
		return err
	})

	d.Peers = append(d.Peers, manyPeers(1)[0])
	d.Peers[n].AllowedIPs = []netip.Prefix{netip.PrefixFrom(deviceAddress(n), 32)}
	began = time.Now()
	set(t, w, 1, d)
	f.Added = time.Since(began)
	began = time.Now()
	set(t, w, 0, d)
	f.Unchanged = time.Since(began)
	began = time.Now()
	if got := len(observe(t, w).Peers); got != n+1 {
		t.Errorf("%d peers, want %d", got, n+1)
	}
	f.Observed = time.Since(began)
	for range 30 { // as the gateway's loop does
		observe(t, w)
	}
	time.Sleep(time.Second)
	f.RSS = rss(t)
	var ms runtime.MemStats
	runtime.ReadMemStats(&ms)
	t.Logf("heap inuse %d MiB, stacks %d MiB, sys %d MiB, next GC %d MiB, goroutines %d", ms.HeapInuse>>20, ms.StackInuse>>20, ms.Sys>>20, ms.NextGC>>20, runtime.NumGoroutine())
	line, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("figures: %s", line)
}

// rss is this process's resident memory in bytes.
func rss(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}
