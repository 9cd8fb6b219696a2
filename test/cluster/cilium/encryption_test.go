package cilium_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// The services by which nodes reach a pod of one node through any node.
const nodePorts = `---
apiVersion: v1
kind: Service
metadata: {name: on-%[1]s, namespace: apps}
spec: {type: NodePort, selector: {on: %[1]s}, ports: [{port: 80, targetPort: 8080}]}
`

// ears hear what goes over the nodes' wires in the clear.
type ears struct {
	mu    sync.Mutex
	heard map[string][]string // by node
}

// listen notes, until the test ends, what has a pod, site or device at an end (but for the API
// server's, whose machine is no node), and what nodes say to each other; WireGuard between them
// and what neighbours need is left out.
func (w *world) listen(t *testing.T) *ears {
	t.Helper()
	e := &ears{heard: map[string][]string{}}
	var nodes []string
	for _, ip := range []int{0, 1} {
		nodes = append(nodes, fmt.Sprintf("(host %s and host %s)", w.Nodes[0].IPs()[ip], w.Nodes[1].IPs()[ip]))
	}
	filter := "(net 10.244.0.0/16 or net fd00:244::/32 or net " + siteCIDR + " or net 10.99.0.0/24 or net fd00:99::/64 or " + strings.Join(nodes, " or ") + ")" +
		" and not host 172.30.0.10 and not host fd00:30::10 and not arp and not udp port 51821 and not (icmp[0] = 3 and icmp[1] = 3 and icmp[30:2] = 51821)" +
		" and not (icmp6 and ip6[40] >= 133 and ip6[40] <= 137)"
	for _, n := range w.Nodes {
		ctx, cancel := context.WithCancel(context.Background())
		cmd := n.Command(ctx, "tcpdump", "-n", "-l", "-q", "-p", "-i", "eth0", filter)
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
				e.mu.Lock()
				e.heard[n.Name] = append(e.heard[n.Name], lines.Text())
				e.mu.Unlock()
			}
			_ = cmd.Wait()
		}()
		t.Cleanup(func() { cancel(); <-done })
	}
	return e
}

// take is what was heard since it was last taken. With scope Pods what hosts say to hosts may
// be heard, but for what Cilium and the node link carry in it.
func (e *ears) take(scope string) map[string][]string {
	time.Sleep(300 * time.Millisecond)
	e.mu.Lock()
	defer e.mu.Unlock()
	out := map[string][]string{}
	for node, lines := range e.heard {
		for _, l := range lines {
			inside := false
			for _, s := range []string{".8472", ".19604", "10.244.", "fd00:244:", "10.50.0.", "10.99.0.", "fd00:99:"} {
				inside = inside || strings.Contains(l, s)
			}
			if scope == "All" || inside {
				out[node] = append(out[node], l)
			}
		}
	}
	e.heard = map[string][]string{}
	return out
}

// between are the ways between the nodes and their pods that no site or device takes.
func (w *world) between(t *testing.T) []flow {
	t.Helper()
	for _, n := range w.Nodes {
		w.In(t).Apply(fmt.Sprintf(nodePorts, n.Name))
	}
	var out []flow
	onNode := func(n *cluster.Node, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		return n.Output(ctx, args[0], args[1:]...)
	}
	for i, a := range w.Nodes {
		b := w.Nodes[1-i]
		pod := "web-" + a.Name
		for _, ip := range w.pods[b.Name] {
			out = append(out,
				flow{pod + " → pod " + ip, func() (string, error) { return w.Exec("apps", pod, "/server", "get", url(ip)) }, "client="},
				flow{"node " + a.Name + " → pod " + ip, func() (string, error) { return onNode(a, w.TestServer(), "get", url(ip)) }, "client="})
		}
		for _, on := range w.Nodes {
			f := strings.Fields(w.Kubectl("-n", "apps", "get", "service", "on-"+on.Name, "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}"))
			port := fmt.Sprintf("http://%s:%s/", b.IPs()[0], f[1])
			out = append(out,
				flow{pod + " → service on " + on.Name, func() (string, error) { return w.Exec("apps", pod, "/server", "get", "http://"+f[0]+"/") }, "client="},
				flow{"node " + a.Name + " → service on " + on.Name, func() (string, error) { return onNode(a, w.TestServer(), "get", "http://"+f[0]+"/") }, "client="},
				flow{pod + " → port of " + b.Name + ", pod on " + on.Name, func() (string, error) { return w.Exec("apps", pod, "/server", "get", port) }, "client="},
				flow{"node " + a.Name + " → port of " + b.Name + ", pod on " + on.Name, func() (string, error) { return onNode(a, w.TestServer(), "get", port) }, "client="},
				flow{"outside → port of " + a.Name + ", pod on " + on.Name, func() (string, error) {
					return w.device.Try("curl", "-s", "-S", "-m", "2", fmt.Sprintf("http://%s:%s/", a.ExternalIPs()[0], f[1]))
				}, "client="})
		}
		out = append(out, flow{"node " + a.Name + " → node " + b.Name, func() (string, error) {
			return onNode(a, "ping", "-c1", "-W1", b.IPs()[0].String())
		}, "PING"})
	}
	return out
}

