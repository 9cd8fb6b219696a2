package jobs_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// killProcess ends a program of a pod without a word: the pod's processes are this
// machine's, in control groups that bear the pod's UID.
func (s *site) killProcess(uid, program string) error {
	all, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return err
	}
	for _, path := range all {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), uid) {
			continue
		}
		dir := filepath.Dir(path)
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue
		}
		args := bytes.Split(line, []byte{0})
		if filepath.Base(string(args[0])) != program || bytes.Contains(line, []byte("ipsec-daemon")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return err
		}
		return syscall.Kill(pid, syscall.SIGKILL)
	}
	return fmt.Errorf("pod %s has no process %s", uid, program)
}
