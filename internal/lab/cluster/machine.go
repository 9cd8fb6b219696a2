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
	cmd := n.Command(ctx, "nsenter", append(n.enter(), append([]string{name}, args...)...)...)
	cmd.Env = append(os.Environ(), mark(n.cluster.Name))
	return cmd
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

// PID is the node's first process, for nsenter(1).
func (n *Node) PID() int { return n.init }

// PowerOff ends everything on the node at once, as if its power were cut: the fabric sees
// no carrier, and nothing is shut down or cleaned up.
func (n *Node) PowerOff() error {
	c := n.cluster
	// A namespace lives on for a moment after its last process; the cable does not.
	unplugged := c.Fabric.IP("link", "delete", n.Name)
	for key, p := range c.running {
		if strings.HasPrefix(key, n.Name+"/") {
			_ = syscall.Kill(-p.Group, syscall.SIGKILL) // may have ended just now
			p.Group = 0
			c.running[key] = p
		}
	}
	return errors.Join(unplugged, n.Remove(), removeGroups(prefix(c.Name)+"/"+n.Name), c.save())
}

// PowerOn boots a node after PowerOff, with the files that it had and an empty /run. It does not
// wait until pods can run; see AwaitCilium.
func (n *Node) PowerOn(ctx context.Context) error {
	c := n.cluster
	h, err := c.addHost(n.Name)
	if err != nil {
		return err
	}
	n.Host = h
	if err := errors.Join(os.RemoveAll(c.path(n.Name, "run")), c.join(h, n.address)); err != nil {
		return err
	}
	if err := errors.Join(n.up(ctx), c.save()); err != nil || c.options.CNI != Cilium {
		return err
	}
	config, err := c.ciliumConfig(ctx)
	if err != nil {
		return err
	}
	return n.configureCilium(ctx, config)
}
