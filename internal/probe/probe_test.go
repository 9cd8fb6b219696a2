package probe_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/probe"
)

// emulated tells that the test runs in the virtual machine of test/kernel, where nothing
// happens in time, and nothing of what the test needs is special.
func emulated(t *testing.T) bool {
	t.Helper()
	if os.Getenv("CULVERT_KERNEL") != "1" {
		return false
	}
	t.Log("not in an emulated machine: it measures times")
	return true
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const interval = 50 * time.Millisecond

// running is a Prober that runs until the end of the test, and the transitions it told.
type running struct {
	*probe.Prober
	t testing.TB

	mu   sync.Mutex
	told []probe.Status
}

func start(t testing.TB, h *labtest.Host, targets ...probe.Target) *running {
	t.Helper()
	r := &running{t: t}
	h.Do(func() (err error) {
		r.Prober, err = probe.New(probe.Options{Interval: interval, Changed: func(s probe.Status) {
			r.Observe() // may be called from here
			r.mu.Lock()
			defer r.mu.Unlock()
			r.told = append(r.told, s)
		}})
		return err
	})
	if n, err := r.Set(t.Context(), targets); n != len(targets) || err != nil {
		t.Fatalf("%d changes, %v", n, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// await waits until a target is told to have a health and returns how long that took.
func (r *running) await(name string, h probe.Health, timeout time.Duration) time.Duration {
	r.t.Helper()
	begin := time.Now()
	for time.Since(begin) < timeout {
		if r.health(name).Health == h {
			return time.Since(begin)
		}
		time.Sleep(2 * time.Millisecond)
	}
	r.t.Fatalf("%s is not %s within %s: %+v", name, h, timeout, r.health(name))
	return 0
}

func (r *running) health(name string) probe.Status {
	for _, s := range r.Observe() {
		if s.Target.Name == name {
			return s
		}
	}
	return probe.Status{}
}

func (r *running) transitions(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, s := range r.told {
		if s.Target.Name == name {
			out = append(out, s.Health.String())
		}
	}
	return strings.Join(out, " ")
}

func pair(t testing.TB) (a, b *labtest.Host) {
	l := labtest.New(t, "nft")
	a, b = l.Host("a"), l.Host("b")
	l.Connect(a, "eth0", "192.0.2.1/24 2001:db8::1/64", b, "eth0", "192.0.2.2/24 2001:db8::2/64")
	return a, b
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// Both kinds of sockets, both families: up at once, down in time, and up again only
// after a row of answers.
func TestTransitions(t *testing.T) {
	if emulated(t) {
		return
	}
	for kind, ping := range map[string]string{"raw": "1 0", "ping": "0 2147483647"} {
		t.Run(kind, func(t *testing.T) {
			a, b := pair(t)
			a.Sysctl("net/ipv4/ping_group_range", ping)
			r := start(t, a, probe.Target{Name: "four", Address: addr("192.0.2.2")}, probe.Target{Name: "six", Address: addr("2001:db8::2")})
			for _, name := range []string{"four", "six"} {
				r.await(name, probe.Up, 20*interval)
				if s := r.health(name); s.RTT <= 0 || s.RTT > interval || s.Received == 0 {
					t.Errorf("%+v", s)
				}
			}
			b.IP("link", "set", "eth0", "down")
			for _, name := range []string{"four", "six"} {
				if took := r.await(name, probe.Down, 20*interval); took > 8*interval {
					t.Errorf("%s: noticed only after %s", name, took)
				}
			}
			if err := b.Up("eth0", "2001:db8::2/64"); err != nil { // the kernel dropped it with the link
				t.Fatal(err)
			}
			if took := r.await("four", probe.Up, 60*interval); took < 4*interval {
				t.Errorf("up after %s already: fewer than 6 answers", took)
			}
			r.await("six", probe.Up, 100*interval)
			for _, name := range []string{"four", "six"} {
				if got := r.transitions(name); got != "up down up" {
					t.Errorf("%s: told %q", name, got)
				}
			}
		})
	}
}

// A path that loses every fifth probe neither goes down when it is up, nor comes up when
// it was down.
func TestLossDoesNotFlap(t *testing.T) {
	if emulated(t) {
		return
	}
	a, b := pair(t)
	lossy := func(rule string) {
		b.Run("nft", "flush ruleset\ntable inet t { chain c { type filter hook input priority 0; "+rule+"; }; }")
	}
	lossy("icmp type echo-request numgen inc mod 5 == 0 drop")
	r := start(t, a, probe.Target{Name: "p", Address: addr("192.0.2.2")})
	time.Sleep(25 * interval)
	if got := r.transitions("p"); got != "up" {
		t.Errorf("every fifth lost: told %q", got)
	}
	lossy("icmp type echo-request drop")
	r.await("p", probe.Down, 20*interval)
	lossy("icmp type echo-request numgen inc mod 5 == 0 drop")
	time.Sleep(25 * interval)
	if got := r.transitions("p"); got != "up down" {
		t.Errorf("still every fifth lost: told %q", got)
	}
	lossy("accept")
	r.await("p", probe.Up, 30*interval)
}

// The probe tests the link that it is told, with the source that it is told, whatever
// the routes say.
func TestThroughALink(t *testing.T) {
	if emulated(t) {
		return
	}
	l := labtest.New(t, "nft")
	a, b := l.Host("a"), l.Host("b")
	a.Sysctl("net/ipv6/conf/default/accept_dad", "0") // else link-local addresses take 2 s
	b.Sysctl("net/ipv6/conf/default/accept_dad", "0")
	for i, link := range []string{"path0", "path1"} {
		l.Connect(a, link, fmt.Sprintf("192.0.2.%d/32 2001:db8::%d/128", 1+i, 1+i), b, link, "")
		b.IP("route", "add", fmt.Sprintf("192.0.2.%d/32", 1+i), "dev", link)
		b.IP("-6", "route", "add", fmt.Sprintf("2001:db8::%d/128", 1+i), "dev", link)
		b.IP("addr", "add", "2001:db8::9/128", "dev", link, "nodad") // IPv6 answers only for the link's own
	}
	b.IP("addr", "add", "192.0.2.9/32", "dev", "lo")
	for _, link := range []string{"path0", "path1"} { // path0 is preferred
		a.IP("route", "add", "192.0.2.9/32", "dev", link, "metric", link[4:]+"1")
		a.IP("-6", "route", "add", "2001:db8::9/128", "dev", link, "metric", link[4:]+"1")
	}
	var targets []probe.Target
	for _, remote := range []string{"192.0.2.9", "2001:db8::9"} {
		for i, link := range []string{"path0", "path1"} {
			t := probe.Target{Name: link + " " + remote, Address: addr(remote), Link: link}
			if t.Address.Is4() {
				t.Source = addr(fmt.Sprintf("192.0.2.%d", 1+i))
			}
			targets = append(targets, t)
		}
	}
	// Answered only for the one source, which is not the one that the kernel would choose.
	a.IP("addr", "add", "192.0.2.3/32", "dev", "lo")
	a.IP("addr", "add", "2001:db8::3/128", "dev", "lo")
	b.IP("route", "add", "192.0.2.3/32", "dev", "path0")
	b.IP("-6", "route", "add", "2001:db8::3/128", "via", "2001:db8::1", "dev", "path0")
	b.Run("nft", "table inet s { chain c { type filter hook input priority 0; "+
		"ip daddr 192.0.2.8 ip saddr != 192.0.2.3 drop; ip6 daddr 2001:db8::8 icmpv6 type echo-request ip6 saddr != 2001:db8::3 drop; }; }")
	for _, remote := range []string{"192.0.2.8", "2001:db8::8"} {
		b.IP("addr", "add", remote, "dev", "path0", "nodad")
		a.IP("route", "add", remote, "dev", "path0")
		source := addr("192.0.2.3")
		if strings.Contains(remote, ":") {
			source = addr("2001:db8::3")
		}
		targets = append(targets, probe.Target{Name: remote, Address: addr(remote), Source: source})
	}
	targets = append(targets, probe.Target{Name: "none", Address: addr("192.0.2.9"), Link: "path7"})
	r := start(t, a, targets...)
	for _, x := range targets[:6] {
		r.await(x.Name, probe.Up, 40*interval)
	}
	b.Run("nft", "table inet t { chain c { type filter hook input priority 0; iifname path1 icmp type echo-request drop; iifname path1 icmpv6 type echo-request drop; }; }")
	r.await("path1 192.0.2.9", probe.Down, 20*interval)
	r.await("path1 2001:db8::9", probe.Down, 20*interval)
	for _, name := range []string{"path0 192.0.2.9", "path0 2001:db8::9"} {
		if s := r.health(name); s.Health != probe.Up {
			t.Errorf("%+v", s)
		}
	}
	if s := r.health("none"); s.Health != probe.Down || s.Err == nil || !strings.Contains(s.Err.Error(), "link path7") {
		t.Errorf("a link that is not there: %+v", s)
	}
}

func TestSet(t *testing.T) {
	a, _ := pair(t)
	x := probe.Target{Name: "x", Address: addr("192.0.2.2")}
	r := start(t, a, x)
	r.await("x", probe.Up, 20*interval)
	before := r.health("x").Since
	set := func(want int, targets ...probe.Target) error {
		t.Helper()
		n, err := r.Set(t.Context(), targets)
		if n != want {
			t.Errorf("%d changes, want %d", n, want)
		}
		return err
	}
	y := probe.Target{Name: "y", Address: addr("2001:db8::2")}
	if err := set(1, x, y); err != nil {
		t.Error(err)
	}
	if err := set(0, y, x); err != nil {
		t.Error(err)
	}
	if s := r.health("x"); s.Health != probe.Up || s.Since != before {
		t.Errorf("an unchanged target lost its status: %+v", s)
	}
	r.await("y", probe.Up, 20*interval)
	for say, bad := range map[string]probe.Target{
		"two targets have this name": x,
		"not an IPv4 or IPv6":        {Name: "bad", Address: addr("::ffff:192.0.2.2")},
		"not both for IPv6":          {Name: "bad", Address: addr("2001:db8::2"), Source: addr("2001:db8::1"), Link: "eth0"},
		"different families":         {Name: "bad", Address: addr("192.0.2.2"), Source: addr("::1")},
	} {
		if err := set(0, x, y, bad); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%v, want %q", err, say)
		}
	}
	x.Address = addr("192.0.2.77")
	if err := set(2, x); err != nil {
		t.Error(err)
	}
	if s := r.health("x"); s.Health != probe.Unknown {
		t.Errorf("another address kept the status: %+v", s)
	}
	if got := r.Observe(); len(got) != 1 {
		t.Errorf("%+v", got)
	}
	r.await("x", probe.Down, 20*interval)
}

func TestThousandTargets(t *testing.T) {
	if emulated(t) {
		return
	}
	a, b := pair(t)
	b.IP("route", "add", "local", "10.9.0.0/16", "dev", "lo")
	b.IP("-6", "route", "add", "local", "fd09::/64", "dev", "lo")
	a.IP("route", "add", "10.9.0.0/16", "via", "192.0.2.2")
	a.IP("-6", "route", "add", "fd09::/64", "via", "2001:db8::2")
	var targets []probe.Target
	for i := range 500 {
		targets = append(targets,
			probe.Target{Name: fmt.Sprintf("four-%d", i), Address: addr(fmt.Sprintf("10.9.%d.%d", i/250, i%250))},
			probe.Target{Name: fmt.Sprintf("six-%d", i), Address: addr(fmt.Sprintf("fd09::%x", i+1))})
	}
	var r *probe.Prober
	a.Do(func() (err error) {
		r, err = probe.New(probe.Options{})
		return err
	})
	if _, err := r.Set(t.Context(), targets); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2200*time.Millisecond)
	defer cancel()
	before := cpu(t)
	if err := r.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	used := cpu(t) - before
	var rtts []time.Duration
	var sent, received uint64
	for _, s := range r.Observe() {
		if s.Health != probe.Up {
			t.Fatalf("%+v", s)
		}
		sent, received = sent+s.Sent, received+s.Received
		rtts = append(rtts, s.RTT)
	}
	slices.Sort(rtts)
	t.Logf("1,000 targets, 2.2 s: %d probes, %d answers, RTT p50 %s p99 %s, CPU %s", sent, received, rtts[500], rtts[990], used)
	if sent < 4000 || sent > 4500 || received < sent*98/100 {
		t.Errorf("%d probes, %d answers", sent, received)
	}
}
