package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Cilium is a real Cilium: its agent on each node and its operator on the control plane's
// machine, as processes of this machine with its CNI plug-in; the rest is what its own Helm
// chart makes of Options.CiliumValues.
const Cilium CNI = "Cilium"

// ciliumNamespace is the one of Cilium's objects.
const ciliumNamespace = "kube-system"

// ciliumValues are those of Cilium's chart that a cluster of this package needs, and that
// leave out what has nothing to do with the network: everything else is at its default.
var ciliumValues = []string{
	"ipam.mode=kubernetes", "ipv6.enabled=true", "cgroup.autoMount.enabled=false", "cgroup.hostRoot=/sys/fs/cgroup/unified",
	// No image of Cilium can be had: its pods stay away, the programs run without them.
	"nodeSelector.culvert\\.dev/agents=processes", "operator.replicas=0",
	"l7Proxy=false", "hubble.enabled=false", "healthChecking=false", "endpointHealthChecking.enabled=false",
	// Only what the tests' policies and the switching of values need to be quick.
	"k8sClientRateLimit.qps=50", "k8sClientRateLimit.burst=100",
}

// ciliumPrograms returns the directory with Cilium's programs and builds them when they
// are not there (some minutes).
func ciliumPrograms(ctx context.Context, out io.Writer) (string, error) {
	for _, p := range []string{"clang-19", "llc-19", "bpftool", "ipset"} {
		if _, err := exec.LookPath(p); err != nil {
			return "", fmt.Errorf("Cilium needs the program %s: 'make setup' installs it", p) //nolint:staticcheck // a name
		}
	}
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	dir, err := output(ctx, out, filepath.Join(root, "hack/cilium.sh"))
	if err != nil {
		return "", fmt.Errorf("build Cilium: %w", err)
	}
	return dir, nil
}

// output runs a script and returns what it printed, without the last line's end; out gets
// its standard error.
func output(ctx context.Context, out io.Writer, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var said bytes.Buffer
	cmd.Stderr = io.MultiWriter(&said, out)
	b, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(name), err, strings.TrimSpace(said.String()))
	}
	return strings.TrimSpace(string(b)), nil
}

// ciliumAgent starts the agent with what its pod would bring. clang and llc are those that
// it calls at run time.
const ciliumAgent = `#!/bin/bash
set -e
mountpoint -q /sys/fs/bpf || mount -t bpf none /sys/fs/bpf
# What it looks for is built in.
printf '%%s 0 0 - Live 0x0\n' ip{,6}_tables iptable_{nat,mangle,raw,filter} ip6table_{nat,mangle,raw,filter} >/etc/kernel-modules
mkdir -p /var/lib/cilium
[[ -e /var/lib/cilium/bpf ]] || cp -r %[1]s/bpf /var/lib/cilium/bpf
ln -sf %[1]s/cni/cilium-cni /opt/cni/bin/
export PATH=%[1]s/tools:$PATH K8S_NODE_NAME=$(hostname)
exec %[1]s/cilium-agent "$@"
`

