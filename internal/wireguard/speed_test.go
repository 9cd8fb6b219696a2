package wireguard

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

const speedEnv = "WIREGUARD_TEST_SPEED"

// TestSpeed: through our user space one TCP stream is at least 0.95 times as fast as
// through the library's own program. Both have the same far end and take turns; the median
// of the rounds' ratios decides. Where
// neighbours keep the machine busy they decide on throughput, so that there ours may be
// lower if it needs no more processor time for the same bytes than such a ratio allows.
func TestSpeed(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: -short")
	}
	if os.Getenv(speedEnv) == "" {
		// In a process of its own, as the library's program is: other tests leave garbage.
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestSpeed$", "-test.v")
		cmd.Env = append(os.Environ(), speedEnv+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Error(err)
		}
		return
	}
	l := labtest.New(t, "ping", "wg", "iperf3", "go")
	program := filepath.Join(t.TempDir(), "wireguard-go")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/tailscale/wireguard-go").CombinedOutput(); err != nil {
		t.Fatalf("build the library's program: %v: %s", err, out)
	}
	far, near, other := l.Host("far"), l.Host("ours"), l.Host("theirs")
	l.Connect(far, "eth0", "192.0.2.1/24", near, "eth0", "192.0.2.2/24")
	l.Connect(far, "eth1", "198.51.100.1/24", other, "eth0", "198.51.100.2/24")
	end := newStockProgram(t, far, "10.9.0.1/24", program)
	end.wg("listen-port", "51820")

	theirs := newStockProgram(t, other, "10.9.0.3/24", program)
	theirs.peer(end.public, "198.51.100.1:51820", "10.9.0.0/24")
	end.peer(theirs.public, "", "10.9.0.3/32")

	w := newWireGuard(t, near, UserSpace)
	k := newKeys(t)
	d := netstate.WireGuard{Link: "cvtwg0", PrivateKey: k.secret(), PublicKey: k.public, ListenPort: 51820}
	d.Peers = []netstate.WireGuardPeer{{
		Name: "site default/far", PublicKey: end.public, Endpoint: netip.MustParseAddrPort("192.0.2.1:51820"), AllowedIPs: ips("10.9.0.1/32"),
	}}
	end.peer(d.PublicKey, "", "10.9.0.2/32")
	set(t, w, -1, d)
	if err := near.Up("cvtwg0", "10.9.0.2/24"); err != nil {
		t.Fatal(err)
	}
	near.IP("link", "set", "cvtwg0", "mtu", "1420")
	far.Background("iperf3", "-s")
	labtest.Eventually(t, 5*time.Second, "iperf3", func() error {
		_, err := near.Try("iperf3", "-c", "10.9.0.1", "-n", "1")
		return err
	})

	idle := idleShare(t)
	t.Logf("the machine was %.0f %% idle", 100*idle)
	for _, c := range []struct {
		name string
		more []string
	}{{"sending", nil}, {"receiving", []string{"-R"}}} {
		mine, its := cpuTime(t, os.Getpid()), cpuTime(t, theirs.pid)
		a, b, ratio := inTurns(15, func() float64 { return gigabits(t, near, c.more...) }, func() float64 { return gigabits(t, other, c.more...) })
		mine, its = cpuTime(t, os.Getpid())-mine, cpuTime(t, theirs.pid)-its
		work := float64(mine) / float64(its)
		t.Logf("%s: ours %.2f Gbit/s, the library's program %.2f, ratio %.2f; processor time %s and %s, ratio %.2f",
			c.name, a, b, ratio, mine, its, work)
		if ratio < 0.95 && (idle > 0.8 || work > 1/0.95) {
			t.Errorf("%s is slower than the library's program", c.name)
		}
	}
	quantile := 0.5
	if idle <= 0.8 { // waiting for a processor is most of a median then
		quantile = 0.1
	}
	a, b, ratio := inTurns(21, func() float64 { return roundTrip(t, near, quantile) }, func() float64 { return roundTrip(t, other, quantile) })
	// Told, not judged: the goal is 1.1, and 1.19 to 1.26 is what a calm machine gives. Why is
	// not known: ours shares a process with the test here. See also test/netlab.
	t.Logf("round trip: ours %.3f ms, the library's program %.3f, ratio %.2f", a, b, ratio)
	t.Logf("RSS of this process %d MiB", rss(t)>>20)
}

// inTurns measures two candidates, each first in every other round, and returns their
// medians and that of the rounds' ratios.
func inTurns(rounds int, one, two func() float64) (a, b, ratio float64) {
	var ones, twos, ratios []float64
	for i := range rounds {
		var x, y float64
		if i%2 == 0 {
			x = one()
			y = two()
		} else {
			y = two()
			x = one()
		}
		ones, twos, ratios = append(ones, x), append(twos, y), append(ratios, x/y)
	}
	return median(ones), median(twos), median(ratios)
}

// idleShare is how much of the processors nobody uses for a second: what neighbours use is
// missing in a figure of speed.
func idleShare(t *testing.T) float64 {
	read := func() (idle, all float64) {
		b, err := os.ReadFile("/proc/stat")
		if err != nil {
			t.Fatal(err)
		}
		line, _, _ := strings.Cut(string(b), "\n")
		for i, f := range strings.Fields(line)[1:9] {
			n, err := strconv.ParseFloat(f, 64)
			if err != nil {
				t.Fatal(err)
			}
			all += n
			if i == 3 || i == 4 { // idle, waiting for a disk
				idle += n
			}
		}
		return idle, all
	}
	idle, all := read()
	time.Sleep(time.Second)
	idle2, all2 := read()
	return (idle2 - idle) / (all2 - all)
}

// cpuTime is the processor time that a process has used, in ticks of 10 ms.
func cpuTime(t *testing.T, pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var ticks time.Duration
	for _, v := range f[11:13] {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

func gigabits(t *testing.T, h *labtest.Host, more ...string) float64 {
	t.Helper()
	out := h.Run("iperf3", append([]string{"-c", "10.9.0.1", "-n", "200M", "-J"}, more...)...)
	var r struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	return r.End.Received.BitsPerSecond / 1e9
}

var rtt = regexp.MustCompile(`time=([0-9.]+) ms`)

// roundTrip is a quantile of 40.
func roundTrip(t *testing.T, h *labtest.Host, quantile float64) float64 {
	t.Helper()
	var all []float64
	for _, m := range rtt.FindAllStringSubmatch(h.Run("ping", "-c", "40", "-i", "0.002", "10.9.0.1"), -1) {
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatalf("ping: %v", err)
		}
		all = append(all, v)
	}
	if len(all) == 0 {
		t.Fatal("no ping is answered")
	}
	slices.Sort(all)
	return all[int(float64(len(all)-1)*quantile)]
}
