package route_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/route"
)

func TestSysctls(t *testing.T) {
	h := host(t)
	r := open(t, h)
	want := []netstate.Sysctl{{Path: "net/ipv4/ip_forward", Value: "1"}, {Path: "net/ipv4/ip_local_port_range", Value: "20000 40000"}}
	set := func(r *route.Route, want []netstate.Sysctl) (n int, err error) {
		_ = h.Host.Do(func() error {
			n, err = r.SetSysctls(context.Background(), want)
			return nil
		})
		return n, err
	}
	if n, err := set(r, want); n != 2 || err != nil {
		t.Errorf("%d changes, %v", n, err)
	}
	if n, err := set(r, want); n != 0 || err != nil {
		t.Errorf("second time: %d changes, %v", n, err)
	}
	if got := h.Run("cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/ip_local_port_range"); got != "1\n20000\t40000\n" {
		t.Errorf("%q", got)
	}
	for path, say := range map[string]string{"net/ipv4/no_such": "sysctl net.ipv4.no_such: this kernel does not have it", "../etc/passwd": "not a path below"} {
		if _, err := set(r, []netstate.Sysctl{{Path: path, Value: "1"}}); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestReadOnlySysctlIsFineWhenRight(t *testing.T) {
	labtest.Require(t, "mount", "umount")
	h := host(t)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "net/ipv4"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "net/ipv4/ip_forward"), []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// In a mount namespace of the thread's own, which ends with it.
	h.Do(func() error {
		if err := readOnly(dir); err != nil {
			return err
		}
		r, err := route.New(route.Options{SysctlDir: dir})
		if err != nil {
			return err
		}
		defer func() { _ = r.Detach() }()
		if n, err := r.SetSysctls(context.Background(), []netstate.Sysctl{{Path: "net/ipv4/ip_forward", Value: "1"}}); n != 0 || err != nil {
			t.Errorf("%d changes, %v", n, err)
		}
		_, err = r.SetSysctls(context.Background(), []netstate.Sysctl{{Path: "net/ipv4/ip_forward", Value: "0"}})
		if err == nil || !strings.Contains(err.Error(), "sysctl net.ipv4.ip_forward is 1 and cannot be written: set it to 0 from outside") {
			t.Errorf("%v", err)
		}
		return nil
	})
}
