package cluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// Node is a machine of the cluster. The lab.Host in it runs programs in the node's
// network namespace only, on the file system of the machine below; Enter and Run go into
// all of its namespaces.
type Node struct {
	*lab.Host
	cluster *Cluster
	address machine
	init    int // its first process
}

// IPs are the node's addresses on the fabric, IPv4 first.
func (n *Node) IPs() []netip.Addr { return n.address.ips }

// PodCIDRs are those of the node's pods, IPv4 first.
func (n *Node) PodCIDRs() []netip.Prefix { return n.address.podCIDRs }

// ExternalIPs are its addresses outside, which the router translates one to one.
func (n *Node) ExternalIPs() []netip.Addr { return n.address.external }

//go:embed init.sh
var initScript []byte

// boot starts the node's first process and waits until its file systems are there.
func (n *Node) boot(ctx context.Context) error {
	c := n.cluster
	script := c.path("init.sh")
	up := c.path(n.Name, "up")
	if err := errors.Join(
		os.MkdirAll(c.path(n.Name), 0o755),
		os.WriteFile(script, initScript, 0o600),
		removeIfThere(up),
	); err != nil {
		return err
	}
	log, err := c.openLog(n.Name, "init")
	if err != nil {
		return err
	}
	defer log.Close()
	// Not bound to ctx: a node outlives the call that started it.
	cmd := exec.Command("bash", script, c.path(), n.Name, filepath.Join(prefix(c.Name), n.Name), n.address.ips[0].String()) //nolint:noctx // see above
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
	}
	if err := n.Start(cmd); err != nil {
		return err
	}
	n.init = cmd.Process.Pid
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	return until(ctx, 30*time.Second, n.Name+" is up", func() error {
		select {
		case <-ended:
			return stop{fmt.Errorf("its first process ended: %s", tail(log.Name()))}
		default:
		}
		_, err := os.Stat(up)
		return err
	})
}

// Enter prepares a program that runs on the node, in all of its namespaces, when started.
// It is killed, with its process group, when ctx ends.
func (n *Node) Enter(ctx context.Context, name string, args ...string) *exec.Cmd {
	return n.Command(ctx, "nsenter", append(n.enter(), append([]string{name}, args...)...)...)
}

func (n *Node) enter() []string {
	return []string{"--target", strconv.Itoa(n.init), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"}
}

// Run runs a program on the node, in all of its namespaces, to its end and returns what it
// printed on both streams; the error names the command and its output.
func (n *Node) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := n.Enter(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s on %s: %w: %s", name, strings.Join(args, " "), n.Name, err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// Log is the file with the output of a program of a machine ("control", "node1", …).
func (c *Cluster) Log(machine, program string) string {
	return c.path("log", machine+"-"+program+".log")
}

func (c *Cluster) openLog(machine, program string) (*os.File, error) {
	if err := os.MkdirAll(c.path("log"), 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(c.Log(machine, program), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
}

// forever runs its arguments again and again, in the node's control group.
const forever = `for dir in "$0"/*/; do echo 0 >"$dir/cgroup.procs"; done
while :; do "$@" & wait $!; echo "--- ended with $?; starting it again"; sleep 1; done`

// plain is the same for machines that are only a network namespace.
const plain = `while :; do "$@" & wait $!; echo "--- ended with $?; starting it again"; sleep 1; done`

// StartProgram starts a program on the node that is started again whenever it ends, until
// StopProgram.
func (n *Node) StartProgram(program string, args ...string) error {
	shell := append(n.enter(), "bash", "-c", forever, "/sys/fs/cgroup")
	return n.cluster.spawn(n.Host, program, "nsenter", append(append(shell, n.cluster.resolve(program)), args...))
}

// startControlProgram does the same on the control plane's machine.
func (c *Cluster) startControlProgram(program string, args ...string) error {
	return c.spawn(c.Control, program, "bash", append([]string{"-c", plain, "bash", c.resolve(program)}, args...))
}

// resolve finds a program among those of hack/kubernetes.sh, else leaves it to PATH.
func (c *Cluster) resolve(program string) string {
	if p := c.Program(program); exists(p) {
		return p
	}
	return program
}

// spawn starts a program of its own session in a host's network namespace; it outlives
// this process.
func (c *Cluster) spawn(h *lab.Host, program, name string, args []string) error {
	log, err := c.openLog(h.Name, program)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(name, args...) //nolint:noctx // outlives the caller
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := h.Start(cmd); err != nil {
		return fmt.Errorf("start %s on %s: %w", program, h.Name, err)
	}
	c.pids[h.Name+"/"+program] = cmd.Process.Pid
	go func() { _ = cmd.Wait() }()
	return nil
}

// StopProgram kills a program of a machine ("control", "node1", …), which then stays
// away. Containers outlive containerd.
func (c *Cluster) StopProgram(machine, program string) error {
	key := machine + "/" + program
	pid, ok := c.pids[key]
	if !ok {
		return fmt.Errorf("no program %s runs on %s", program, machine)
	}
	delete(c.pids, key)
	return errors.Join(syscall.Kill(-pid, syscall.SIGKILL), c.save())
}

func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput() //nolint:noctx // short
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// stop is an error that until does not wait any longer for.
type stop struct{ error }

// until calls f every 100 ms until it returns nil; after the time-out it returns f's last
// error.
func until(ctx context.Context, timeout time.Duration, what string, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		if s := (stop{}); errors.As(err, &s) {
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %s: %w", what, timeout, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// tail returns the end of a file, for an error message.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// PID is the node's first process, for nsenter(1).
func (n *Node) PID() int { return n.init }
