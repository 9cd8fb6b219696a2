// Package nodelink holds the link between gateways and nodes to its promises on a real
// cluster: routes follow the gateway, an upgrade of the agents loses nothing, and nothing
// stays behind.
package nodelink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// The site: a WireGuard peer outside.
const (
	siteOuter = "198.18.1.40"
	siteIP    = "192.168.50.10"
	siteIP6   = "fd00:50::10"
)

// siteLink is the site's tunnel; the sockets of wireguard-go are in a directory that all
// namespaces share.
var siteLink = fmt.Sprintf("wg%d", os.Getpid()%1000000)

func objects(key string) string {
	web := func(n string) string {
		return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: web-%[1]s, namespace: link}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: server, image: "%[2]s", imagePullPolicy: Never, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
`, n, cluster.TestImage)
	}
	return `---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: link}
spec:
  deviceCIDRs: [10.99.0.0/24, "fd00:99::/64"]
  expose: {type: NodePort, address: 198.18.0.11}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: berlin, namespace: link}
spec:
  gatewayRef: {name: edge}
  cidrs: [192.168.50.0/24, "fd00:50::/64"]
  access: {to: [Pods, Services, Nodes]}
  wireguard: {publicKey: "` + key + `", persistentKeepaliveSeconds: 5}
` + web("node1") + web("node2")
}

// world is the cluster with a gateway, and its site.
type world struct {
	*clustertest.Cluster
	t    *testing.T
	site *lab.Host
}

func newWorld(t *testing.T, o cluster.Options, install ...string) *world {
	t.Helper()
	labtest.Require(t, "wg", "wireguard-go")
	o.Nodes = 2
	w := &world{Cluster: clustertest.Start(t, o), t: t}
	w.Install(install...)
	w.Namespace("link")
	key := strings.TrimSpace(w.command("wg", "genkey"))
	public := strings.TrimSpace(w.piped(key, "wg", "pubkey"))
	w.Apply(objects(public))
	w.Kubectl("-n", "link", "wait", "vgw/edge", "--for=condition=Ready", "--timeout=60s")
	w.Wait("link", "--all")
	w.site = w.OutsideHost("site", siteOuter+"/15")
	w.connect(key)
	return w
}

func (w *world) command(name string, args ...string) string { return w.piped("", name, args...) }

func (w *world) piped(input, name string, args ...string) string {
	w.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	return string(out)
}

// on runs a program on a host and fails the test when it fails.
func (w *world) on(h *lab.Host, name string, args ...string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := h.Output(ctx, name, args...)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// connect brings the site's tunnel up, with a stock client, and a server behind it.
func (w *world) connect(key string) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
		w.t.Fatal(err)
	}
	var gw struct {
		Status struct {
			PublicKey     string
			WireGuardPort int
		}
	}
	if err := json.Unmarshal([]byte(w.Kubectl("-n", "link", "get", "vgw", "edge", "-o", "json")), &gw); err != nil {
		w.t.Fatal(err)
	}
	w.background(w.site, "wireguard-go", "-f", siteLink)
	labtest.Eventually(w.t, 5*time.Second, "the site's tunnel is there", func() error { return w.site.IP("link", "show", siteLink) })
	ranges := []string{"10.244.0.0/16", "172.30.0.0/24", "fd00:244::/32", "fd00:30::/64"}
	w.on(w.site, "wg", "set", siteLink, "private-key", file, "peer", gw.Status.PublicKey, "persistent-keepalive", "1",
		"endpoint", fmt.Sprintf("198.18.0.11:%d", gw.Status.WireGuardPort), "allowed-ips", strings.Join(ranges, ","))
	if err := w.site.Up(siteLink, siteIP+"/24 "+siteIP6+"/64"); err != nil {
		w.t.Fatal(err)
	}
	w.on(w.site, "ip", "link", "set", siteLink, "mtu", "1420")
	for _, r := range ranges {
		w.on(w.site, "ip", "route", "add", r, "dev", siteLink)
	}
	w.background(w.site, w.TestServer())
}

// background runs a program on a host until the test ends.
func (w *world) background(h *lab.Host, name string, args ...string) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.Command(ctx, name, args...)
	if err := h.Start(cmd); err != nil {
		cancel()
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	w.t.Cleanup(func() { cancel(); <-done })
}

// podIPs are the addresses of a pod, IPv4 first.
func (w *world) podIPs(pod string) []string {
	w.t.Helper()
	return strings.Fields(w.Kubectl("-n", "link", "get", "pod", pod, "-o", "jsonpath={.status.podIPs[*].ip}"))
}

func url(ip string) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return "http://" + ip + ":8080/"
}

// reaches waits until somebody gets an answer that says who he is.
func (w *world) reaches(what, want string, get func() (string, error)) {
	w.t.Helper()
	labtest.Eventually(w.t, 15*time.Second, what, func() error {
		out, err := get()
		if err == nil && !strings.Contains(out, "client="+want+" ") {
			err = fmt.Errorf("answered %q, want client=%s", out, want)
		}
		return err
	})
}

func (w *world) fromSite(url string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	return w.site.Output(ctx, w.TestServer(), "get", url)
}

// bothWays sees that the site and the pods of both nodes reach each other, in both
// families, each seeing the other's own address; and nodes and the site too.
func (w *world) bothWays() {
	w.t.Helper()
	for i, n := range w.Nodes {
		pod := "web-" + n.Name
		for j, ip := range w.podIPs(pod) {
			mine := []string{siteIP, siteIP6}[j]
			w.reaches("the site reaches "+pod, mine, func() (string, error) { return w.fromSite(url(ip)) })
			w.reaches(pod+" reaches the site", ip, func() (string, error) { return w.Exec("link", pod, "/server", "get", url(mine)) })
			node := n.IPs()[j].String()
			w.reaches("node "+n.Name+" reaches the site", node, func() (string, error) {
				ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
				defer cancel()
				return w.Nodes[i].Output(ctx, w.TestServer(), "get", url(mine))
			})
			w.on(w.site, "ping", "-c1", "-W2", node)
		}
	}
}

var linkRoute = regexp.MustCompile(`192\.168\.50\.0/24 via (\S+) dev cvtnodes`)

// via is where a node sends what is for the site; "" is nowhere.
func via(n *cluster.Node) string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, _ := n.Output(ctx, "ip", "route", "show", "table", "19610")
	if m := linkRoute.FindStringSubmatch(out); m != nil {
		return m[1]
	}
	return ""
}

func TestNodeLink(t *testing.T) {
	w := newWorld(t, cluster.Options{AllowSpoofing: true}) // what is foreign is counted all the same
	w.bothWays()
	t.Run("a link that is refused", w.refused)
	t.Run("gateway moves", w.gatewayMoves)
	if n := w.spoofed(); n != 0 {
		t.Errorf("the nodes sent %d packets with addresses that are not their own", n)
	}
	t.Run("direct", w.direct)
	t.Run("uninstall", w.uninstall)
	t.Run("CiliumEndpoint", w.ciliumEndpoint)
}

// spoofed is how many packets with foreign addresses the nodes have sent.
func (w *world) spoofed() (sum int) {
	w.t.Helper()
	for _, n := range w.Nodes {
		spoofed, err := w.Spoofed(context.Background(), n.Name)
		if err != nil {
			w.t.Fatal(err)
		}
		sum += int(spoofed)
	}
	return sum
}

// link asks for a node link.
func (w *world) link(kind string) {
	w.t.Helper()
	w.Kubectl("-n", "link", "patch", "vgw", "edge", "--type=merge", "-p", `{"spec":{"clusterTraffic":{"nodeLink":"`+kind+`"}}}`)
}

// refused sees that a link that the cluster cannot carry leaves the one that is in use, also when
// agents restart.
func (w *world) refused(t *testing.T) {
	w.link("CiliumEndpoint")
	w.Kubectl("-n", "link", "wait", "vgw/edge", "--for=condition=Accepted=False", "--timeout=30s")
	w.agentsRestart(t)
	w.bothWays()
	if out := w.Kubectl("-n", "link", "get", "vgw", "edge", "-o", "jsonpath={.status.nodeLink} {.status.conditions[?(@.type=='Accepted')]}"); !strings.HasPrefix(out, "Encapsulated ") ||
		!strings.Contains(out, "NetworkPlugin") || !strings.Contains(out, "Encapsulated, the last good link, stays in use") {
		t.Errorf("the link in use, and Accepted: %s", out)
	}
	w.link("Encapsulated")
	w.Kubectl("-n", "link", "wait", "vgw/edge", "--for=condition=Accepted", "--timeout=30s")
}

// direct changes to the link for networks that let foreign addresses pass, and back.
func (w *world) direct(t *testing.T) {
	vxlan := func(there bool) {
		for _, n := range w.Nodes {
			labtest.Eventually(t, 10*time.Second, fmt.Sprintf("cvtnodes on %s: %t", n.Name, there), func() error {
				if err := n.IP("link", "show", "cvtnodes"); (err == nil) != there {
					return fmt.Errorf("is it there: %t", !there)
				}
				return nil
			})
		}
	}
	w.link("Direct")
	vxlan(false)
	w.bothWays()
	if w.spoofed() == 0 {
		t.Error("no packet went over the fabric with the site's own address: that is not direct")
	}
	w.link("Encapsulated")
	vxlan(true)
	before := w.spoofed()
	w.bothWays()
	if n := w.spoofed(); n > before {
		t.Errorf("back to Encapsulated the nodes sent %d packets with addresses that are not their own", n-before)
	}
}

// agentsRestart sees that traffic does not notice new agents.
func (w *world) agentsRestart(t *testing.T) {
	ip := w.podIPs("web-node2")[0]
	stop, lost := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				lost <- n
				return
			default:
			}
			if _, err := w.fromSite(url(ip)); err != nil {
				n++
			}
		}
	}()
	w.Kubectl("-n", clustertest.System, "rollout", "restart", "daemonset/culvert-agent")
	w.Kubectl("-n", clustertest.System, "rollout", "status", "daemonset/culvert-agent", "--timeout=60s")
	close(stop)
	if n := <-lost; n > 0 {
		t.Errorf("%d requests failed while agents were restarted", n)
	}
}

// gatewayMoves sees that all nodes follow within a second of the gateway's saying where
// it is. The best of three moves counts: a neighbour on the machine may spoil one.
func (w *world) gatewayMoves(t *testing.T) {
	var took time.Duration
	for range 3 {
		if took = w.followed(t); took <= time.Second {
			break
		}
	}
	if took > time.Second {
		t.Errorf("the nodes followed after %s, want 1 s at most", took)
	}
	w.bothWays()
}

// followed moves the gateway to another node, and says how long the nodes took to follow.
func (w *world) followed(t *testing.T) time.Duration {
	from := strings.TrimSpace(w.Kubectl("-n", "link", "get", "pod", "culvert-edge-0", "-o", "jsonpath={.spec.nodeName}"))
	w.Kubectl("cordon", from)
	defer w.Kubectl("uncordon", from)
	before := via(w.Nodes[0])
	w.Kubectl("-n", "link", "delete", "pod", "culvert-edge-0", "--wait=true", "--timeout=60s")
	var told time.Time
	labtest.Eventually(t, 60*time.Second, "the gateway says where it is", func() error {
		out := w.Kubectl("-n", "link", "get", "vgw", "edge", "-o", "jsonpath={.status.endpoints[?(@.active==true)].podIPs[0]}")
		if out == "" || out == before {
			return fmt.Errorf("active: %q", out)
		}
		told = time.Now()
		return nil
	})
	for _, n := range w.Nodes {
		labtest.Eventually(t, 5*time.Second, n.Name+" follows", func() error {
			if v := via(n); v == "" || v == before {
				return fmt.Errorf("via %q", v)
			}
			return nil
		})
	}
	took := time.Since(told)
	t.Logf("the nodes followed after %s", took.Round(time.Millisecond))
	return took
}

// uninstall sees that the nodes are as they were.
func (w *world) uninstall(t *testing.T) {
	w.Helm("uninstall", clustertest.Release, "--namespace", clustertest.System, "--wait")
	for _, n := range w.Nodes {
		labtest.Eventually(t, 20*time.Second, "nothing is left on "+n.Name, func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			out, err := n.Output(ctx, "sh", "-c", "ip -br link; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; nft list tables")
			if err != nil {
				return err
			}
			for _, s := range []string{"cvt", "1961", "proto 196", "culvert"} {
				if strings.Contains(out, s) {
					return errors.New(s + " is still there:\n" + out)
				}
			}
			return nil
		})
	}
	if out := w.Kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.annotations}"); strings.Contains(out, "culvert.dev") {
		t.Errorf("a Node's annotation is still there: %s", out)
	}
}
