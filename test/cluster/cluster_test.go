// Package cluster_test runs Culvert in a real Kubernetes cluster (internal/lab/cluster)
// and sends packets through it.
//
// With CULVERT_CLUSTER=NAME in the environment the tests use a cluster that "make
// cluster-up" left, instead of starting one.
package cluster_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// TestCluster holds the cluster itself to what every other test takes for granted.
func TestCluster(t *testing.T) {
	c := clustertest.Start(t, cluster.Options{})
	startGround(c)
	t.Run("nodes", func(t *testing.T) { testNodes(t, c.In(t)) })
	t.Run("pods reach pods", func(t *testing.T) { testPods(t, c.In(t)) })
	t.Run("services and names", func(t *testing.T) { testServices(t, c.In(t)) })
	t.Run("logs", func(t *testing.T) {
		out := c.Kubectl("-n", "ground", "logs", "on-node1")
		if !strings.Contains(out, "msg=http client=") && !strings.Contains(out, "INFO http client=") {
			t.Errorf("the server's log has no call in it:\n%s", out)
		}
	})
	t.Run("outside", func(t *testing.T) { testOutside(t, c.In(t)) })
	t.Run("load balancer", func(t *testing.T) { testBalancer(t, c.In(t)) })
	t.Run("load balancer leaves a node", func(t *testing.T) { testBalancerMoves(t, c.In(t)) })
	t.Run("API", func(t *testing.T) { testAPI(t, c.In(t)) })
	t.Run("anti-spoofing", func(t *testing.T) { testSpoofing(t, c.In(t)) })
	t.Run("faults", func(t *testing.T) { testFaults(t, c.In(t)) })
}

// The same between subnets, where only the router knows the way, at the smallest MTU.
func TestClusterOfTwoSubnets(t *testing.T) {
	if os.Getenv("CULVERT_CLUSTER") != "" {
		labtest.Skip(t, "needs a cluster with options of its own")
	}
	c := clustertest.Start(t, cluster.Options{Nodes: 3, TwoSubnets: true, MTU: 1280})
	startGround(c)
	for i, n := range c.Nodes {
		if want := []string{"172.30.0.11", "172.30.1.12", "172.30.0.13"}[i]; n.IPs()[0].String() != want {
			t.Errorf("%s has the address %s, want %s", n.Name, n.IPs()[0], want)
		}
	}
	t.Run("nodes", func(t *testing.T) { testNodes(t, c.In(t)) })
	for _, last := range c.Nodes[1:] { // in the other subnet, and in the same
		t.Run("pods reach pods of "+last.Name, func(t *testing.T) { testPodsOf(t, c.In(t), c.Nodes[0], last) })
	}
	t.Run("services and names", func(t *testing.T) { testServices(t, c.In(t)) })
	t.Run("anti-spoofing", func(t *testing.T) { testSpoofing(t, c.In(t)) })
	t.Run("MTU", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		to := c.Nodes[1].IPs()[0].String()
		if out, err := c.Nodes[0].Output(ctx, "ping", "-c1", "-W2", "-M", "do", "-s", "1252", to); err != nil {
			t.Errorf("1280 bytes do not pass: %v: %s", err, out)
		}
		if out, err := c.Nodes[0].Output(ctx, "ping", "-c1", "-W2", "-M", "do", "-s", "1253", to); err == nil {
			t.Errorf("1281 bytes pass: %s", out)
		}
	})
}

// startGround runs a server on every node, behind one service.
func startGround(c *clustertest.Cluster) {
	c.Namespace("ground")
	var pods strings.Builder
	for _, n := range c.Nodes {
		pods.WriteString(serverPod("ground", n.Name))
	}
	pods.WriteString(groundService)
	c.Apply(pods.String())
	c.Wait("ground", "-l", "app=ground")
}

