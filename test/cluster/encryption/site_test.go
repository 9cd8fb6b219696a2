package encryption

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// The site: a WireGuard peer outside, whose traffic the gateway's node and the others exchange
// by the node link.
const (
	siteOuter = "198.18.1.50"
	siteIP    = "192.168.50.10"
	siteIP6   = "fd00:50::10"
)

// site attaches a site to a gateway on the first node.
func (w *world) site() *lab.Host {
	w.t.Helper()
	run := func(input, name string, args ...string) string {
		cmd := exec.Command(name, args...)
		cmd.Stdin = strings.NewReader(input)
		out, err := cmd.Output()
		if err != nil {
			w.t.Fatalf("%s: %v", name, err)
		}
		return strings.TrimSpace(string(out))
	}
	key := run("", "wg", "genkey")
	w.Apply(fmt.Sprintf(`apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: %[1]s}
spec:
  deviceCIDRs: [10.99.0.0/24]
  expose: {type: NodePort, address: %[2]s}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: berlin, namespace: %[1]s}
spec:
  gatewayRef: {name: edge}
  cidrs: [192.168.50.0/24, "fd00:50::/64"]
  access: {to: [Pods, Nodes]}
  wireguard: {publicKey: "%[3]s", persistentKeepaliveSeconds: 5}
`, namespace, w.Nodes[0].ExternalIPs()[0], run(key, "wg", "pubkey")))
	w.Kubectl("-n", namespace, "wait", "vgw/edge", "--for=condition=Ready", "--timeout=100s")
	get := func(path string) string {
		return w.Kubectl("-n", namespace, "get", "vgw", "edge", "-o", "jsonpath={"+path+"}")
	}
	file := filepath.Join(w.t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
		w.t.Fatal(err)
	}
	h := w.OutsideHost("site", siteOuter+"/15")
	link := fmt.Sprintf("ws%d", os.Getpid()%1000000) // its socket's name is the machine's
	w.background(h, "wireguard-go", "-f", link)
	w.t.Cleanup(func() { _ = os.Remove(filepath.Join("/var/run/wireguard", link+".sock")) })
	labtest.Eventually(w.t, 10*time.Second, "the site's tunnel is there", func() error { return h.IP("link", "show", link) })
	w.on(h, "wg", "set", link, "private-key", file, "peer", get(".status.publicKey"), "persistent-keepalive", "1",
		"endpoint", fmt.Sprintf("%s:%s", w.Nodes[0].ExternalIPs()[0], get(".status.wireguardPort")), "allowed-ips", "10.244.0.0/16,fd00:244::/32,172.30.0.0/16")
	w.on(h, "ip", "link", "set", link, "mtu", "1400")
	if err := h.Up(link, siteIP+"/24 "+siteIP6+"/64"); err != nil {
		w.t.Fatal(err)
	}
	w.on(h, "ip", "route", "add", "10.244.0.0/16", "dev", link)
	w.on(h, "ip", "route", "add", "fd00:244::/32", "dev", link)
	w.on(h, "ip", "route", "add", "172.30.0.0/16", "dev", link) // the nodes
	w.background(h, w.TestServer())
	return h
}

// on runs a program on a host and fails the test when it fails.
func (w *world) on(h *lab.Host, name string, args ...string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if out, err := h.Output(ctx, name, args...); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
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

// withSite are requests between the site and the pods of nodes that the gateway is not on.
func (w *world) withSite(known map[string][]string) []request {
	var out []request
	for _, n := range w.Nodes[1:] {
		pod := "web-" + n.Name
		for i, ip := range known[pod] {
			mine := []string{siteIP, siteIP6}[i]
			out = append(out,
				request{"the site to " + pod + " " + ip, func() (string, error) { return w.answers(mine, w.fromHost(w.siteHost, ip)) }},
				request{pod + " to the site " + mine, func() (string, error) {
					return w.answers(ip, func() (string, error) { return w.inPod(pod, "get", url(mine)) })
				}})
		}
	}
	return out
}

func (w *world) fromHost(h *lab.Host, ip string) func() (string, error) {
	return func() (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		return h.Output(ctx, w.TestServer(), "get", url(ip))
	}
}

// answers sees that who asked was seen by an address of his own.
func (w *world) answers(want string, get func() (string, error)) (string, error) {
	out, err := get()
	if err == nil && !strings.Contains(out, "client="+want+" ") {
		err = fmt.Errorf("answered %q, want client=%s", out, want)
	}
	return out, err
}
