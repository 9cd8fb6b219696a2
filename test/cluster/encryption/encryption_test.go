// Package encryption holds the encryption between nodes to its promises on real clusters:
// nothing in the clear (three nodes in two subnets, a gateway's site too; an overlay), no lock-out
// on an upgrade, pods that wait at boot, each agent speaks for its own node only, and nothing
// stays behind.
package encryption

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

const namespace = "encryption"

// world is a cluster with a server pod on each node, and somebody who listens on its wires.
type world struct {
	*clustertest.Cluster
	t        *testing.T
	siteHost *lab.Host // nil: none
	noDNS    bool
	cilium   bool

	mu    sync.Mutex
	plain map[string][]string // by node: what was in the clear
}

func newWorld(t *testing.T, o cluster.Options) *world {
	t.Helper()
	labtest.Require(t, "tcpdump", "wg", "wireguard-go")
	return &world{Cluster: clustertest.Start(t, o), t: t, cilium: o.CNI == cluster.Cilium, plain: map[string][]string{}}
}

// chart installs Culvert, with gateways on the first node.
func (w *world) chart() {
	w.t.Helper()
	w.Install("--set", "agent.podRanges={10.244.0.0/16,fd00:244::/32}", "--set-json", agentAffinity,
		"--set", `gatewayPods.nodeSelector.kubernetes\.io/hostname=`+w.Nodes[0].Name)
}

// install installs Culvert and starts the pods.
func (w *world) install() {
	w.t.Helper()
	w.chart()
	w.Namespace(namespace)
	var pods strings.Builder
	for _, n := range w.Nodes {
		fmt.Fprintf(&pods, `---
apiVersion: v1
kind: Pod
metadata: {name: web-%[1]s, namespace: %[3]s, labels: {app: web, node: %[1]s}}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: server, image: "%[2]s", imagePullPolicy: Never, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: web-%[1]s, namespace: %[3]s}
spec: {type: NodePort, selector: {node: %[1]s}, ports: [{port: 80, targetPort: 8080}]}
`, n.Name, cluster.TestImage, namespace)
	}
	w.Apply(pods.String())
	w.Wait(namespace, "--all")
	for _, n := range w.Nodes {
		w.listen(n)
	}
}

// listen notes what goes over a node's wire in the clear: what has a pod at an end (but for the API
// server's, whose machine is no node), and what nodes say to each other, other than WireGuard, the
// kernel's words about it (nobody listens at that port yet, a fragment never came), and neighbour discovery. What the
// injector sends is counted where it would arrive.
func (w *world) listen(n *cluster.Node) { w.listenFor(w.t, n) }