// serverPod is a pod with the test server on a node.
func serverPod(namespace, node string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: on-%[2]s, namespace: %[1]s, labels: {app: %[1]s, node: %[2]s}}
spec:
  nodeName: %[2]s
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    image: %[3]s
    imagePullPolicy: Never
    env: [{name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
`, namespace, node, cluster.TestImage)
}

const groundService = `---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: ground}
spec:
  type: NodePort
  selector: {app: ground}
  ipFamilyPolicy: RequireDualStack
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
`

// podIPs returns the addresses of a pod, IPv4 first.
func podIPs(c *clustertest.Cluster, namespace, pod string) []netip.Addr {
	var ips []netip.Addr
	for _, f := range strings.Fields(c.Kubectl("-n", namespace, "get", "pod", pod, "-o", "jsonpath={.status.podIPs[*].ip}")) {
		ips = append(ips, netip.MustParseAddr(f))
	}
	return ips
}

func testNodes(t *testing.T, c *clustertest.Cluster) {
	out := c.Kubectl("get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.nodeInfo.kubeletVersion} {.status.addresses[?(@.type=="InternalIP")].address}{"\n"}{end}`)
	for _, n := range c.Nodes {
		want := fmt.Sprintf("%s v1.34.4 %s %s\n", n.Name, n.IPs()[0], n.IPs()[1])
		if !strings.Contains(out, want) {
			t.Errorf("no node %q in:\n%s", want, out)
		}
		for _, link := range []string{"all", "eth0", "cni0"} {
			got, err := n.Run(t.Context(), "cat", "/proc/sys/net/ipv4/conf/"+link+"/rp_filter")
			if err != nil || got != "1\n" {
				t.Errorf("rp_filter of %s on %s is %q, want 1 (%v)", link, n.Name, got, err)
			}
		}
		for i, ip := range podIPs(c, "ground", "on-"+n.Name) {
			if !n.PodCIDRs()[i].Contains(ip) {
				t.Errorf("a pod of %s has the address %s, not of %s", n.Name, ip, n.PodCIDRs()[i])
			}
		}
	}
}

// fetch gets a URL from within a pod and checks what the server says of the caller.
func fetch(t *testing.T, c *clustertest.Cluster, pod, url, want string) {
	t.Helper()
	labtest.Eventually(t, 20*time.Second, pod+" gets "+url, func() error {
		out, err := c.Exec("ground", pod, "/server", "get", url)
		if err == nil && !strings.Contains(out, want) {
			err = fmt.Errorf("answer %q does not have %q", out, want)
		}
		return err
	})
}

// fetchAll gets a service's URL from within a pod until every node's server has answered.
func fetchAll(t *testing.T, c *clustertest.Cluster, pod, url string) {
	t.Helper()
	labtest.Eventually(t, 20*time.Second, pod+" gets "+url+" from every node", func() error {
		out, err := c.Exec("ground", pod, "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do /server get "+url+" || exit; done")
		if err != nil {
			return err
		}
		for _, n := range c.Nodes {
			if !strings.Contains(out, "node="+n.Name+"\n") {
				return fmt.Errorf("no answer from %s in:\n%s", n.Name, out)
			}
		}
		return nil
	})
}

func testPods(t *testing.T, c *clustertest.Cluster) {
	testPodsOf(t, c, c.Nodes[0], c.Nodes[len(c.Nodes)-1])
}

func testPodsOf(t *testing.T, c *clustertest.Cluster, first, last *cluster.Node) {
	for _, pair := range [][2]string{{"on-" + first.Name, "on-" + last.Name}, {"on-" + last.Name, "on-" + first.Name}} {
		from, to := podIPs(c, "ground", pair[0]), podIPs(c, "ground", pair[1])
		if len(from) != 2 || len(to) != 2 {
			t.Fatalf("pods with addresses %v and %v: want one of each family", from, to)
		}
		for i := range to {
			fetch(t, c, pair[0], "http://"+netip.AddrPortFrom(to[i], 8080).String()+"/", fmt.Sprintf("client=%s pod=%s", from[i], pair[1]))
		}
	}
}

