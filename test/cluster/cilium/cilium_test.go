package cilium_test

import (
	"strings"
	"testing"
	"time"
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

// TestCilium has kube-proxy; the first cell is what Cilium's chart makes without any value.
func TestCilium(t *testing.T) {
	w := newWorld(t, nil)
	w.cell(t, cell{"kube-proxy, tunnel", nil}, false)
	t.Run("policies", w.policiesSee)
	t.Run("agents restart", w.agentsRestart)
	t.Run("pods relabelled", w.relabelled)
	t.Run("gateway moves", w.moved)
	w.cell(t, cell{"kube-proxy, native routing", native}, true)
}

// TestCiliumInPlaceOfKubeProxy is the rest of the matrix.
func TestCiliumInPlaceOfKubeProxy(t *testing.T) {
	w := newWorld(t, replaced)
	const hostsOnly = "socketLB.hostNamespaceOnly=true"
	w.cell(t, cell{"replacement, tunnel", nil}, false)
	w.cell(t, cell{"replacement for hosts only, tunnel", and(replaced, hostsOnly)}, true)
	w.cell(t, cell{"replacement for hosts only, native routing", and(replaced, and(native, hostsOnly)...)}, true)
	w.cell(t, cell{"replacement, native routing", and(replaced, native...)}, true)
}

// recognised: the doctor knows which Cilium it is, and finds nothing wrong with it.
func (w *world) recognised(t *testing.T) {
	t.Helper()
	out := w.doctor(t)
	for _, line := range []string{"version 1.15.19", "Cilium: routing-mode", "Cilium: kube-proxy-replacement"} {
		if !strings.Contains(out, line) {
			t.Errorf("culvert doctor does not say %q:\n%s", line, out)
		}
	}
}