// listenFor does so until a test ends.
func (w *world) listenFor(t *testing.T, n *cluster.Node) {
	t.Helper()
	var between []string
	for _, o := range w.Nodes {
		if o.Name != n.Name {
			for i, ip := range o.IPs() {
				between = append(between, fmt.Sprintf("(host %s and host %s)", ip, n.IPs()[i]))
			}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := n.Command(ctx, "tcpdump", "-n", "-l", "-q", "-p", "-i", "eth0",
		"(net 10.244.0.0/16 or net fd00:244::/32 or net 192.168.50.0/24 or net fd00:50::/64 or "+strings.Join(between, " or ")+") and not host 172.30.0.10 and not host fd00:30::10 and not arp and not udp port 51821 and not (icmp[0] = 3 and icmp[1] = 3 and icmp[30:2] = 51821) and not (icmp[0] = 11 and icmp[1] = 1 and icmp[30:2] = 51821) and not (icmp6 and ip6[40] = 3 and ip6[41] = 1 and ip6[98:2] = 51821) and not (icmp6 and ip6[40] >= 133 and ip6[40] <= 137)")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = n.Start(cmd)
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if injected(lines.Text()) {
				continue
			}
			w.mu.Lock()
			w.plain[n.Name] = append(w.plain[n.Name], lines.Text())
			w.mu.Unlock()
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() { cancel(); <-done })
}

// heard takes what was noted so far.
func (w *world) heard() map[string][]string {
	time.Sleep(200 * time.Millisecond)
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.plain
	w.plain = map[string][]string{}
	return out
}

// silence sees that nothing went over any wire in the clear.
func (w *world) silence(t *testing.T, what string) {
	t.Helper()
	for node, lines := range w.heard() {
		t.Errorf("%s: %d packets in the clear at %s: %s", what, len(lines), node, strings.Join(lines[:min(len(lines), 4)], "; "))
	}
}

func encryption(enforcement string) string {
	return "apiVersion: culvert.dev/v1alpha1\nkind: NodeEncryption\nmetadata: {name: cluster}\nspec: {scope: All, enforcement: " + enforcement + "}\n"
}

func (w *world) enforced() {
	w.t.Helper()
	w.Kubectl("wait", "nodeencryption/cluster", "--for=condition=Enforced", "--timeout=60s")
	for _, n := range w.Nodes {
		labtest.Eventually(w.t, 10*time.Second, n.Name+" drops", func() error {
			out, err := n.Output(context.Background(), "nft", "list", "chain", "inet", "culvert-guard", "out_pods")
			if err == nil && !strings.Contains(out, "drop") {
				err = fmt.Errorf("not yet: %s", out)
			}
			return err
		})
	}
}

func TestEncryption(t *testing.T) {
	w := newWorld(t, cluster.Options{Nodes: 3, TwoSubnets: true})
	w.install()
	w.siteHost = w.site()
	t.Cleanup(w.explain)
	x := w.injector()
	requests := w.requests()
	w.noticed(t, x, requests)
	w.encrypt()
	w.talkers(t)

	t.Run("steady", func(t *testing.T) {
		w.works(t, requests)
		w.silence(t, "steady")
	})
	t.Run("plain packets from outside", func(t *testing.T) {
		x.inVain(t)
		w.reported(t)
		w.heard()
	})
	t.Run("agents killed", func(t *testing.T) { w.killed(t, x) })
	t.Run("undone by hand", w.undone)
	t.Run("peer deleted", w.forgotten)
	t.Run("upgrade and rollback under load", w.upgrade)
	t.Run("key rotation", w.rotation)
	t.Run("address changed", w.moved)
	t.Run("network configuration", w.follows)
	t.Run("boot without an agent", w.boot)
	t.Run("own node only", w.ownNodeOnly)
	t.Run("uninstalled while strict", w.uninstalled)
	t.Run("off", func(t *testing.T) {
		w.Kubectl("delete", "nodeencryption", "cluster")
		for _, n := range w.Nodes {
			labtest.Eventually(t, 20*time.Second, n.Name+" has nothing of it any more", func() error { return nothingLeft(n) })
		}
		w.works(t, w.requests()) // pods have had new addresses since
	})
}

// explain shows, after a failure, how the agents are.
func (w *world) explain() {
	if !w.t.Failed() {
		return
	}
	for _, args := range [][]string{
		{"get", "pods", "-o", "wide"}, {"get", "events"},
		{"logs", "-l", "app.kubernetes.io/component=agent", "--tail=20", "--prefix"},
		{"logs", "-l", "app.kubernetes.io/component=agent", "--tail=20", "--prefix", "--previous"},
	} {
		out, err := w.TryKubectl(append([]string{"-n", clustertest.System}, args...)...)
		w.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// undone takes parts of it away on one node, while its pod and host talk; what leaves is heard
// everywhere.
func (w *world) undone(t *testing.T) {
	n := w.Nodes[0]
	flows := w.flows(t, n)
	for what, script := range map[string]string{
		"device deleted": "ip link delete cvtnode0",
		"guard flushed":  "nft flush table inet culvert-guard",
		"guard deleted":  "nft delete table inet culvert-guard",
		"routes flushed": "for t in 19630 19631; do ip -4 route flush table $t; ip -6 route flush table $t; done",
		"rules deleted":  "for p in 19630 19631 19632; do ip -4 rule del priority $p; ip -6 rule del priority $p; done",
	} {
		before := drops(n)
		o := w.watch(t, flows)
		w.run(t, n, script)
		// One thing at a time: routes without the guard, and the guard without routes.
		labtest.Eventually(t, 15*time.Second, what+": the guard is whole again", func() error {
			if now := drops(n); now != before || now == 0 {
				return fmt.Errorf("%d rules that drop, had %d", now, before)
			}
			return nil
		})
		o.over(what)
		w.silence(t, what)
	}
}

// drops counts the rules of a node's guard that drop packets.
func drops(n *cluster.Node) int {
	out, _ := n.Output(context.Background(), "nft", "list", "table", "inet", "culvert-guard") // none while it is away
	return strings.Count(out, "drop\n")
}

// upgrade replaces all agents, and takes that back, while pods talk.
func (w *world) upgrade(t *testing.T) {
	flows := w.flows(t, w.Nodes[0])
	for _, verb := range []string{"restart", "undo"} {
		o := w.watch(t, flows)
		w.Kubectl("-n", clustertest.System, "rollout", verb, "daemonset/culvert-agent")
		w.Kubectl("-n", clustertest.System, "rollout", "status", "daemonset/culvert-agent", "--timeout=100s")
		time.Sleep(time.Second) // the last one's turn is over
		o.longest("rollout " + verb)
		w.silence(t, "rollout "+verb)
	}
	w.works(t, w.requests())
}

// encrypt turns encryption on in two steps.
func (w *world) encrypt() {
	w.t.Helper()
	w.t.Cleanup(func() { _, _ = w.TryKubectl("delete", "nodeencryption", "cluster", "--ignore-not-found") })
	w.Apply(encryption("Permissive"))
	w.Kubectl("wait", "nodeencryption/cluster", "--for=condition=Ready", "--timeout=60s")
	w.Apply(encryption("Strict"))
	w.enforced()
	time.Sleep(time.Second) // what was under way
	w.heard()
}

func nothingLeft(n *cluster.Node) error {
	ctx := context.Background()
	if _, err := n.Run(ctx, "test", "!", "-e", chain); err != nil {
		return fmt.Errorf("the plug-in is in the chain: %w", err)
	}
	if _, err := n.Output(ctx, "ip", "link", "show", "cvtnode0"); err == nil {
		return fmt.Errorf("cvtnode0 is there")
	}
	if _, err := n.Output(ctx, "nft", "list", "table", "inet", "culvert-guard"); err == nil {
		return fmt.Errorf("the guard is there")
	}
	for _, table := range []string{"19630", "19631"} {
		if out, _ := n.Output(ctx, "ip", "route", "show", "table", table); strings.Contains(out, "proto") {
			return fmt.Errorf("routes are there: %s", out)
		}
	}
	return nil
}

// kill kills a node's agent.
func kill(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := syscall.Kill(agentProcess(t, n), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// agentProcess is the agent of a node.
func agentProcess(t *testing.T, n *cluster.Node) int {
	t.Helper()
	want, err := os.Stat("/run/netns/" + n.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	pid := 0
	labtest.Eventually(t, 30*time.Second, "an agent runs on "+n.Name, func() error {
		dirs, _ := filepath.Glob("/proc/[0-9]*")
		for _, d := range dirs {
			line, _ := os.ReadFile(d + "/cmdline")
			if !strings.HasPrefix(string(line), "culvert\x00agent\x00") {
				continue
			}
			// The first thread's: no pod's, whatever the agent set there.
			if ns, err := os.Stat(d + "/ns/net"); err == nil && os.SameFile(ns, want) {
				pid, err = strconv.Atoi(filepath.Base(d))
				return err
			}
		}
		return errors.New("there is none")
	})
	return pid
}

func (w *world) agentOn(node string) string {
	w.t.Helper()
	return strings.TrimSpace(w.Kubectl("-n", clustertest.System, "get", "pods", "-l", "app.kubernetes.io/component=agent",
		"--field-selector", "spec.nodeName="+node, "-o", "jsonpath={.items[0].metadata.name}"))
}

func (w *world) rotation(t *testing.T) {
	key := func() string {
		return w.Kubectl("get", "nodetunnel", w.Nodes[0].Name, "-o", "jsonpath={.spec.publicKey}{.spec.nextPublicKey}")
	}
	before := key()
	o := w.watch(t, w.flows(t, w.Nodes[0]))
	w.Kubectl("annotate", "nodetunnel", w.Nodes[0].Name, fmt.Sprint("culvert.dev/rotate-key=", time.Now().UnixNano()), "--overwrite")
	pod, target := "web-"+w.Nodes[1].Name, w.ips("web-" + w.Nodes[0].Name)[0]
	var slow time.Duration
	labtest.Eventually(t, 40*time.Second, "the key is another one", func() error {
		start := time.Now()
		if _, err := w.inPod(pod, "get", url(target)); err != nil {
			return err
		}
		slow = max(slow, time.Since(start))
		if k := key(); k == before || len(k) != len(before) {
			return fmt.Errorf("not yet: %s", k)
		}
		return nil
	})
	t.Logf("the slowest request took %s", slow.Round(time.Millisecond))
	time.Sleep(time.Second)
	o.longest("key rotation")
	w.works(t, w.requests())
	w.silence(t, "key rotation")
}

// ownNodeOnly sees that an agent's token cannot write another node's NodeTunnel, nor take
// back what is enforced.
func (w *world) ownNodeOnly(t *testing.T) {
	own, other := w.Nodes[0].Name, w.Nodes[1].Name
	token := strings.TrimSpace(w.Kubectl("-n", clustertest.System, "create", "token", "culvert-agent",
		"--bound-object-kind=Pod", "--bound-object-name="+w.agentOn(own)))
	as := func(args ...string) (string, error) {
		return w.TryKubectl(append(args, "--token="+token, "--kubeconfig="+w.bare(t))...)
	}
	key := w.Kubectl("get", "nodetunnel", own, "-o", "jsonpath={.spec.publicKey}")
	patch := func(name string) (string, error) {
		p, _ := json.Marshal(map[string]any{"spec": map[string]any{"publicKey": key}})
		return as("patch", "nodetunnel", name, "--type=merge", "-p", string(p))
	}
	if out, err := patch(own); err != nil {
		t.Errorf("an agent cannot write its own NodeTunnel: %v: %s", err, out)
	}
	if out, err := patch(other); err == nil || !strings.Contains(err.Error()+out, "the node that it runs on only") {
		t.Errorf("an agent of %s wrote the NodeTunnel of %s: %v: %s", own, other, err, out)
	}
	p := `{"status":{"conditions":[]}}`
	if out, err := as("patch", "nodeencryption", "cluster", "--subresource=status", "--type=merge", "-p", p); err == nil || !strings.Contains(err.Error()+out, "stays so until") {
		t.Errorf("an agent took back what is enforced: %v: %s", err, out)
	}
}

// bare is a kubeconfig that names the server and nobody who asks.
func (w *world) bare(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(w.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	nobody := regexp.MustCompile(`user: \{[^}]*\}`).ReplaceAll(data, []byte("user: {}"))
	file := t.TempDir() + "/kubeconfig"
	if err := os.WriteFile(file, nobody, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