func testServices(t *testing.T, c *clustertest.Cluster) {
	ips := strings.Fields(c.Kubectl("-n", "ground", "get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[*]}"))
	if len(ips) != 2 {
		t.Fatalf("service addresses %v: want one of each family", ips)
	}
	for _, n := range c.Nodes {
		for _, ip := range ips {
			fetchAll(t, c, "on-"+n.Name, "http://"+netip.AddrPortFrom(netip.MustParseAddr(ip), 80).String()+"/")
		}
		fetch(t, c, "on-"+n.Name, "http://web.ground.svc.cluster.local/", "client=")
	}
	for _, server := range cluster.DNS {
		out, err := c.Exec("ground", "on-node1", "/server", "lookup", "web.ground.svc.cluster.local", server.String())
		if err != nil || !strings.Contains(out, ips[0]) {
			t.Errorf("lookup at %s does not know %s: %v: %s", server, ips[0], err, out)
		}
	}
}

func testOutside(t *testing.T, c *clustertest.Cluster) {
	outside := []string{"198.18.1.1", "2001:2::1:1"}
	h := c.OutsideHost("o1", outside[0]+"/15", outside[1]+"/48")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	server := h.Command(ctx, c.TestServer())
	if err := h.Start(server); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = server.Wait() }()
	for _, n := range c.Nodes {
		for i, public := range n.ExternalIPs() {
			// In: the node's public address; the node port's masquerading hides the caller.
			url := "http://" + netip.AddrPortFrom(public, 30080).String() + "/"
			labtest.Eventually(t, 20*time.Second, url, func() error {
				out, err := h.Output(ctx, c.TestServer(), "get", url)
				if err == nil && !strings.Contains(out, "client=") {
					err = fmt.Errorf("unexpected answer %q", out)
				}
				return err
			})
			// Out: pods are masqueraded as their node, and that as its public address.
			fetch(t, c, "on-"+n.Name, "http://"+net.JoinHostPort(outside[i], "8080")+"/", "client="+public.String()+" ")
		}
	}
}

// testAPI asks of the control plane what an operator and its chart rely on.
func testAPI(t *testing.T, c *clustertest.Cluster) {
	out, err := c.Exec("ground", "on-node1", "/server", "get", "https://kubernetes.default.svc.cluster.local/healthz")
	if err != nil || !strings.Contains(out, "ok") {
		t.Errorf("a pod asked the API server for its health: %v: %s", err, out)
	}
	c.Apply(`apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: ground}
spec:
  matchConstraints:
    resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
  validations: [{expression: "object.metadata.name != 'refused'", message: "not this one"}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: ground}
spec:
  policyName: ground
  validationActions: [Deny]
  matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ground}}}
`)
	defer c.Kubectl("delete", "validatingadmissionpolicy/ground", "validatingadmissionpolicybinding/ground")
	labtest.Eventually(t, 20*time.Second, "the admission policy refuses", func() error {
		out, err := c.TryKubectl("-n", "ground", "create", "configmap", "refused", "--dry-run=server")
		if err == nil || !strings.Contains(err.Error(), "not this one") {
			return fmt.Errorf("not as it should: %w: %s", err, out)
		}
		return nil
	})
	c.Kubectl("-n", "ground", "create", "configmap", "welcome", "--dry-run=server")
	if out, _ := c.TryKubectl("auth", "can-i", "list", "secrets", "-A", "--as=system:serviceaccount:ground:default"); !strings.HasPrefix(out, "no") {
		t.Errorf("a service account may list Secrets: %s", out)
	}
}

