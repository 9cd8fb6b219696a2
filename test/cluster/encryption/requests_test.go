package encryption

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

func (w *world) ips(pod string) []string {
	w.t.Helper()
	return w.addresses()[pod]
}

// addresses are those of all pods, and of all services with their node ports.
func (w *world) addresses() map[string][]string {
	w.t.Helper()
	out := map[string][]string{}
	for line := range strings.Lines(w.Kubectl("-n", namespace, "get", "pods,services", "-o",
		`jsonpath={range .items[*]}{.kind}/{.metadata.name} {.status.podIPs[*].ip} {.spec.clusterIP} {.spec.ports[0].nodePort}{"\n"}{end}`)) {
		f := strings.Fields(line)
		out[strings.TrimPrefix(f[0], "Pod/")] = f[1:]
	}
	return out
}

func url(ip string) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return "http://" + ip + ":8080/"
}

// request is one way that traffic takes.
type request struct {
	what string
	do   func() (string, error)
}

// requests are those between pods, hosts and services of each two nodes, one way, DNS, what the
// API server asks of a kubelet, and those of the site.
func (w *world) requests() []request {
	w.t.Helper()
	var out []request
	known := w.addresses()
	for i, a := range w.Nodes {
		b := w.Nodes[(i+1)%len(w.Nodes)]
		pod := "web-" + a.Name
		service, port := known["Service/web-"+b.Name][0], known["Service/web-"+b.Name][1]
		third := w.Nodes[(i+2)%len(w.Nodes)]
		for _, target := range known["web-"+b.Name] {
			out = append(out,
				request{pod + " to pod " + target, func() (string, error) { return w.inPod(pod, "get", url(target)) }},
				request{"host " + a.Name + " to pod " + target, func() (string, error) { return w.onNode(a, "get", url(target)) }})
		}
		out = append(out, request{pod + " to a service", func() (string, error) { return w.inPod(pod, "get", "http://"+service+"/") }},
			request{"host " + a.Name + " to a service", func() (string, error) { return w.onNode(a, "get", "http://"+service+"/") }},
			request{"host " + a.Name + " to a port of " + third.Name, func() (string, error) {
				return w.onNode(a, "get", fmt.Sprintf("http://%s:%s/", third.IPs()[0], port))
			}})
		if !w.noDNS {
			out = append(out, request{pod + " asks DNS", func() (string, error) {
				return w.inPod(pod, "lookup", "kubernetes.default.svc.cluster.local", "10.96.0.10")
			}})
		}
		for _, ip := range b.IPs() {
			out = append(out, request{"host " + a.Name + " to host " + ip.String(), func() (string, error) { return w.ping(a, ip) }})
		}
	}
	if w.siteHost != nil {
		out = append(out, w.withSite(known)...)
	}
	return out
}

func (w *world) inPod(pod string, args ...string) (string, error) {
	return w.Exec(namespace, pod, append([]string{"/server"}, args...)...)
}

func (w *world) onNode(n *cluster.Node, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	return n.Output(ctx, w.TestServer(), args...)
}

func (w *world) ping(n *cluster.Node, to netip.Addr) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	return n.Output(ctx, "ping", "-c1", "-W1", to.String())
}

// works waits until every request is answered.
func (w *world) works(t *testing.T, requests []request) {
	t.Helper()
	for _, r := range requests {
		labtest.Eventually(t, 20*time.Second, r.what, func() error { _, err := r.do(); return err })
	}
}
