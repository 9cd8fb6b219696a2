package cilium_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// cell is a way to configure Cilium: how services are translated, and how packets travel
// between nodes.
type cell struct {
	name   string
	values []string
}

// Between nodes without encapsulation, as in clouds whose fabric knows the pods.
var native = []string{"routingMode=native", "autoDirectNodeRoutes=true", "ipv4NativeRoutingCIDR=10.244.0.0/16", "ipv6NativeRoutingCIDR=fd00:244::/32"}

// In the place of kube-proxy. For IPv4 only: Linux 6.18 refuses the IPv6 half of what
// Cilium 1.15 brings for it.
var replaced = []string{"kubeProxyReplacement=true", "ipv6.enabled=false"}

func and(a []string, b ...string) []string { return append(a[:len(a):len(a)], b...) }

func (w *world) cell(t *testing.T, c cell, change bool) {
	t.Run(c.name, func(t *testing.T) {
		if change {
			w.set(t, c.values...)
		}
		before := w.spoofed()
		works(t, 60*time.Second, w.flows())
		w.nothingSpoofed(t, before)
		w.recognised(t)
	})
}

// faults are what sites and devices must not feel, or for ten seconds at most.
func (w *world) faults(t *testing.T, where string) {
	t.Run("agents restart, "+where, w.agentsRestart)
	t.Run("pods relabelled, "+where, w.relabelled)
	t.Run("gateway moves, "+where, w.moved)
}

// TestCilium has kube-proxy; the first cell is what Cilium's chart makes without any value.
func TestCilium(t *testing.T) {
	w := newWorld(t, nil, "--set", "cilium.enabled=true")
	w.cell(t, cell{"kube-proxy, tunnel", nil}, false)
	t.Run("policies", w.policiesSee)
	t.Run("node link CiliumEndpoint", w.endpointsWay)
	w.faults(t, "tunnel")
	w.unlucky(t)
	t.Run("encrypted, kube-proxy, tunnel", w.encrypted)
	w.cell(t, cell{"kube-proxy, native routing", native}, true)
	t.Run("node link CiliumEndpoint, native routing", w.endpointsWayRefused)
	w.faults(t, "native routing")
	t.Run("encrypted, kube-proxy, native routing", w.encrypted)
}

// TestCiliumInPlaceOfKubeProxy is the rest of the matrix.
func TestCiliumInPlaceOfKubeProxy(t *testing.T) {
	w := newWorld(t, replaced)
	const hostsOnly = "socketLB.hostNamespaceOnly=true"
	w.cell(t, cell{"replacement, tunnel", nil}, false)
	t.Run("encryption refused", w.encryptionRefused)
	w.faults(t, "replacement, tunnel")
	w.cell(t, cell{"replacement for hosts only, tunnel", and(replaced, hostsOnly)}, true)
	w.cell(t, cell{"replacement for hosts only, native routing", and(replaced, and(native, hostsOnly)...)}, true)
	w.cell(t, cell{"replacement, native routing", and(replaced, native...)}, true)
	if labtest.Goal(1, 0) == 1 { // each half of the cell was seen by itself
		w.faults(t, "replacement, native routing")
		masquerading := and(replaced, "bpf.masquerade=true")
		w.cell(t, cell{"replacement, masquerading in eBPF, tunnel", masquerading}, true)
		w.faults(t, "replacement, masquerading in eBPF, tunnel")
		w.cell(t, cell{"replacement, masquerading in eBPF, native routing", and(masquerading, and(native, "bpf.hostLegacyRouting=true")...)}, true)
		w.cell(t, cell{"endpoint routes, replacement, masquerading in eBPF, native routing", and(masquerading, and(native, endpointRoutes)...)}, true)
	}
}

// Pods have routes of their own, as Constellation has it.
const endpointRoutes = "endpointRoutes.enabled=true"

// TestCiliumEndpointInPlaceOfKubeProxy is nodeLink CiliumEndpoint where Cilium replaces kube-proxy, and both
// links with endpoint routes.
func TestCiliumEndpointInPlaceOfKubeProxy(t *testing.T) {
	if labtest.Goal(1, 0) == 0 {
		t.Skip("CULVERT_GOALS=1 runs it: it takes minutes, and what is used most is in TestCilium and TestCiliumInPlaceOfKubeProxy")
	}
	w := newWorld(t, replaced, "--set", "cilium.enabled=true")
	w.cell(t, cell{"replacement, tunnel", nil}, false)
	t.Run("node link CiliumEndpoint", w.endpointsWay)
	w.cell(t, cell{"endpoint routes, replacement, tunnel", and(replaced, endpointRoutes)}, true)
	t.Run("node link CiliumEndpoint, endpoint routes", w.endpointsWay)
	w.cell(t, cell{"replacement for hosts only, tunnel", and(replaced, "socketLB.hostNamespaceOnly=true")}, true)
	t.Run("node link CiliumEndpoint, for hosts only", w.endpointsWay)
	w.cell(t, cell{"endpoint routes, replacement, native routing", and(replaced, and(native, endpointRoutes)...)}, true)
}

// recognised: the doctor knows which Cilium it is, and finds nothing wrong with it.
func (w *world) recognised(t *testing.T) {
	t.Helper()
	out, err := w.doctor(t)
	if err != nil {
		t.Errorf("culvert doctor: %v: %s", err, out)
	}
	for _, line := range []string{"version 1.15.19", "Cilium: routing-mode", "Cilium: kube-proxy-replacement"} {
		if !strings.Contains(out, line) {
			t.Errorf("culvert doctor does not say %q:\n%s", line, out)
		}
	}
}

// gatewayIsNew waits until the gateway's pod is ready, and was made for a node link: one of
// CiliumEndpoint has an annotation for Cilium.
func (w *world) gatewayIsNew(t *testing.T, link string) {
	t.Helper()
	labtest.Eventually(t, 60*time.Second, "the gateway's pod is a new one", func() error {
		out, err := w.TryKubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o",
			`jsonpath={.metadata.annotations.config\.cilium\.io/disable-source-ip-verification} {.status.conditions[?(@.type=="Ready")].status}`)
		want := " True"
		if link == "CiliumEndpoint" {
			want = "true True"
		}
		if err == nil && out != want {
			err = fmt.Errorf("it is %q, want %q", out, want)
		}
		return err
	})
}

// doctor is what "culvert doctor" says about the cluster; an error when it finds something broken.
func (w *world) doctor(t *testing.T) (string, error) {
	t.Helper()
	out, err := exec.Command(w.In(t).CulvertProgram(), "doctor", "--kubeconfig", w.Kubeconfig()).CombinedOutput()
	return string(out), err
}