// testFaults takes the machines' programs and a node away and gives them back.
func testFaults(t *testing.T, c *clustertest.Cluster) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.StopProgram("control", "kube-apiserver"))
	if out, err := c.TryKubectl("get", "--raw", "/readyz", "--request-timeout=1s"); err == nil {
		t.Errorf("a stopped API server answers: %s", out)
	}
	must(c.StartProgram("control", "kube-apiserver"))
	labtest.Eventually(t, 2*time.Minute, "the API server is back", func() error {
		_, err := c.TryKubectl("get", "--raw", "/readyz", "--request-timeout=1s")
		return err
	})

	last := c.Nodes[len(c.Nodes)-1]
	must(c.KillProgram(last.Name, "containerd"))
	labtest.Eventually(t, 20*time.Second, "containerd is back, with its containers", func() error {
		_, err := c.Exec("ground", "on-"+last.Name, "true")
		return err
	})
	must(last.PowerOff())
	if out, err := c.Nodes[0].Output(ctx, "ping", "-c1", "-W1", last.IPs()[0].String()); err == nil {
		t.Errorf("a node without power answers: %s", out)
	}
	must(last.PowerOn(ctx))
	fetch(t, c, "on-"+c.Nodes[0].Name, "http://"+netip.AddrPortFrom(last.IPs()[0], 30080).String()+"/", "client=")
	c.Wait("ground", "-l", "app=ground")
	labtest.Eventually(t, time.Minute, "its pod runs again", func() error {
		_, err := c.Exec("ground", "on-"+last.Name, "true")
		return err
	})
}

func testSpoofing(t *testing.T, c *clustertest.Cluster) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n, other := c.Nodes[0], c.Nodes[len(c.Nodes)-1]
	foreign := []string{"203.0.113.77", "2001:db8:77::77"}
	count := countFrom(ctx, t, other, foreign...)
	for i, source := range foreign {
		if err := n.Up("lo", source); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := n.IP("addr", "del", source, "dev", "lo"); err != nil {
				t.Error(err)
			}
		}()
		target := other.IPs()[i].String()
		before := spoofed(ctx, t, c, n)
		if out, err := n.Output(ctx, "ping", "-c3", "-i0.2", "-W1", target); err != nil {
			t.Errorf("with the node's own address: %v: %s", err, out)
		}
		if got := spoofed(ctx, t, c, n) - before; got != 0 {
			t.Errorf("%d packets with the node's own address were dropped", got)
		}
		_, _ = n.Output(ctx, "ping", "-c3", "-i0.2", "-W1", "-I", source, target)
		if got := spoofed(ctx, t, c, n) - before; got != 3 {
			t.Errorf("3 packets from %s: the fabric dropped %d", source, got)
		}
	}
	if got := count(); got != 0 {
		t.Errorf("%d packets with foreign sources came through the fabric", got)
	}
}

func spoofed(ctx context.Context, t *testing.T, c *clustertest.Cluster, n *cluster.Node) uint64 {
	t.Helper()
	got, err := c.Spoofed(ctx, n.Name)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// countFrom counts what arrives at a node from the given addresses, an IPv4 and an IPv6
// one, before anything could drop it.
func countFrom(ctx context.Context, t *testing.T, n *cluster.Node, sources ...string) func() int {
	t.Helper()
	const table = "cvk-probe"
	rules := fmt.Sprintf("table inet %s { chain c { type filter hook prerouting priority -500; ip saddr %s counter; ip6 saddr %s counter; }; }", table, sources[0], sources[1])
	if out, err := n.Output(ctx, "nft", rules); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() {
		if _, err := n.Output(context.Background(), "nft", "delete", "table", "inet", table); err != nil {
			t.Error(err)
		}
	})
	return func() int {
		out, err := n.Output(ctx, "nft", "list", "table", "inet", table)
		if err != nil {
			t.Fatal(err)
		}
		sum := 0
		for _, m := range regexp.MustCompile(`counter packets (\d+)`).FindAllStringSubmatch(out, -1) {
			packets, _ := strconv.Atoi(m[1])
			sum += packets
		}
		return sum
	}
}
