package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// Addresses of every pair: outside, and inside the tunnel.
const (
	outerA, outerB = "192.0.2.1", "192.0.2.2"
	innerA, innerB = "10.1.0.1", "10.2.0.2"
)

// pair is two hosts, joined by a veth, with a tunnel between them.
type pair struct {
	t    *testing.T
	a, b *labtest.Host
	dir  string
	// link carries the inner packets on b. On a wire of its own: eth0, with nothing hidden.
	link string
	// from and to are the inner addresses of a and b; who gives out its own changes them.
	from, to string
	// proof says what else shows that packets take the way that is measured; nil: nothing.
	proof func() error
	// pids are the processes that carry, of which the last one is b's.
	pids    []int
	started [][]string // their command lines
	seconds float64
}

func tunnels(brief bool) *suite {
	seconds := 1.0
	if brief {
		seconds = 0.5
	}
	start := func(up func(p *pair)) func(*testing.T, *labtest.Lab) candidate {
		return func(t *testing.T, l *labtest.Lab) candidate { return newPair(t, l, seconds, up) }
	}
	return &suite{
		name: "tunnels", title: "Tunnels: one gateway, one peer", against: "Culvert, WireGuard",
		metrics: []metric{
			{name: "TCP", unit: "Gbit/s"}, {name: "TCP ×4", unit: "Gbit/s"}, {name: "UDP 1,300 B", unit: "1000/s"}, {name: "RTT", unit: "ms", less: true},
			{name: "RTT under load", unit: "ms", less: true}, {name: "CPU", unit: "s/GB", less: true}, {name: "memory", unit: "MB", less: true},
		},
		contenders: []contender{
			{"Culvert, WireGuard", true, nil, start(culvertPair("wireguard"))},
			{"wireguard-go (upstream)", false, built("wireguard"), start(wireguardPair("upstream"))},
			{"wireguard-go (Tailscale's)", false, built("wireguard-go"), start(wireguardPair("tailscale"))},
			{"wireguard-go (Debian)", false, func() string {
				if peers != "" {
					return "of 2022, for the smoke run only"
				}
				return needs("wireguard-go")()
			}, start(wireguardPair("debian"))},
			{"tailscaled", false, built("tailscaled"), start(tailscalePair)},
			{"Nebula", false, built("nebula"), start(nebulaPair)},
			{"OpenVPN, UDP", false, needs("openvpn"), start(openvpnPair("udp"))},
			{"OpenVPN, TCP", false, needs("openvpn"), start(openvpnPair("tcp"))},
			{"Culvert, IPsec", true, needs("charon-systemd"), start(culvertPair("ipsec"))},
			{"strongSwan, libipsec", false, needs("charon-systemd"), start(strongswanPair)},
			{"no tunnel", false, nil, start(func(p *pair) {
				p.address(p.a, "eth0", innerA, innerB)
				p.address(p.b, "eth0", innerB, innerA)
				p.link = "eth0"
			})},
		},
	}
}

// hosts numbers the pairs of a lab.
var hosts atomic.Int32

func newPair(t *testing.T, l *labtest.Lab, seconds float64, up func(*pair)) *pair {
	t.Helper()
	n := hosts.Add(1)
	p := &pair{t: t, a: l.Host(fmt.Sprintf("a%d", n)), b: l.Host(fmt.Sprintf("b%d", n)), dir: shortDir(t), from: innerA, to: innerB, seconds: seconds}
	l.Connect(p.a, "eth0", outerA+"/24", p.b, "eth0", outerB+"/24")
	up(p)
	// Inner packets that arrive outside a tunnel.
	p.b.Run("nft", "table inet bench { counter clear { }; chain in { type filter hook prerouting priority -400; iifname eth0 ip daddr "+p.to+" counter name clear; }; }")
	labtest.Eventually(t, 20*time.Second, "a way through the tunnel", func() error {
		_, err := p.a.Try("ping", "-c", "1", "-W", "1", "-I", p.from, p.to)
		return err
	})
	p.b.Background("iperf3", "-s", "-B", p.to)
	labtest.Eventually(t, 5*time.Second, "iperf3 listens", func() error {
		_, err := p.iperf(0.1)
		return err
	})
	return p
}

