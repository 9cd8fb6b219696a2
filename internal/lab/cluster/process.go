package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// running is a program that is started again whenever it ends.
type running struct {
	Group int // its process group; 0 when it was stopped
	Args  []string
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

// forever runs its arguments again and again, in the control group that begins at $0, if
// any.
const forever = `if [[ $0 == /* ]]; then for dir in "$0"/*/; do echo 0 >"$dir/cgroup.procs"; done; fi
while :; do "$@" & wait $!; echo "--- ended with $?; starting it again"; sleep 1; done`

// StartProgram starts a program of Kubernetes or of this machine on a machine of the
// cluster ("control", "node1", …); it is started again whenever it ends, until
// StopProgram. Without arguments it gets those that it had before.
func (c *Cluster) StartProgram(machine, program string, args ...string) error {
	key := machine + "/" + program
	before := c.running[key]
	if before.Group != 0 {
		return fmt.Errorf("%s runs on %s already", program, machine)
	}
	if len(args) == 0 {
		args = before.Args
	}
	path := program
	if p := c.Program(program); exists(p) {
		path = p
	}
	h, command := c.Control, []string{"bash", "-c", forever, "bash"}
	for _, n := range c.Nodes {
		if n.Name == machine {
			h, command = n.Host, append(append([]string{"nsenter"}, n.enter()...), "bash", "-c", forever, "/sys/fs/cgroup")
		}
	}
	if h.Name != machine {
		return fmt.Errorf("start %s: the cluster has no machine %s for it", program, machine)
	}
	group, err := c.spawn(h, program, append(append(command, path), args...))
	if err != nil {
		return err
	}
	c.running[key] = running{Group: group, Args: args}
	return c.save()
}

// StopProgram kills a program of a machine, which then stays away. Containers outlive
// containerd.
func (c *Cluster) StopProgram(machine, program string) error {
	p, err := c.find(machine, program)
	if err != nil {
		return err
	}
	if err := syscall.Kill(-p.Group, syscall.SIGKILL); err != nil {
		return fmt.Errorf("stop %s on %s: %w", program, machine, err)
	}
	c.running[machine+"/"+program] = running{Args: p.Args}
	return c.save()
}

// KillProgram kills a program of a machine; it is started again after a second.
func (c *Cluster) KillProgram(machine, program string) error {
	p, err := c.find(machine, program)
	if err != nil {
		return err
	}
	for _, pid := range members(p.Group, program) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err == nil {
			return nil
		}
	}
	return fmt.Errorf("no process %s on %s", program, machine)
}

func (c *Cluster) find(machine, program string) (running, error) {
	p := c.running[machine+"/"+program]
	if p.Group == 0 {
		return p, fmt.Errorf("no program %s runs on %s", program, machine)
	}
	return p, nil
}

// members lists the processes of a group whose command is the given one (cut off at 15
// bytes, as the kernel does).
func members(group int, command string) []int {
	var pids []int
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		// PID (COMMAND) STATE PARENT GROUP …, proc_pid_stat(5).
		open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
		fields := strings.Fields(string(b[end+1:]))
		if len(fields) > 2 && fields[2] == strconv.Itoa(group) && string(b[open+1:end]) == command[:min(len(command), 15)] {
			pid, _ := strconv.Atoi(strings.Split(file, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// fewCollections lets the programs of a cluster take more memory, which there is, rather than processor
// time, which there is not: they are written in Go.
const fewCollections = "GOGC=400"

// spawn starts a command in a session of its own and returns its process group; it
// outlives this process. Without a host it runs in this process's network namespace.
func (c *Cluster) spawn(h *lab.Host, program string, command []string) (int, error) {
	machine, start := "host", (*exec.Cmd).Start
	if h != nil {
		machine = h.Name
		start = func(cmd *exec.Cmd) error { return h.Start(cmd) }
	}
	log, err := c.openLog(machine, program)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command(command[0], command[1:]...) //nolint:noctx // outlives the caller
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", fewCollections, mark(c.Name))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := start(cmd); err != nil {
		return 0, errors.Join(fmt.Errorf("start %s on %s", program, machine), err)
	}
	go func() { _ = cmd.Wait() }()
	return cmd.Process.Pid, nil
}
