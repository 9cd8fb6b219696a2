// Package cluster starts a real Kubernetes cluster on one machine, for tests and for
// people who want to look around.
//
// A node is a set of Linux namespaces (network, processes, mounts, host name, control
// groups) with containerd, kubelet and kube-proxy of its own; etcd, kube-apiserver,
// kube-controller-manager and kube-scheduler run in one more network namespace. The
// nodes hang on a fabric as unforgiving as a cloud's: it drops what a node sends with
// foreign source addresses. A router leads to an outside, with a public address
// translated one to one to each node.
//
// Everything is named after the cluster (namespaces and control groups cvk-NAME…, the
// directory /run/cvk-NAME), so that clusters of different names do not mind each other
// and Remove finds what a killed process left. It needs root, control groups version 1,
// and the programs of "make setup".
package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// DefaultName is the name of the cluster that "make cluster-up" starts.
const DefaultName = "dev"

// CNI says who gives pods their addresses.
type CNI string

const (
	// Bridge is the plug-ins bridge, host-local and portmap, with routes between the nodes
	// and masquerading of what leaves the pod network; the default.
	Bridge CNI = "Bridge"
	// NoCNI leaves the nodes without a network for pods (NotReady): whoever starts the
	// cluster brings one.
	NoCNI CNI = "None"
)

// Options say what the cluster looks like. The zero value is two nodes in one subnet,
// both IP families, underlay MTU 1500.
type Options struct {
	// Name tells clusters apart: up to ten of a-z and 0-9, DefaultName when empty. An
	// earlier cluster of the same name is removed.
	Name string
	// Nodes is their number, 1 to 9; 0 means 2.
	Nodes int
	// TwoSubnets puts every second node into a second subnet, behind the router. Pods of
	// different subnets are then routed by the router, as by a cloud's route table.
	TwoSubnets bool
	// MTU of the fabric and of the outside, in bytes; 0 means 1500.
	MTU int
	// AllowSpoofing lets the fabric pass packets whose source is neither their node's nor
	// its pods'; they are counted all the same.
	AllowSpoofing bool
	// CNI is Bridge when empty.
	CNI CNI
	// CiliumValues are values of Cilium's chart ("routingMode=native"), when CNI is Cilium.
	CiliumValues []string
	// NoKubeProxy leaves kube-proxy out.
	NoKubeProxy bool
	// Keep lets the cluster live on when the process that started it is gone.
	Keep bool
	// Out gets a line for each step; nil for none.
	Out io.Writer `json:"-"`
}

var validName = regexp.MustCompile(`^[a-z][a-z0-9]{0,9}$`)

func (o *Options) complete() error {
	if o.Name == "" {
		o.Name = DefaultName
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.CNI == "" {
		o.CNI = Bridge
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	switch {
	case !validName.MatchString(o.Name):
		return fmt.Errorf("cluster name %q: want up to ten of a-z and 0-9, a letter first", o.Name)
	case o.Nodes < 1 || o.Nodes > 9:
		return fmt.Errorf("cluster with %d nodes: want 1 to 9", o.Nodes)
	case o.CNI != Bridge && o.CNI != Cilium && o.CNI != NoCNI:
		return fmt.Errorf("cluster with CNI %q: want %s, %s or %s", o.CNI, Bridge, Cilium, NoCNI)
	case o.MTU < 1280 || o.MTU > 9000:
		return fmt.Errorf("cluster with MTU %d: want 1280 (the smallest for IPv6) to 9000", o.MTU)
	}
	return nil
}

// Cluster is a running cluster.
type Cluster struct {
	Name  string
	Nodes []*Node
	// Control is the machine of etcd, kube-apiserver, kube-controller-manager and
	// kube-scheduler; Fabric is the switch between the machines; Router stands between it
	// and Outside, a switch that OutsideHost joins machines to.
	Control, Fabric, Router, Outside *lab.Host

	options  Options
	plan     plan
	programs string // directory with the programs that hack/kubernetes.sh builds
	cilium   string // directory with those that hack/cilium.sh builds; empty without Cilium
	prepared bool   // the nodes had their images when they started
	port     int    // of 127.0.0.1, forwarded to kube-apiserver
	started  time.Time
	running  map[string]running // by "machine/program"
}

// directory holds all files of a cluster.
func directory(name string) string { return "/run/cvk-" + name }

func prefix(name string) string { return "cvk-" + name }

func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{directory(c.Name)}, elem...)...)
}

// programsNeeded are those beside what hack/kubernetes.sh builds.
var programsNeeded = []string{"ip", "nft", "iptables", "containerd", "ctr", "runc", "conntrack", "nsenter", "unshare", "socat", "busybox", "bash", "go"}

// Check reports what this machine lacks to run a cluster; nil when nothing.
func Check() error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster needs root")
	}
	for _, p := range programsNeeded {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("a cluster needs the program %s: 'make setup' installs it", p)
		}
	}
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		return errors.New("a cluster needs the CNI plug-ins in /usr/lib/cni: 'make setup' installs them")
	}
	if _, err := os.Stat("/sys/fs/cgroup/memory/cgroup.procs"); err != nil {
		return errors.New("a cluster needs control groups version 1 in /sys/fs/cgroup (systemd.unified_cgroup_hierarchy=0)")
	}
	return nil
}

