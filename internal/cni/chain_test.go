package cni

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const owners = `{"cniVersion": "1.0.0", "name": "pods", "mtu": 12345678901234567890,
"plugins": [{"type": "bridge", "ipam": {"type": "host-local"}}, {"type": "portmap"}]}`

// host is a node's file system.
type host struct {
	t    *testing.T
	root string
	*Chain
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, root: t.TempDir()}
	program := filepath.Join(t.TempDir(), Plugin)
	for _, dir := range []string{"etc/cni/net.d", "opt/cni/bin"} {
		if err := os.MkdirAll(filepath.Join(h.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{program, filepath.Join(h.root, "opt/cni/bin/bridge"), filepath.Join(h.root, "opt/cni/bin/ptp")} {
		if err := os.WriteFile(file, []byte("program 1"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.Chain = New(Options{Root: h.root, ConfigDir: "/etc/cni/net.d", BinDir: "/opt/cni/bin", Program: program, State: "/var/lib/culvert-agent"})
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func (h *host) path(name string) string { return filepath.Join(h.root, "etc/cni/net.d", name) }

func (h *host) write(name, text string) {
	h.t.Helper()
	if err := os.WriteFile(h.path(name), []byte(text), 0o640); err != nil {
		h.t.Fatal(err)
	}
}

// set sets twice: the second time changes nothing.
func (h *host) set(want bool, changes int) {
	h.t.Helper()
	for _, n := range []int{changes, 0} {
		if got, err := h.Set(want); got != n || err != nil {
			h.t.Fatalf("Set(%v): %d changes, %v; want %d", want, got, err, n)
		}
	}
}

// plugins is what the runtime would call: libcni takes the first file.
func (h *host) plugins() (list []string) {
	h.t.Helper()
	entries, err := os.ReadDir(h.path(""))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) {
			continue
		}
		data, err := os.ReadFile(h.path(e.Name()))
		if err != nil {
			h.t.Fatal(err)
		}
		var c struct {
			Name    string
			Type    string
			Plugins []struct {
				Type string
				MTU  int
			}
		}
		if err := json.Unmarshal(data, &c); err != nil {
			h.t.Fatalf("%s: %v", e.Name(), err)
		}
		if c.Name != "pods" {
			h.t.Errorf("%s: the network is called %q", e.Name(), c.Name)
		}
		if c.Type != "" {
			return []string{c.Type}
		}
		for _, p := range c.Plugins {
			list = append(list, p.Type)
		}
		return list
	}
	return nil
}

func (h *host) calls(want ...string) {
	h.t.Helper()
	if got := h.plugins(); !slices.Equal(got, want) {
		h.t.Fatalf("the runtime calls %v, want %v", got, want)
	}
}

// What the owner wrote is followed and never touched; without ours it is what it was.
func TestFollowsTheOwner(t *testing.T) {
	h := newHost(t)
	h.write("10-pods.conflist", owners)
	h.set(false, 0)
	h.calls("bridge", "portmap")
	h.set(true, 2) // program and configuration
	h.calls("bridge", "portmap", Plugin)
	if data, _ := os.ReadFile(h.path(File)); !strings.Contains(string(data), "12345678901234567890") {
		t.Errorf("a number was changed: %s", data)
	}
	if st, err := os.Stat(h.path(File)); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v: want the owner's mode", st.Mode(), err)
	}

	h.write("10-pods.conflist", strings.Replace(owners, `, {"type": "portmap"}`, "", 1))
	select {
	case <-h.Changes():
	case <-time.After(5 * time.Second):
		t.Error("a change was not reported")
	}
	h.set(true, 1)
	h.calls("bridge", Plugin)

	// Another network plug-in, in the old form.
	h.write("05-other.conf", `{"cniVersion": "0.3.1", "name": "pods", "type": "ptp"}`)
	h.set(true, 1)
	h.calls("ptp", Plugin)
	if err := os.Remove(h.path("05-other.conf")); err != nil {
		t.Fatal(err)
	}
	h.set(true, 1)
	h.calls("bridge", Plugin)

	h.set(false, 1)
	h.calls("bridge")
	if left, _ := filepath.Glob(h.path("*culvert*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Stat(filepath.Join(h.root, "opt/cni/bin", Plugin)); err != nil {
		t.Errorf("the program must stay: pods that it let in are still there: %v", err)
	}
}

// Half a file, and none, of the owner's: the runtime never sees nonsense, and never ours
// alone.
func TestOwnerInTheMiddle(t *testing.T) {
	h := newHost(t)
	fails := func(what string) {
		t.Helper()
		if n, err := h.Set(true); err == nil || n != 0 || !strings.Contains(err.Error(), what) {
			t.Fatalf("%d changes, %v; want an error that says %q", n, err, what)
		}
	}
	fails("has no network configuration")
	h.write("10-pods.conflist", owners)
	h.set(true, 2)
	h.write("10-pods.conflist", owners[:40])
	fails("is no network configuration")
	h.calls("bridge", "portmap", Plugin)
	h.write("10-pods.conflist", `{"name": "pods"}`)
	fails("names no plug-ins")
	h.calls("bridge", "portmap", Plugin)
	if err := os.Remove(h.path("10-pods.conflist")); err != nil {
		t.Fatal(err)
	}
	fails("has no network configuration")
	h.calls()
	h.write("00-first.conflist", strings.Replace(owners, "bridge", "elsewhere", 1))
	fails(`has no program "elsewhere"`)
	h.calls("elsewhere", "portmap")
	h.write("00-first.conflist", owners)
	h.set(true, 1)
	h.write("00-first.conflist", strings.Replace(owners, "bridge", "elsewhere", 1))
	fails(`has no program "elsewhere"`)
	h.calls("elsewhere", "portmap")
	h.write("00-first.conflist", owners)
	h.set(true, 1)
	h.write("!.conflist", owners)
	fails("comes before")
}

// Others may put plug-ins of their own into our file; a program that somebody replaced or
// removed is installed again.
func TestRepairs(t *testing.T) {
	h := newHost(t)
	h.write("10-pods.conflist", owners)
	h.set(true, 2)
	data, _ := os.ReadFile(h.path(File))
	h.write(File, strings.Replace(string(data), `"portmap"
    },`, `"portmap"
    }, {"type": "mesh"},`, 1))
	h.calls("bridge", "portmap", "mesh", Plugin)
	h.set(true, 0)
	h.write(File, owners)
	h.set(true, 1)
	h.calls("bridge", "portmap", Plugin)
	program := filepath.Join(h.root, "opt/cni/bin", Plugin)
	if err := os.WriteFile(program, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.set(true, 1)
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	h.set(true, 1)
	if st, err := os.Stat(program); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st, err)
	}
	// Without the program nothing may name it.
	h.set(false, 1)
	if err := os.Remove(h.opts.Program); err != nil {
		t.Fatal(err)
	}
	if n, err := h.Set(true); err == nil || n != 0 {
		t.Errorf("%d changes, %v; want an error", n, err)
	}
	h.calls("bridge", "portmap")
}
