package netlab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// What a new user sees first works, and leaves nothing behind.
func TestDemo(t *testing.T) {
	labtest.Require(t, "ip", "nft", "wg", "wireguard-go", "charon-systemd", "swanctl")
	name := fmt.Sprintf("cvt%d-demo", os.Getpid())
	out, err := exec.Command(program, "demo", "--name", name).CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	m := regexp.MustCompile(`^demo: (\d+)/(\d+) paths as expected$`).FindStringSubmatch(lines[len(lines)-1])
	if m == nil || m[1] != m[2] || strings.Contains(string(out), "WRONG") {
		t.Errorf("the last line is %q", lines[len(lines)-1])
	}
	left, _ := filepath.Glob("/run/netns/" + name + "*")
	if _, err := os.Stat("/run/" + name); err == nil || len(left) > 0 {
		t.Errorf("left behind: %v, /run/%s: %v", left, name, err)
	}
	if procs, _ := exec.Command("pgrep", "-f", name).Output(); len(procs) > 0 {
		t.Errorf("processes left behind: %s", procs)
	}
}
