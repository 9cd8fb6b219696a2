package cluster_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// traces lists what is on this machine of clusters whose names begin as given:
// directories, network namespaces, mounts, processes, and control groups, which stay as
// long as a process of a node lives.
func traces(t *testing.T, name string) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"/run/cvk-" + name + "*", "/run/netns/cvk-" + name + "*", "/sys/fs/cgroup/*/cvk-" + name + "*"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, paths...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "cvk-"+name) {
			found = append(found, "mount "+line)
		}
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		line, err := os.ReadFile(dir + "/cmdline")
		environ, _ := os.ReadFile(dir + "/environ")
		if err == nil && dir != fmt.Sprintf("/proc/%d", os.Getpid()) && strings.Contains(string(line)+string(environ), "cvk-"+name) {
			found = append(found, "process "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}

// A cluster whose process is killed while it starts is removed without a
// trace by the next one's start, and that one by Stop.
func TestRemove(t *testing.T) {
	labtest.Require(t)
	if err := cluster.Check(); err != nil {
		labtest.Skip(t, err.Error())
	}
	program := filepath.Join(t.TempDir(), "cluster")
	if out, err := exec.Command("go", "build", "-o", program, "../../hack/cluster").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	name := fmt.Sprintf("r%dx", os.Getpid()) // the beginning of no other name
	t.Cleanup(func() {
		if err := cluster.Remove(name); err != nil {
			t.Error(err)
		}
	})
	for _, step := range []string{"nodes:", "waiting"} {
		killAt(t, step, program, "up", "-name", name, "-keep=false")
		// Part of it is running, and no process knows of it.
		if len(traces(t, name)) == 0 {
			t.Fatalf("killed at %q the cluster has left nothing: the test is blind", step)
		}
		if err := cluster.Sweep(); err != nil {
			t.Fatal(err)
		}
		if left := gone(t, name); len(left) > 0 {
			t.Errorf("killed at %q, it left:\n%s", step, strings.Join(left, "\n"))
		}
	}

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	c, err := cluster.Start(ctx, cluster.Options{Name: name, Nodes: 1})
	if err != nil {
		t.Fatal(err)
	}
	// What lives longest: a process that ignores signals, and a busy mount.
	hog := c.Nodes[0].Enter(ctx, "bash", "-c", "trap '' TERM INT HUP; mount -t tmpfs none /var/tmp; cd /var/tmp; echo; sleep 1000 & wait; wait")
	if err := hog.Start(); err != nil {
		t.Fatal(err)
	}
	// And what is outside of all its namespaces.
	proxy := make(chan error, 1)
	go func() {
		_, err := c.Kubectl(ctx, "proxy", "--port=0")
		proxy <- err
	}()
	labtest.Eventually(t, 20*time.Second, "kubectl runs", func() error {
		if !slices.ContainsFunc(traces(t, name), func(s string) bool { return strings.Contains(s, "kubectl proxy") }) {
			return errors.New("not yet")
		}
		return nil
	})
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-proxy:
		if err == nil {
			t.Error("a kubectl of the cluster's ended by itself, not by being killed")
		}
	case <-time.After(5 * time.Second):
		t.Error("a kubectl of the cluster's lives on")
	}
	if err := hog.Wait(); err == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Errorf("a process of the node ended with %v, not by being killed", err)
	}
	if left := gone(t, name); len(left) > 0 {
		t.Errorf("Stop left:\n%s", strings.Join(left, "\n"))
	}
}

// gone waits a little for the last processes to be collected and returns what stays.
func gone(t *testing.T, name string) []string {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left := traces(t, name)
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// killAt runs a program and kills it, and it alone, a moment after it printed a line with
// the given text.
func killAt(t *testing.T, text string, program string, args ...string) {
	t.Helper()
	cmd := exec.Command(program, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for s := bufio.NewScanner(out); s.Scan(); {
		lines = append(lines, s.Text())
		if strings.Contains(s.Text(), text) {
			time.Sleep(time.Second)
			_ = cmd.Process.Signal(syscall.SIGKILL)
			break
		}
	}
	_ = cmd.Wait()
	if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, text) }) {
		t.Fatalf("it did not come to %q:\n%s", text, strings.Join(lines, "\n"))
	}
}
