// Package labtest gives tests a lab that cleans up after itself.
package labtest

import (
	"context"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// Lab is a lab.Lab whose errors end the test.
type Lab struct {
	*lab.Lab
	t testing.TB
}

var unsafe = regexp.MustCompile(`[^A-Za-z0-9]+`)

// New makes a lab for one test and removes it at its end. Without root, or without one
// of the named programs, the test is skipped with the reason; with CI=true it fails.
func New(t testing.TB, programs ...string) *Lab {
	t.Helper()
	Require(t, append([]string{"ip"}, programs...)...)
	l, err := lab.NewUnique(unsafe.ReplaceAllString(t.Name(), "_"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("remove the lab: %v", err)
		}
	})
	return &Lab{Lab: l, t: t}
}

// Require skips the test without root or without one of the named programs; with
// CI=true it fails instead.
func Require(t testing.TB, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			Skip(t, "needs the program "+p)
		}
	}
}

// Skip skips the test with a reason; with CI=true it fails: there nothing may be left out.
func Skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("would SKIP, but CI=true: %s", why)
	}
	t.Skipf("SKIP: %s", why)
}

// Goal is what a figure of speed must reach: the goal itself when CULVERT_GOALS is set
// (make speed), which wants a machine that does nothing else; otherwise a guard against
// getting much worse, that neighbours on the machine do not turn red.
func Goal(goal, guard float64) float64 {
	if os.Getenv("CULVERT_GOALS") != "" {
		return goal
	}
	return guard
}

// Decisive is the ratio of several rounds that counts against a Goal: their median where the
// goal itself is asked for, otherwise the best one, as better says. What has become much
// worse is so in each round; what a neighbour on the machine spoils is not. There must be
// one round at least.
func Decisive(ratios []float64, better func(a, b float64) bool) float64 {
	sorted := slices.Clone(ratios)
	slices.SortFunc(sorted, func(a, b float64) int {
		switch {
		case better(a, b):
			return -1
		case better(b, a):
			return 1
		}
		return 0
	})
	if os.Getenv("CULVERT_GOALS") != "" {
		return sorted[len(sorted)/2]
	}
	return sorted[0]
}

// Settled says that further rounds cannot change what Decisive says: the best one counts, and has
// reached want already. It is false where the goal itself is asked for, and without a round.
func Settled(ratios []float64, want float64, better func(a, b float64) bool) bool {
	return os.Getenv("CULVERT_GOALS") == "" && len(ratios) > 0 && !better(want, Decisive(ratios, better))
}

// Host makes a namespace.
func (l *Lab) Host(name string) *Host {
	l.t.Helper()
	h, err := l.Lab.Host(name)
	if err != nil {
		l.t.Fatal(err)
	}
	return &Host{Host: h, t: l.t}
}

// Connect joins two hosts by a veth pair, see lab.Lab.Connect.
func (l *Lab) Connect(a *Host, linkA, addrA string, b *Host, linkB, addrB string) {
	l.t.Helper()
	if err := l.Lab.Connect(a.Host, linkA, addrA, b.Host, linkB, addrB); err != nil {
		l.t.Fatal(err)
	}
}

// Host is a lab.Host whose errors end the test.
type Host struct {
	*lab.Host
	t testing.TB
}

// IP runs ip(8) for the host.
func (h *Host) IP(args ...string) {
	h.t.Helper()
	if err := h.Host.IP(args...); err != nil {
		h.t.Fatal(err)
	}
}

// Sysctl writes a setting given as a path below /proc/sys with slashes.
func (h *Host) Sysctl(path, value string) {
	h.t.Helper()
	if err := h.Host.Sysctl(path, value); err != nil {
		h.t.Fatal(err)
	}
}

// Do runs f inside the namespace and ends the test when it fails.
func (h *Host) Do(f func() error) {
	h.t.Helper()
	if err := h.Host.Do(f); err != nil {
		h.t.Fatal(err)
	}
}

// Run runs a program to its end (30 s at most) and returns its output; failure ends the
// test.
func (h *Host) Run(name string, args ...string) string {
	h.t.Helper()
	out, err := h.Try(name, args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// Try runs a program to its end (30 s at most) and returns its output and error.
func (h *Host) Try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return h.Output(ctx, name, args...)
}

// Background starts a program that is killed at the end of the test; its output goes to
// a file whose path is returned.
func (h *Host) Background(name string, args ...string) (cmd *exec.Cmd, log string) {
	h.t.Helper()
	f, err := os.CreateTemp(h.t.TempDir(), h.Name+"-*.log")
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cmd = h.Command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = f, f
	if err := h.Start(cmd); err != nil {
		cancel()
		h.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	h.t.Cleanup(func() { cancel(); <-done })
	return cmd, f.Name()
}

// Eventually calls f every 50 ms until it returns nil; after the time-out the test ends
// with f's last error. In the emulated machine of test/kernel it waits four times as long.
func Eventually(t testing.TB, timeout time.Duration, what string, f func() error) {
	t.Helper()
	if os.Getenv("CULVERT_KERNEL") == "1" {
		timeout *= 4
	}
	deadline := time.Now().Add(timeout)
	for {
		began := time.Now()
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, timeout, err)
		}
		// What costs more, such as kubectl, is asked less often.
		time.Sleep(min(max(time.Since(began), 50*time.Millisecond), 250*time.Millisecond))
	}
}
