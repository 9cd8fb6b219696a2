package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// Remove removes all of a cluster: its processes, mounts, namespaces, control groups and
// files, whoever started it and however far that came. A cluster that is not there is no
// error.
func Remove(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("cluster name %q: want up to ten of a-z and 0-9, a letter first", name)
	}
	killMarked(name)
	// A node's first process is in the node's network namespace; with it go all processes
	// of the node, and with them its mounts.
	if err := lab.Remove(prefix(name)); err != nil {
		return err
	}
	if err := removeGroups(prefix(name)); err != nil {
		return err
	}
	if err := unmount(directory(name)); err != nil {
		return err
	}
	return os.RemoveAll(directory(name))
}

// mark is an entry in the environment of every process that is started for a cluster. By it
// those are found that run in none of the cluster's namespaces: the forwarder to
// kube-apiserver, and what a starter that was killed leaves half done, kubectl or a build, which
// would make the cluster's directory again.
func mark(name string) string { return "CULVERT_LAB_CLUSTER=" + prefix(name) }

// killMarked ends the processes that carry a cluster's mark, and waits until they are gone.
func killMarked(name string) {
	for range 100 {
		pids := marked(name)
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func marked(name string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, file := range files {
		b, err := os.ReadFile(file) // empty once it has ended
		if err != nil || !slices.Contains(strings.Split(string(b), "\x00"), mark(name)) {
			continue
		}
		if pid, err := strconv.Atoi(strings.Split(file, "/")[2]); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// removeGroups removes the control groups at a path of every hierarchy, and kills what is
// still in them.
func removeGroups(path string) error {
	var errs []error
	for _, pattern := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
		roots, _ := filepath.Glob(pattern + path)
		for _, root := range roots {
			errs = append(errs, removeGroup(root))
		}
	}
	return errors.Join(errs...)
}

func removeGroup(root string) error {
	var err error
	for range 100 {
		var dirs []string
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // what vanished meanwhile is as good as removed
		})
		err = nil
		for _, dir := range slices.Backward(dirs) {
			killGroup(dir)
			if e := syscall.Rmdir(dir); e != nil && !errors.Is(e, fs.ErrNotExist) {
				err = fmt.Errorf("remove control group %s: %w", dir, e)
			}
		}
		if err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

func killGroup(dir string) {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	for _, line := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 1 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// unmount detaches what is mounted below a directory, so that removing it removes
// nothing else. The nodes' mounts are in namespaces of their own; there should be none.
func unmount(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	for _, p := range slices.Backward(points) {
		if err := syscall.Unmount(p, syscall.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", p, err)
		}
	}
	return nil
}