func encryption(scope, enforcement string) string {
	return "apiVersion: culvert.dev/v1alpha1\nkind: NodeEncryption\nmetadata: {name: cluster}\nspec: {scope: " + scope + ", enforcement: " + enforcement + "}\n"
}

// encrypted: with Strict, in both scopes, all works as before and nothing is in the clear; and all works when it is
// turned off again.
func (w *world) encrypted(t *testing.T) {
	flows := append(w.flows(), w.between(t)...)
	ears := w.listen(t)
	works(t, 90*time.Second, flows)
	if t.Failed() {
		t.Fatal("with encryption off")
	}
	heard := ears.take("Pods") // and so of scope All, too
	for _, n := range w.Nodes {
		if len(heard[n.Name]) < 20 {
			t.Fatalf("with encryption off %d packets with pods inside were heard in the clear at %s: the test proves nothing", len(heard[n.Name]), n.Name)
		}
	}
	direct := w.Kubectl("-n", "kube-system", "get", "configmap", "cilium-config", "-o", "jsonpath={.data.auto-direct-node-routes}") == "true"
	defer func() {
		w.Kubectl("delete", "nodeencryption", "cluster", "--ignore-not-found")
		if direct {
			w.outlived(t)
		}
		works(t, 90*time.Second, flows)
	}()
	for _, scope := range []string{"All", "Pods"} {
		w.strict(t, scope)
		works(t, 90*time.Second, flows) // what Cilium and the kernel remembered is gone
		ears.take(scope)
		if scope == "All" && direct {
			w.ciliumStarts(t)
		}
		works(t, 90*time.Second, flows)
		for node, lines := range ears.take(scope) {
			t.Errorf("scope %s: %d packets in the clear at %s: %s", scope, len(lines), node, strings.Join(lines[:min(len(lines), 6)], "; "))
		}
	}
}

// ciliumStarts: an agent of Cilium's that starts while all is encrypted takes the encrypted link for the way to the
// other node, and puts its routes to the pods there onto it. They do not stay there.
func (w *world) ciliumStarts(t *testing.T) {
	t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	n := w.Nodes[0]
	seen, err := os.Create(filepath.Join(t.TempDir(), "routes"))
	if err != nil {
		t.Fatal(err)
	}
	defer seen.Close()
	monitor := n.Command(ctx, "ip", "monitor", "route")
	monitor.Stdout = seen
	if err := n.Start(monitor); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = monitor.Wait() }()
	if err := n.RestartCilium(ctx); err != nil {
		t.Fatal(err)
	}
	for _, c := range w.Nodes[1].PodCIDRs() {
		put := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(c.String()) + ` via .* dev cvtnode0 `)
		labtest.Eventually(t, 30*time.Second, fmt.Sprintf("Cilium puts its route to %s onto the encrypted link", c), func() error {
			b, err := os.ReadFile(seen.Name())
			if err == nil && !put.Match(b) {
				err = fmt.Errorf("the test proves nothing so far: %s", b)
			}
			return err
		})
	}
	labtest.Eventually(t, 10*time.Second, "Cilium's routes lead over the network itself", func() error { return w.directRoutes(0) })
	t.Logf("Cilium's agent has started anew, and its routes were moved, within %s", time.Since(start).Round(100*time.Millisecond))
}

// outlived: Cilium's routes to other nodes' pods are there when the encrypted link has gone, without Cilium having
// looked.
func (w *world) outlived(t *testing.T) {
	t.Helper()
	for i, n := range w.Nodes {
		labtest.Eventually(t, 20*time.Second, "the encrypted link of "+n.Name+" has gone", func() error {
			if out, err := n.Output(context.Background(), "ip", "link", "show", "cvtnode0"); err == nil {
				return errors.New(out)
			}
			return nil
		})
		if err := w.directRoutes(i); err != nil {
			t.Error(err)
		}
	}
}

