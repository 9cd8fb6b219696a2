// Package lab builds small networks out of network namespaces, for the demo and for
// tests that need real packets.
//
// All traffic stays inside namespaces that a Lab made. Every namespace's name starts
// with the lab's prefix, so that Remove finds what an earlier, killed process left.
// It needs root and iproute2's ip(8).
package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

const runDir = "/run/netns"

// Lab is a set of namespaces that are made and removed together.
type Lab struct {
	prefix string
	// Congestion is the TCP congestion control of hosts, the first that may be set; empty: the machine's.
	Congestion []string

	mu    sync.Mutex
	hosts []*Host
}

// Host is one network namespace: a machine of the lab. Its loopback link is up.
type Host struct {
	Name string // as given to Lab.Host
	// Namespace is its name for ip(8): "ip netns exec NAMESPACE …".
	Namespace string
}

// New makes an empty lab whose namespaces start with prefix. A lab of that prefix that
// an earlier process left is removed first.
func New(prefix string) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("network namespaces need root")
	}
	if err := Remove(prefix); err != nil {
		return nil, err
	}
	return &Lab{prefix: prefix}, nil
}

// NewUnique makes an empty lab with a prefix that no other process uses, and removes
// the labs of processes that are gone.
func NewUnique(name string) (*Lab, error) {
	sweep()
	return New(fmt.Sprintf("cvt%d-%s", os.Getpid(), name))
}

// sweep removes the namespaces of NewUnique labs whose process is gone.
func sweep() {
	entries, _ := os.ReadDir(runDir)
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), "cvt")
		if !ok {
			continue
		}
		pid, _, ok := strings.Cut(rest, "-")
		if n, err := strconv.Atoi(pid); ok && err == nil && syscall.Kill(n, 0) == syscall.ESRCH {
			_ = removeNamespace(e.Name())
		}
	}
}

// Remove ends all processes in the namespaces of the given prefix and deletes them.
func Remove(prefix string) error {
	entries, err := os.ReadDir(runDir)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix+"-") {
			errs = append(errs, removeNamespace(e.Name()))
		}
	}
	return errors.Join(errs...)
}

func removeNamespace(name string) error {
	for range 50 {
		pids := processes(name)
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return run("ip", "netns", "delete", name)
}

// processes lists the processes in a namespace by comparing /proc/PID/ns/net with its
// file; threads of this process that visit the namespace are not among them.
func processes(name string) []int {
	want, err := os.Stat(filepath.Join(runDir, name))
	if err != nil {
		return nil
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	var pids []int
	for _, d := range dirs {
		pid, _ := strconv.Atoi(strings.Split(d, "/")[2])
		if st, err := os.Stat(d); err == nil && pid != os.Getpid() && os.SameFile(st, want) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Remove ends all processes in the namespace and deletes it.
func (h *Host) Remove() error { return removeNamespace(h.Namespace) }

// Close ends all processes in the lab's namespaces and deletes them.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hosts = nil
	return Remove(l.prefix)
}

// Host makes a namespace.
func (l *Lab) Host(name string) (*Host, error) {
	h := &Host{Name: name, Namespace: l.prefix + "-" + name}
	if err := run("ip", "netns", "add", h.Namespace); err != nil {
		return nil, err
	}
	if err := h.IP("link", "set", "lo", "up"); err != nil {
		return nil, err
	}
	for _, c := range l.Congestion {
		if h.Sysctl(congestion, c) == nil {
			break
		}
	}
	l.mu.Lock()
	l.hosts = append(l.hosts, h)
	l.mu.Unlock()
	return h, nil
}

// Connect joins two hosts by a veth pair; the addresses ("192.0.2.1/24", several
// separated by blanks, may be empty) are set and both ends are up.
func (l *Lab) Connect(a *Host, linkA, addrA string, b *Host, linkB, addrB string) error {
	if err := a.IP("link", "add", linkA, "type", "veth", "peer", "name", linkB, "netns", b.Namespace); err != nil {
		return err
	}
	// Both ends first: IPv6 addresses that are set before the link has a carrier answer
	// late.
	if err := errors.Join(a.Up(linkA, ""), b.Up(linkB, "")); err != nil {
		return err
	}
	return errors.Join(a.Up(linkA, addrA), b.Up(linkB, addrB))
}

// Up brings a link up and sets addresses (separated by blanks; IPv6 without duplicate
// detection) on it.
func (h *Host) Up(link, addrs string) error {
	if err := h.IP("link", "set", link, "up"); err != nil {
		return err
	}
	for _, a := range strings.Fields(addrs) {
		args := []string{"addr", "add", a, "dev", link}
		if strings.Contains(a, ":") {
			args = append(args, "nodad")
		}
		if err := h.IP(args...); err != nil {
			return err
		}
	}
	return nil
}

// IP runs ip(8) for the host.
func (h *Host) IP(args ...string) error {
	return run("ip", append([]string{"-n", h.Namespace}, args...)...)
}

const congestion = "net/ipv4/tcp_congestion_control"

// Congestion is the TCP congestion control that the host has; empty: it cannot be read.
func (h *Host) Congestion() (name string) {
	_ = h.Do(func() error {
		b, err := os.ReadFile("/proc/sys/" + congestion)
		name = strings.TrimSpace(string(b))
		return err
	})
	return name
}

// Sysctl writes a setting given as a path below /proc/sys with slashes.
func (h *Host) Sysctl(path, value string) error {
	return h.Do(func() error { return os.WriteFile("/proc/sys/"+path, []byte(value), 0) })
}

// Do runs f on a thread of its own inside the namespace. Sockets and netlink handles
// that f opens stay in the namespace; goroutines that it starts do not.
func (h *Host) Do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so that no other goroutine
		// finds itself in the namespace.
		runtime.LockOSThread()
		result <- h.enter(f)
	}()
	return <-result
}

func (h *Host) enter(f func() error) error {
	ns, err := netns.GetFromName(h.Namespace)
	if err != nil {
		return fmt.Errorf("namespace %s: %w", h.Namespace, err)
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("enter namespace %s: %w", h.Namespace, err)
	}
	return f()
}

// Command prepares a program that runs in the namespace when started by Start or Run.
// It is killed, with its process group, when ctx ends.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// Start starts a prepared program in the namespace; the caller waits for it.
func (h *Host) Start(cmd *exec.Cmd) error { return h.Do(cmd.Start) }

// Output runs a program in the namespace to its end and returns what it printed on both
// streams; the error names the command and its output.
func (h *Host) Output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := h.Command(ctx, name, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := h.Start(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("%s in %s: %w: %s", strings.Join(cmd.Args, " "), h.Name, err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
