// Package kernel runs tests of other packages on Debian 12's stock kernel, in a virtual
// machine of QEMU. Its kernel has what the machine that runs the tests may lack: kernel
// WireGuard, ESP, xfrm interfaces, netem. The machine's root file system is that of the
// host, read-only with changes in memory, so every program that is installed on the host
// is there. The machine is emulated: good for correctness, not for speed figures.
package kernel

import (
	"bufio"
	"bytes"
	"context"
	_ "embed" // the scripts of the guest
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The scripts that run inside, one after the other.
var (
	//go:embed guest/init
	initScript []byte
	//go:embed guest/prelude.sh
	prelude []byte
)

// Job is a program that runs inside the machine, as root.
type Job struct {
	Name    string   // unique, one word
	Dir     string   // working directory
	Command []string // program, by its absolute path, and arguments
}

// Config describes a machine.
type Config struct {
	// Kernel is the directory of an unpacked kernel package, as hack/kernel.sh prints it.
	Kernel string
	// Dir is an existing directory for the machine's files, among them console.log, what
	// its kernel said, and jobs.log, what the jobs printed until now. It is not below
	// /run, which is the machine's own inside.
	Dir string
	// Env is the environment of the jobs, KEY=VALUE.
	Env []string
	// Jobs run in this order, each when it is started; then the machine switches itself
	// off.
	Jobs []Job
}

// Machine is a running virtual machine. It never outlives the process that booted it.
type Machine struct {
	// Uptime is how long the machine took from its kernel's start to the first job.
	Uptime time.Duration

	dir    string
	log    *os.File // all that the jobs print, as it comes
	input  *os.File // a line for each job that may start
	output *bufio.Reader
	stop   context.CancelFunc
	ended  <-chan struct{} // closed by stop
	done   chan error
}

// preload are the modules without which the root file system cannot be reached, and
// randomness.
var preload = []string{"virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio-rng"}

// Boot starts a machine and returns when it is ready for its first job. The machine is
// killed when ctx ends.
func Boot(ctx context.Context, c Config) (*Machine, error) {
	image, version, err := findKernel(c.Kernel)
	if err != nil {
		return nil, err
	}
	initrd, err := buildInitrd(ctx, c, version)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "run.sh"), runScript(c), 0o600); err != nil {
		return nil, fmt.Errorf("write the guest's script: %w", err)
	}
	log, err := os.Create(filepath.Join(c.Dir, "jobs.log"))
	if err != nil {
		return nil, fmt.Errorf("write what jobs print: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	m := &Machine{dir: c.Dir, log: log, stop: stop, ended: ctx.Done(), done: make(chan error, 1)}
	if err := m.start(qemu(ctx, c, image, initrd)); err != nil {
		stop()
		_ = log.Close()
		return nil, err
	}
	for {
		line, err := m.line()
		if err != nil {
			return nil, errors.Join(err, m.Close())
		}
		if seconds, ok := strings.CutPrefix(line, "\x1eup "); ok {
			m.Uptime, _ = time.ParseDuration(seconds + "s")
			return m, nil
		}
	}
}

func findKernel(dir string) (image, version string, err error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return "", "", fmt.Errorf("%s: %d kernels instead of one", dir, len(images))
	}
	return images[0], strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-"), nil
}

// buildInitrd writes an initramfs of busybox, the init script and the modules of preload.
func buildInitrd(ctx context.Context, c Config, version string) (string, error) {
	out, err := exec.CommandContext(ctx, "modprobe", append([]string{
		"-d", c.Kernel, "-S", version, "--show-depends", "-a"}, preload...)...).Output()
	if err != nil {
		return "", fmt.Errorf("list the modules of %s: %w", c.Kernel, err)
	}
	files := map[string]string{"bin/busybox": "/bin/busybox"}
	var order strings.Builder
	for line := range strings.Lines(string(out)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "insmod ")
		name := filepath.Base(path)
		if !ok || files["modules/"+name] != "" {
			continue
		}
		files["modules/"+name] = path
		order.WriteString(name + "\n")
	}
	root := filepath.Join(c.Dir, "initrd")
	for name, source := range files {
		if err := copyFile(filepath.Join(root, name), source); err != nil {
			return "", err
		}
	}
	for name, content := range map[string][]byte{"init": initScript, "modules/order": []byte(order.String())} {
		if err := os.WriteFile(filepath.Join(root, name), content, 0o755); err != nil {
			return "", fmt.Errorf("write the initramfs: %w", err)
		}
	}
	archive := filepath.Join(c.Dir, "initrd.cpio")
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", `find . | cpio --quiet -o -H newc >"$0"`, archive)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("pack the initramfs: %w: %s", err, out)
	}
	return archive, nil
}