// Start starts a cluster and returns when its nodes are Ready and its DNS answers. When
// that fails, what was started is removed again, unless Options.Keep.
func Start(ctx context.Context, options Options) (_ *Cluster, err error) {
	if err := options.complete(); err != nil {
		return nil, err
	}
	if err := Check(); err != nil {
		return nil, err
	}
	c := &Cluster{
		Name: options.Name, options: options, plan: newPlan(options),
		started: time.Now(), running: map[string]running{}, prepared: prepared() != "",
	}
	if c.programs, err = Programs(ctx, options.Out); err != nil {
		return nil, err
	}
	if options.CNI == Cilium {
		if c.cilium, err = ciliumPrograms(ctx, options.Out); err != nil {
			return nil, err
		}
	}
	if err := Sweep(); err != nil {
		return nil, fmt.Errorf("remove clusters of processes that are gone: %w", err)
	}
	if err := Remove(c.Name); err != nil {
		return nil, fmt.Errorf("remove an earlier cluster %s: %w", c.Name, err)
	}
	defer func() {
		switch {
		case err == nil:
		case options.Keep:
			err = fmt.Errorf("%w\nwhat was started is left for a look, with logs in %s; remove it with 'make cluster-down NAME=%s'", err, c.path("log"), c.Name)
		default:
			err = errors.Join(err, Remove(c.Name))
		}
	}()
	c.started = time.Now()
	if err := c.up(ctx); err != nil {
		return nil, fmt.Errorf("start cluster %s: %w", c.Name, err)
	}
	return c, nil
}

func (c *Cluster) up(ctx context.Context) error {
	if err := os.MkdirAll(c.path(), 0o755); err != nil {
		return err
	}
	if err := c.save(); err != nil {
		return err
	}
	steps := []struct {
		say string
		do  func(context.Context) error
	}{
		{"network: a fabric, a router, the outside", c.buildNetwork},
		{"control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler", c.startControl},
		{fmt.Sprintf("%d nodes: containerd, kubelet, kube-proxy", c.options.Nodes), c.startNodes},
		{"images: pause, CoreDNS, test server", c.loadOwnImages},
		{"network for pods: " + string(c.options.CNI), c.startNetwork},
		{"waiting for nodes and DNS", c.waitReady},
	}
	for _, s := range steps {
		c.say("%s", s.say)
		if err := s.do(ctx); err != nil {
			return err
		}
		if err := c.save(); err != nil {
			return err
		}
	}
	c.say("ready: export KUBECONFIG=%s", c.Kubeconfig())
	return nil
}

func (c *Cluster) say(format string, args ...any) {
	fmt.Fprintf(c.options.Out, "%5.1fs  %s\n", time.Since(c.started).Seconds(), fmt.Sprintf(format, args...))
}

// Stop removes the cluster.
func (c *Cluster) Stop() error { return Remove(c.Name) }

// record is what a later process needs to know of a cluster.
type record struct {
	Options  Options
	Owner    int // the process that started it
	Programs string
	Cilium   string
	Port     int
	Inits    map[string]int
	Running  map[string]running
}

const recordFile = "cluster.json"

func (c *Cluster) save() error {
	r := record{Options: c.options, Owner: os.Getpid(), Programs: c.programs, Cilium: c.cilium, Port: c.port, Running: c.running, Inits: map[string]int{}}
	for _, n := range c.Nodes {
		r.Inits[n.Name] = n.init
	}
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(c.path(recordFile), b, 0o600)
}

func load(name string) (record, error) {
	var r record
	b, err := os.ReadFile(filepath.Join(directory(name), recordFile))
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(b, &r)
}

// Attach returns a cluster that another process started and keeps. Stop removes it.
func Attach(ctx context.Context, name string) (*Cluster, error) {
	r, err := load(name)
	if err != nil {
		return nil, fmt.Errorf("no cluster %s: start it with 'make cluster-up': %w", name, err)
	}
	r.Options.Out = io.Discard
	c := &Cluster{Name: name, options: r.Options, plan: newPlan(r.Options), programs: r.Programs, cilium: r.Cilium, port: r.Port, running: r.Running, started: time.Now()}
	host := func(n string) *lab.Host { return &lab.Host{Name: n, Namespace: prefix(name) + "-" + n} }
	c.Control, c.Fabric, c.Router, c.Outside = host("control"), host("fabric"), host("router"), host("outside")
	for _, m := range c.plan.nodes {
		c.Nodes = append(c.Nodes, &Node{Host: host(m.name), cluster: c, address: m, init: r.Inits[m.name]})
	}
	if out, err := c.Kubectl(ctx, "get", "--raw", "/readyz"); err != nil {
		return nil, fmt.Errorf("cluster %s does not answer: remove it with 'make cluster-down': %w: %s", name, err, out)
	}
	return c, nil
}

// List returns the names of the clusters that have files on this machine, sorted.
func List() []string {
	dirs, _ := filepath.Glob(directory("*"))
	var names []string
	for _, d := range dirs {
		if name := strings.TrimPrefix(d, directory("")); validName.MatchString(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Sweep removes the clusters that were not to be kept and whose process is gone. Of several
// processes that sweep at once one does, and the others wait for it.
func Sweep() error {
	lock, err := os.OpenFile("/run/cvk.lock", os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	var errs []error
	for _, name := range List() {
		r, err := load(name)
		if err == nil && !r.Options.Keep && syscall.Kill(r.Owner, 0) == syscall.ESRCH {
			errs = append(errs, Remove(name))
		}
	}
	return errors.Join(errs...)
}