// address gives a link an inner address, towards that of the other end.
func (p *pair) address(h *labtest.Host, link, own, peer string) {
	h.IP("addr", "add", own+"/32", "dev", link)
	h.IP("link", "set", link, "up")
	h.IP("route", "add", peer+"/32", "dev", link, "src", own)
}

func (p *pair) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pair) write(name, text string) string {
	p.t.Helper()
	if err := os.MkdirAll(filepath.Dir(p.path(name)), 0o700); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(p.path(name), []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return p.path(name)
}

// program starts one of the candidate's; its log is shown when the test fails.
func (p *pair) program(h *labtest.Host, name string, args ...string) {
	p.t.Helper()
	cmd, log := h.Background(name, args...)
	p.pids, p.started = append(p.pids, cmd.Process.Pid), append(p.started, append([]string{name}, args...))
	p.t.Cleanup(func() {
		if p.t.Failed() {
			b, _ := os.ReadFile(log)
			p.t.Logf("%s %v:\n%s", name, args, b[max(0, len(b)-2000):])
		}
	})
}

// sums are what iperf3 says at the end.
type sums struct {
	bits    float64 // per second
	bytes   float64
	packets float64 // per second that arrived
	lost    float64 // share
}

// iperf runs iperf3; its server may not have noticed the end of the last run yet, and then
// says so in several ways.
func (p *pair) iperf(seconds float64, args ...string) (s sums, err error) {
	for range 10 {
		if s, err = p.iperfOnce(seconds, args...); err == nil {
			return s, nil
		}
		time.Sleep(300 * time.Millisecond)
	}
	return s, err
}

func (p *pair) iperfOnce(seconds float64, args ...string) (sums, error) {
	all := append([]string{"-c", p.to, "-B", p.from, "-J", "-t", strconv.FormatFloat(seconds, 'f', 1, 64)}, args...)
	if seconds < 1 { // it counts whole seconds
		all = append(all[:5], append([]string{"-n", strconv.Itoa(int(seconds*40)) + "M"}, args...)...)
	}
	out, failed := p.a.Try("iperf3", all...) // what went wrong is in its output, too
	var r struct {
		Error string
		End   struct {
			SumReceived struct {
				BitsPerSecond float64 `json:"bits_per_second"`
				Bytes         float64
			} `json:"sum_received"`
			Sum struct {
				Seconds     float64
				Bytes       float64
				Packets     float64
				LostPackets float64 `json:"lost_packets"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return sums{}, errors.Join(failed, fmt.Errorf("iperf3: %w", err))
	}
	if r.Error != "" {
		return sums{}, fmt.Errorf("iperf3: %s", r.Error)
	}
	s := sums{bits: r.End.SumReceived.BitsPerSecond, bytes: r.End.SumReceived.Bytes}
	if u := r.End.Sum; u.Packets > 0 && u.Seconds > 0 {
		s.packets, s.lost, s.bytes = (u.Packets-u.LostPackets)/u.Seconds, u.LostPackets/u.Packets, u.Bytes
	}
	return s, nil
}

func (p *pair) measure(t *testing.T) figures {
	t.Helper()
	must := func(s sums, err error) sums {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	out := figures{"RTT": p.ping(t, 50)}
	before, cpu := p.received(t), p.cpu()
	tcp := must(p.iperf(p.seconds))
	used := p.cpu() - cpu
	out["TCP"] = tcp.bits / 1e9
	if len(p.pids) > 0 {
		out["CPU"] = used / (tcp.bytes / 1e9)
	}
	// What came out of the tunnel is what was sent, and none of it came in the clear.
	if moved := p.received(t) - before; moved < tcp.bytes*0.9 || tcp.bytes < 1e6 {
		t.Errorf("iperf3 says %.0f bytes, through %s came %.0f", tcp.bytes, p.link, moved)
	}
	out["TCP ×4"] = must(p.iperf(p.seconds, "-P", "4")).bits / 1e9
	loaded := make(chan error, 1)
	go func() { _, err := p.iperf(max(p.seconds, 1)); loaded <- err }()
	time.Sleep(200 * time.Millisecond)
	out["RTT under load"] = p.ping(t, 40)
	if err := <-loaded; err != nil {
		t.Fatal(err)
	}
	if p.seconds >= 1 {
		if rate := p.packets(t); rate > 0 { // else no rate that was tried lost so little
			out["UDP 1,300 B"] = rate
		}
	}
	if len(p.pids) > 0 {
		out["memory"] = resident(p.pids[len(p.pids)-1])
	}
	counted := p.b.Run("nft", "-j", "list", "counter", "inet", "bench", "clear")
	if hidden := strings.Contains(counted, `"packets": 0`); hidden == (p.link == "eth0") {
		t.Errorf("inner packets outside the tunnel: %s", counted)
	}
	if p.proof != nil {
		if err := p.proof(); err != nil {
			t.Error(err)
		}
	}
	return out
}

// packets are the most of 1,300 bytes a second of which at most one in a thousand is lost:
// each time three quarters of what was sent before, in units of a thousand.
func (p *pair) packets(t *testing.T) float64 {
	t.Helper()
	rate := "0"
	for range 8 {
		s, err := p.iperf(1, "-u", "-l", "1300", "-b", rate)
		if err != nil {
			t.Fatal(err)
		}
		if s.lost <= 0.001 {
			return s.packets / 1000
		}
		sent := s.packets / (1 - s.lost)
		rate = strconv.Itoa(int(min(sent*0.75, s.packets*0.95) * 1300 * 8))
	}
	return 0
}

// ping is the median round trip, in milliseconds.
func (p *pair) ping(t *testing.T, n int) float64 {
	t.Helper()
	out, err := p.a.Try("ping", "-c", strconv.Itoa(n), "-i", "0.01", "-W", "1", "-I", p.from, p.to)
	if err != nil {
		t.Fatal(err)
	}
	var all []float64
	for line := range strings.Lines(out) {
		if _, v, ok := strings.Cut(line, "time="); ok {
			v, _, _ = strings.Cut(v, " ")
			if x, err := strconv.ParseFloat(v, 64); err == nil {
				all = append(all, x)
			}
		}
	}
	return median(all)
}

// received counts the bytes that came out of b's link.
func (p *pair) received(t *testing.T) float64 {
	t.Helper()
	var links []struct {
		Stats64 struct{ RX struct{ Bytes float64 } }
	}
	if err := json.Unmarshal([]byte(p.b.Run("ip", "-s", "-s", "-j", "link", "show", "dev", p.link)), &links); err != nil || len(links) != 1 {
		t.Fatalf("link %s: %v", p.link, err)
	}
	return links[0].Stats64.RX.Bytes
}

// cpu is the processor time of the candidate's processes, both ends, in seconds.
func (p *pair) cpu() float64 { return processorTime(p.pids...) }

// processorTime is what processes and their children have used so far, in seconds.
func processorTime(pids ...int) float64 {
	total := 0.0
	for _, pid := range family(pids) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		for _, i := range []int{11, 12} { // utime, stime: proc(5)
			if i < len(f) {
				v, _ := strconv.ParseFloat(f[i], 64)
				total += v / 100
			}
		}
	}
	return total
}

// family is processes with their descendants.
func family(pids []int) []int {
	out := slices.Clone(pids)
	for i := 0; i < len(out); i++ {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", out[i]))
		for _, file := range threads {
			b, _ := os.ReadFile(file)
			for _, f := range strings.Fields(string(b)) {
				if n, err := strconv.Atoi(f); err == nil && !slices.Contains(out, n) {
					out = append(out, n)
				}
			}
		}
	}
	return out
}

// resident is a process's memory, in MB.
func resident(pid int) float64 {
	kb, _, _ := strings.Cut(fieldOf(fmt.Sprintf("/proc/%d/status", pid), "VmRSS"), " ")
	v, _ := strconv.ParseFloat(kb, 64)
	return v * 1024 / 1e6
}
