package operator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// program is one run of "culvert operator" with the rights of its service account.
type program struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  string
	http string
}

// startOperator starts one; it is ended with the test.
func startOperator(t *testing.T, args ...string) *program {
	t.Helper()
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	p := &program{t: t, http: "127.0.0.1:" + strconv.Itoa(ports[0])}
	log, err := os.CreateTemp(shared.dir, "operator-*.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.log = log.Name()
	args = append([]string{
		"operator", "--kubeconfig", shared.asOperator, "--namespace", namespace, "--image", "culvert:test", "--http", p.http,
	}, args...)
	p.cmd = exec.Command(shared.culvert, args...) //nolint:noctx // ended below
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(os.Environ(), "POD_NAMESPACE=")
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.end(syscall.SIGTERM)
		if t.Failed() {
			b, _ := os.ReadFile(p.log)
			lines := strings.Split(string(b), "\n")
			t.Logf("the operator said:\n%s", strings.Join(lines[max(0, len(lines)-30):], "\n"))
		}
	})
	return p
}

// end ends the process by a signal, and waits.
func (p *program) end(signal syscall.Signal) {
	_ = p.cmd.Process.Signal(signal)
	_ = p.cmd.Wait()
}

// residentMiB is the memory that the process has, and the most it ever had.
func (p *program) residentMiB() (now, most int) {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), "status"))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kib int
		switch {
		case strings.HasPrefix(line, "VmRSS:"):
			_, _ = fmt.Sscanf(line, "VmRSS: %d kB", &kib)
			now = kib >> 10
		case strings.HasPrefix(line, "VmHWM:"):
			_, _ = fmt.Sscanf(line, "VmHWM: %d kB", &kib)
			most = kib >> 10
		}
	}
	return now, most
}

// eventually waits until check is content.
func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("after %s: %v", limit, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// leads reports whether the process has done its first round.
func (p *program) leads() error {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), "leading;") {
		return errors.New("the operator does not lead yet")
	}
	return nil
}