// SetCilium makes the cluster's Cilium one with these values of its chart ("routingMode=native"),
// beside those that a cluster needs anyway: it renders the chart, applies its objects, and
// restarts the agents, as an upgrade of the chart would. kube-proxy runs unless Cilium
// replaces it. It returns when all agents are ready.
func (c *Cluster) SetCilium(ctx context.Context, values ...string) error {
	objects, err := c.renderCilium(ctx, values)
	if err != nil {
		return err
	}
	if err := c.Apply(ctx, objects); err != nil {
		return fmt.Errorf("objects of Cilium's chart: %w", err)
	}
	config, err := c.ciliumConfig(ctx)
	if err != nil {
		return err
	}
	c.options.CiliumValues = values
	if c.running["control/cilium-operator"].Group == 0 {
		if err := c.StartProgram("control", "cilium-operator", "--k8s-kubeconfig-path="+c.NodeKubeconfig(), "--config-dir="+c.path("cilium"),
			"--operator-api-serve-addr=127.0.0.1:9234", "--enable-metrics=false"); err != nil {
			return err
		}
	}
	// Once: a file that is being executed cannot be written.
	script := c.path("cilium-agent")
	if _, err := os.Stat(script); err != nil {
		if err := os.WriteFile(script, fmt.Appendf(nil, ciliumAgent, c.cilium), 0o755); err != nil {
			return err
		}
	}
	errs := make([]error, len(c.Nodes))
	for i, n := range c.Nodes {
		errs[i] = n.configureCilium(ctx, config)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	var wg sync.WaitGroup
	for i, n := range c.Nodes {
		wg.Go(func() { errs[i] = n.AwaitCilium(ctx) })
	}
	wg.Wait()
	return errors.Join(errors.Join(errs...), c.save())
}

// renderCilium is what "helm install cilium" would apply.
func (c *Cluster) renderCilium(ctx context.Context, values []string) (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	helm, err := output(ctx, c.options.Out, filepath.Join(root, "hack/helm.sh"))
	if err != nil {
		return "", err
	}
	args := []string{
		"template", "cilium", filepath.Join(c.cilium, "chart"), "--namespace", ciliumNamespace,
		"--set", "k8sServiceHost=" + c.plan.control.ips[0].String(), "--set", "k8sServicePort=6443",
	}
	for _, v := range append(append([]string{}, ciliumValues...), values...) {
		args = append(args, "--set", v)
	}
	return output(ctx, io.Discard, helm, args...)
}

// ciliumConfig is Cilium's ConfigMap, as the API server has it now.
func (c *Cluster) ciliumConfig(ctx context.Context) (map[string]string, error) {
	out, err := c.Kubectl(ctx, "-n", ciliumNamespace, "get", "configmap", "cilium-config", "-o", "json")
	if err != nil {
		return nil, err
	}
	var o struct{ Data map[string]string }
	if err := json.Unmarshal([]byte(out), &o); err != nil {
		return nil, fmt.Errorf("ConfigMap cilium-config: %w", err)
	}
	return o.Data, writeFiles(c.path("cilium"), o.Data)
}

func writeFiles(dir string, files map[string]string) error {
	errs := []error{os.RemoveAll(dir), os.MkdirAll(dir, 0o755)}
	for name, text := range files {
		errs = append(errs, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	return errors.Join(errs...)
}

// configureCilium gives a node's agent its configuration and (re)starts it, and kube-proxy
// if the configuration wants one.
func (n *Node) configureCilium(ctx context.Context, config map[string]string) error {
	c := n.cluster
	if err := errors.Join(
		writeFiles(filepath.Join(fmt.Sprintf("/proc/%d/root/etc", n.init), "cilium"), config),
		n.setKubeProxy(ctx, config["kube-proxy-replacement"] != "true"),
	); err != nil {
		return err
	}
	if c.running[n.Name+"/cilium-agent"].Group != 0 {
		if err := c.StopProgram(n.Name, "cilium-agent"); err != nil {
			return err
		}
	}
	return c.StartProgram(n.Name, "cilium-agent", "--config-dir=/etc/cilium", "--k8s-kubeconfig-path="+c.NodeKubeconfig(),
		// Where its pod has them elsewhere.
		"--procfs=/proc", "--write-cni-conf-when-ready="+ciliumConflist)
}

const ciliumConflist = "/etc/cni/net.d/05-cilium.conflist"

// setKubeProxy starts kube-proxy, or stops it and removes what it leaves behind.
func (n *Node) setKubeProxy(ctx context.Context, want bool) error {
	c := n.cluster
	switch runs := c.running[n.Name+"/kube-proxy"].Group != 0; {
	case want && !runs:
		return n.startKubeProxy()
	case !want && runs:
		if err := c.StopProgram(n.Name, "kube-proxy"); err != nil {
			return err
		}
		_, err := n.Run(ctx, "sh", "-c", "nft delete table ip kube-proxy; nft delete table ip6 kube-proxy; conntrack -F >/dev/null 2>&1 || true")
		return err
	}
	return nil
}

// RestartCilium kills a node's agent, which then starts again, and returns when it is
// ready.
func (n *Node) RestartCilium(ctx context.Context) error {
	if err := n.cluster.KillProgram(n.Name, "cilium-agent"); err != nil {
		return err
	}
	return n.AwaitCilium(ctx)
}

// CiliumDebug runs cilium-dbg against a node's agent and returns what it printed.
func (n *Node) CiliumDebug(ctx context.Context, args ...string) (string, error) {
	return n.Run(ctx, filepath.Join(n.cluster.cilium, "cilium-dbg"), args...)
}

// AwaitCilium returns when the node's agent, which was started just now, and all its endpoints are
// ready.
func (n *Node) AwaitCilium(ctx context.Context) error {
	// What the one before has left must not count.
	time.Sleep(time.Second)
	err := until(ctx, 4*time.Minute, "Cilium's agent on "+n.Name+" is ready", func() error {
		if out, err := n.CiliumDebug(ctx, "status", "--brief"); err != nil || !strings.HasPrefix(strings.TrimSpace(out), "OK") {
			return errors.Join(errors.New(strings.TrimSpace(out)), err)
		}
		// The agent calls itself ready before it has loaded the pods' programs.
		out, err := n.CiliumDebug(ctx, "endpoint", "list", "-o", "jsonpath={[*].status.state}")
		for state := range strings.FieldsSeq(out) {
			if err == nil && state != "ready" {
				err = fmt.Errorf("its endpoints are %s", strings.TrimSpace(out))
			}
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%w; its log ends with:\n%s", err, tail(n.cluster.Log(n.Name, "cilium-agent")))
	}
	// containerd 1.6 does not see a file that was renamed into place.
	_, err = n.Run(ctx, "sh", "-c", "for i in $(seq 100); do [ -e "+ciliumConflist+" ] && exec touch "+ciliumConflist+"; sleep 0.1; done; exit 1")
	return err
}