// directRoutes tells whether Cilium's routes of a node to the other one's pods lead over the network itself.
func (w *world) directRoutes(node int) error {
	n, o := w.Nodes[node], w.Nodes[1-node]
	for i, c := range o.PodCIDRs() {
		family := "-4"
		if c.Addr().Is6() {
			family = "-6"
		}
		out, err := n.Output(context.Background(), "ip", family, "route", "show", c.String())
		if err != nil {
			return err
		}
		if want := fmt.Sprintf("%s via %s dev eth0 ", c, o.IPs()[i]); !strings.HasPrefix(out, want) || strings.Contains(out, "cvtnode0") {
			return fmt.Errorf("the route of %s to %s is %q", n.Name, c, out)
		}
	}
	return nil
}

// encryptionRefused: where it cannot be had, a condition and the doctor say so, nothing is dropped and all
// goes on.
func (w *world) encryptionRefused(t *testing.T) {
	w.In(t).Apply(encryption("All", "Strict"))
	w.In(t).Kubectl("wait", "nodeencryption/cluster", "--for=condition=Accepted=False", "--timeout=60s")
	for _, c := range []string{"Accepted", "Ready", "Enforced"} {
		out := w.In(t).Kubectl("get", "nodeencryption", "cluster", "-o", `jsonpath={.status.conditions[?(@.type=="`+c+`")]}`)
		if !strings.Contains(out, `"status":"False"`) || !strings.Contains(out, "kubeProxyReplacement=false") {
			t.Errorf("%s is %s", c, out)
		}
	}
	if out, err := w.doctor(t); err == nil || !strings.Contains(out, "NodeEncryption") || !strings.Contains(out, "is refused: ") {
		t.Errorf("culvert doctor: %v: %s", err, out)
	}
	works(t, 90*time.Second, w.flows())
	for _, n := range w.Nodes {
		if out, err := n.Output(context.Background(), "nft", "list", "table", "inet", "culvert-guard"); err == nil && strings.Contains(out, "drop\n") {
			t.Errorf("the guard of %s drops", n.Name)
		}
	}
	w.In(t).Kubectl("delete", "nodeencryption", "cluster")
}

// strict turns encryption on and waits until each node drops what is in the clear.
func (w *world) strict(t *testing.T, scope string) {
	t.Helper()
	w.In(t).Apply(encryption(scope, "Strict"))
	for _, c := range []string{"Accepted", "Ready", "Enforced"} {
		w.In(t).Kubectl("wait", "nodeencryption/cluster", "--for=condition="+c, "--timeout=60s")
	}
	for _, n := range w.Nodes {
		labtest.Eventually(t, 20*time.Second, n.Name+" drops with scope "+scope, func() error {
			out, err := n.Output(context.Background(), "nft", "list", "table", "inet", "culvert-guard")
			if err == nil && (!strings.Contains(out, "drop\n") || strings.Contains(out, "goto in_hosts") != (scope == "All")) {
				err = fmt.Errorf("not yet: %s", out)
			}
			return err
		})
	}
}

// unlucky gives the pods identities whose numbers look like Culvert's marks (0x…c3, 0x…c1):
// Cilium writes them into the marks of what the pods send.
func (w *world) unlucky(t *testing.T) {
	t.Helper()
	for i, n := range w.Nodes {
		pod, number := "web-"+n.Name, fmt.Sprint([]int{0x30c3, 0x30c1}[i])
		identity := func() (string, error) {
			return w.TryKubectl("-n", "apps", "get", "ciliumendpoint", pod, "-o", "jsonpath={.status.identity.id}")
		}
		now, err := identity()
		if err != nil {
			t.Fatal(err)
		}
		var o map[string]any
		if err := json.Unmarshal([]byte(w.Kubectl("get", "ciliumidentity", now, "-o", "json")), &o); err != nil {
			t.Fatal(err)
		}
		o["metadata"] = map[string]any{"name": number, "labels": o["metadata"].(map[string]any)["labels"]}
		o["security-labels"].(map[string]any)["k8s:luck"] = "none"
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		w.In(t).Apply(string(b))
		w.In(t).Kubectl("-n", "apps", "label", "pod", pod, "luck=none")
		labtest.Eventually(t, 20*time.Second, pod+" has the identity "+number, func() error {
			if now, err := identity(); err != nil || now != number {
				return errors.Join(fmt.Errorf("has %s", now), err)
			}
			return nil
		})
	}
}