func copyFile(to, from string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("read for the initramfs: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("write the initramfs: %w", err)
	}
	if err := os.WriteFile(to, content, 0o755); err != nil {
		return fmt.Errorf("write the initramfs: %w", err)
	}
	return nil
}

// runScript returns the script that the machine runs: environment, prelude, jobs.
func runScript(c Config) []byte {
	var b bytes.Buffer
	for _, e := range c.Env {
		key, value, _ := strings.Cut(e, "=")
		fmt.Fprintf(&b, "export %s=%s\n", key, quote(value))
	}
	b.Write(prelude)
	for _, j := range c.Jobs {
		fmt.Fprintf(&b, "job %s %s", quote(j.Name), quote(j.Dir))
		for _, word := range j.Command {
			b.WriteString(" " + quote(word))
		}
		b.WriteString("\n")
	}
	b.WriteString("busybox poweroff -f\n")
	return b.Bytes()
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func qemu(ctx context.Context, c Config, image, initrd string) *exec.Cmd {
	args := []string{"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
		"-m", "4096", "-smp", "2", "-kernel", image, "-initrd", initrd,
		"-append", fmt.Sprintf("console=ttyS0 loglevel=4 panic=-1 mitigations=off CULVERT_RUN=%q CULVERT_MODULES=%q",
			c.Dir, filepath.Join(c.Kernel, "lib", "modules")),
		"-serial", "file:" + filepath.Join(c.Dir, "console.log"), "-serial", "stdio",
		"-device", "virtio-rng-pci",
		// Emulation is slow but the same everywhere; nested KVM is neither there nor sound
		// on every machine that has /dev/kvm.
		"-accel", "tcg,thread=multi", "-cpu", "max",
		"-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// start runs cmd on a thread that lives as long as the machine: the kernel ends it when
// that thread, not only when this process, is gone.
func (m *Machine) start(cmd *exec.Cmd) error {
	// A pipe of our own: Wait would close that of StdoutPipe before it is read to its end.
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start qemu: %w", err)
	}
	theirs, input, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start qemu: %w", err)
	}
	m.output, m.input = bufio.NewReader(read), input
	cmd.Stdin, cmd.Stdout = theirs, write
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		_ = write.Close()
		_ = theirs.Close()
		started <- err
		if err != nil {
			return
		}
		if err := cmd.Wait(); err != nil {
			m.done <- fmt.Errorf("qemu: %w: %s", err, strings.TrimSpace(stderr.String()))
			return
		}
		m.done <- nil
	}()
	if err := <-started; err != nil {
		_ = read.Close()
		_ = input.Close()
		return fmt.Errorf("start qemu: %w", err)
	}
	return nil
}

func (m *Machine) line() (string, error) {
	line, err := m.output.ReadString('\n')
	_, _ = m.log.WriteString(line)
	if err != nil {
		return "", fmt.Errorf("the machine stopped: %w (%s)", err, m.Console())
	}
	return strings.TrimSuffix(line, "\n"), nil
}

// Start lets the next job run, as soon as those before have ended. Its program has to be
// there by now, and need not have been before.
func (m *Machine) Start() error {
	if _, err := m.input.WriteString("\n"); err != nil {
		return fmt.Errorf("start a job: %w", err)
	}
	return nil
}

// Wait returns what the named job printed on both streams, and its exit code, when it has
// ended. Jobs are waited for in their order. An error means that the machine stopped
// before; what the job had printed until then is returned too.
func (m *Machine) Wait(name string) (output string, code int, err error) {
	var b strings.Builder
	for {
		line, err := m.line()
		if err != nil {
			return b.String(), -1, err
		}
		mark, framed := strings.CutPrefix(line, "\x1e")
		switch words := strings.Fields(mark); {
		case framed && len(words) == 3 && words[0] == "end" && words[1] == name:
			code, err := strconv.Atoi(words[2])
			return b.String(), code, err
		case framed && len(words) == 2 && words[0] == "begin":
		default:
			b.WriteString(line + "\n")
		}
	}
}

// stopped reports whether the machine was told to end.
func (m *Machine) stopped() bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

// Console returns the last lines of the machine's console.
func (m *Machine) Console() string {
	content, err := os.ReadFile(filepath.Join(m.dir, "console.log"))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(content), "\r", "")), "\n")
	return "console: " + strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// Close ends the machine and waits until it is gone.
func (m *Machine) Close() error {
	m.stop()
	err := <-m.done
	_ = m.log.Close()
	_ = m.input.Close()
	m.done <- nil // a second Close finds it gone
	if err != nil && strings.Contains(err.Error(), "signal: killed") {
		return nil
	}
	return err
}
