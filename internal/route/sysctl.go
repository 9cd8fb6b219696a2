package route

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// SetSysctls writes the kernel settings whose value differs, in the network namespace of
// the calling thread. A read-only /proc/sys is fine as long as the values are right
// already. Settings are never turned back, neither by Close nor when they leave the
// desired state: nobody can tell who else relies on them.
func (r *Route) SetSysctls(ctx context.Context, want []netstate.Sysctl) (changed int, err error) {
	var errs failures
	for _, s := range want {
		if err := ctx.Err(); err != nil {
			return changed, err
		}
		wrote, err := r.setSysctl(s)
		if err != nil {
			errs.add(err)
		}
		if wrote {
			changed++
		}
	}
	return changed, errs.join()
}

func (r *Route) setSysctl(s netstate.Sysctl) (wrote bool, err error) {
	name := strings.ReplaceAll(s.Path, "/", ".")
	if !filepath.IsLocal(s.Path) {
		return false, fmt.Errorf("sysctl %s: not a path below %s", s.Path, r.options.SysctlDir)
	}
	path := filepath.Join(r.options.SysctlDir, s.Path)
	have, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("sysctl %s: this kernel does not have it, or its part of the kernel is off: %w", name, err)
	case err != nil:
		return false, fmt.Errorf("sysctl %s: %w", name, err)
	}
	if sameFields(string(have), s.Value) {
		return false, nil
	}
	if err := os.WriteFile(path, []byte(s.Value), 0); err != nil {
		if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
			return false, fmt.Errorf("sysctl %s is %s and cannot be written: set it to %s from outside (a pod: securityContext.sysctls or the node's agent; a host: sysctl -w %s=%s): %w",
				name, strings.TrimSpace(string(have)), s.Value, name, s.Value, err)
		}
		return false, fmt.Errorf("sysctl %s: write %s: %w", name, s.Value, err)
	}
	return true, nil
}

// sameFields compares values as the kernel does: tabs, blanks and newlines are equal.
func sameFields(a, b string) bool {
	return strings.Join(strings.Fields(a), " ") == strings.Join(strings.Fields(b), " ")
}
