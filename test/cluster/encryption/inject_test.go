package encryption

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// ghost are addresses of the third node's pods that no pod has.
var ghost = [2]string{"10.244.3.200", "fd00:244:3::c8"}

// injected tells whether tcpdump's line is about a packet of the injector's.
func injected(line string) bool {
	return strings.Contains(line, "IP "+ghost[0]+".") || strings.Contains(line, "IP6 "+ghost[1]+".")
}

// injector is a host on the nodes' network that pretends to be a pod.
type injector struct {
	*labtest.Host
	w *world
}

func (w *world) injector() *injector {
	w.t.Helper()
	h := labtest.New(w.t).Host("injector")
	h.IP("link", "add", "eth0", "type", "veth", "peer", "name", "injector", "netns", w.Fabric.Namespace)
	w.t.Cleanup(func() { _ = w.Fabric.IP("link", "delete", "injector") })
	if err := w.Fabric.IP("link", "set", "injector", "master", "br0", "up"); err != nil {
		w.t.Fatal(err)
	}
	if err := h.Up("eth0", "172.30.0.66/24 fd00:30::66/64 "+ghost[0]+"/32 "+ghost[1]+"/128"); err != nil {
		w.t.Fatal(err)
	}
	n := w.Nodes[0]
	for i, c := range n.PodCIDRs() {
		h.IP("route", "add", c.String(), "via", n.IPs()[i].String(), "src", ghost[i])
	}
	return &injector{h, w}
}

// inject sends plain datagrams with a pod's source to a pod on the first node, and returns how
// many of each family that has got so far: as many as before when none was delivered.
func (x *injector) inject() [2]int {
	x.w.t.Helper()
	for i, ip := range x.w.ips("web-" + x.w.Nodes[0].Name) {
		x.Do(func() error {
			c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(ghost[i])}, &net.UDPAddr{IP: net.ParseIP(ip), Port: 8081})
			if err != nil {
				return err
			}
			defer c.Close()
			for range 5 {
				if _, err := c.Write([]byte("in the clear")); err != nil {
					return err
				}
				time.Sleep(20 * time.Millisecond)
			}
			return nil
		})
	}
	time.Sleep(300 * time.Millisecond)
	return x.delivered()
}

// delivered is how many packets of the injector's the pod has got so far, by family.
func (x *injector) delivered() (n [2]int) {
	x.w.t.Helper()
	log := x.w.Kubectl("-n", namespace, "logs", "web-"+x.w.Nodes[0].Name)
	for i, g := range ghost {
		n[i] = strings.Count(log, g)
	}
	return n
}

// inVain sees that none of the injector's packets is delivered.
func (x *injector) inVain(t *testing.T) {
	t.Helper()
	before := x.delivered()
	if now := x.inject(); now != before {
		t.Errorf("%v packets of the injector's were delivered, %v before", now, before)
	}
}

// noticed sees that what the tests of encryption look for would be found, with encryption off: packets in the clear are
// heard at each node, and the injector's are delivered.
func (w *world) noticed(t *testing.T, x *injector, requests []request) {
	t.Helper()
	w.heard()
	w.works(t, requests)
	before := x.delivered()
	if now := x.inject(); now[0] == before[0] || now[1] == before[1] {
		t.Fatalf("with encryption off %v of the injector's packets were delivered, %v before: the test proves nothing", now, before)
	}
	heard := w.heard()
	for _, n := range w.Nodes {
		if len(heard[n.Name]) < 20 {
			t.Fatalf("with encryption off %d packets in the clear were heard at %s: the test proves nothing", len(heard[n.Name]), n.Name)
		}
		t.Logf("encryption off: %d packets in the clear at %s", len(heard[n.Name]), n.Name)
	}
}

// reported sees that the injector's packets are told of: event, status, "culvert status" and
// metric.
func (w *world) reported(t *testing.T) {
	t.Helper()
	node := w.Nodes[0].Name
	labtest.Eventually(t, 30*time.Second, "an event", func() error {
		out, err := w.TryKubectl("get", "events.events.k8s.io", "-n", "default", "-o", `jsonpath={range .items[?(@.reason=="PlainPacketDropped")]}{.regarding.name} {.note}{"\n"}{end}`)
		if err == nil && !strings.Contains(out, node+" arrived in the clear with a pod's or site's source (in_pods): from ") {
			err = fmt.Errorf("%q", out)
		}
		return err
	})
	out := w.Kubectl("get", "nodetunnel", node, "-o", `jsonpath={.status.plainPackets[?(@.kind=="in_pods")]}{"\n"}{.status.exemptions}`)
	if !strings.Contains(out, "10.244.3.200") && !strings.Contains(out, "fd00:244:3::c8") || !strings.Contains(out, `"dropped":true`) || !strings.Contains(out, "API server") {
		t.Errorf("status of NodeTunnel %s: %s", node, out)
	}
	if out := w.Kubectl("get", "nodetunnel", node, "-o", `jsonpath={.status.conditions[?(@.type=="PodsHeld")].status}`); out != "True" {
		t.Errorf("PodsHeld of %s is %q", node, out)
	}
	metrics, err := w.onNode(w.Nodes[0], "get", "http://127.0.0.1:9591/metrics")
	if err != nil || strings.Contains(metrics, `culvert_node_plain_packets_total{kind="in_pods"} 0`) || !strings.Contains(metrics, `culvert_node_plain_packets_total{kind="in_pods"}`) ||
		!strings.Contains(metrics, `culvert_node_handshake_age_seconds{node="`+w.Nodes[1].Name+`"}`) {
		t.Errorf("metrics: %v: %s", err, metrics)
	}
	program := fmt.Sprintf("/proc/%d/exe", agentProcess(t, w.Nodes[0])) // the image's
	ctx, cancel := context.WithTimeout(context.Background(), clustertest.Try)
	defer cancel()
	status, err := exec.CommandContext(ctx, program, "status", "--kubeconfig", w.Kubeconfig()).CombinedOutput()
	if err != nil {
		t.Errorf("culvert status: %v: %s", err, status)
	}
	for _, want := range []string{
		fmt.Sprintf("Encryption between nodes: %d of %[1]d nodes ready (scope All, Strict, enforced: True)", len(w.Nodes)),
		"dropped: " + node + ": arrived in the clear with a pod's or site's source (in_pods), first from ",
		`exempt: "API server" tcp 172.30.0.10:`,
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("culvert status does not say %q:\n%s", want, status)
		}
	}
}
