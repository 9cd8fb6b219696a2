package cilium_test

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// Halves of the ranges of the site and of another one, as the CiliumEndpoint has them.
const (
	siteHalf  = "10.50.0.128/25"
	otherHalf = "10.60.0.128/25"
)

// other is a site that nobody connects as; its key is a number.
const other = `---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: other, namespace: vpn}
spec:
  gatewayRef: {name: hq}
  cidrs: [10.60.0.0/24]
  wireguard: {publicKey: "b3RoZXJvdGhlcm90aGVyb3RoZXJvdGhlcm90aGVyb3Q="}
`

// namesTheRange is a policy about pods that there are none of: what counts is that Cilium then
// knows the prefix, and by an identity of its own.
const namesTheRange = `---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names-the-range, namespace: apps}
spec: {endpointSelector: {matchLabels: {app: nobody}}, egress: [{toCIDR: [` + siteCIDR + `]}]}
`

func (w *world) nodeLink(mode string) {
	w.Kubectl("-n", "vpn", "patch", "vgw", "hq", "--type=merge", "-p", `{"spec":{"clusterTraffic":{"nodeLink":"`+mode+`"}}}`)
}

// told sees that the gateway pod's CiliumEndpoint has a range, or has not.
func (w *world) told(half string, want bool) func() error {
	return func() error {
		out, err := w.TryKubectl("-n", "vpn", "get", "ciliumendpoint", "culvert-hq-0", "-o", "jsonpath={.status.networking.addressing}")
		if err == nil && strings.Contains(out, half) != want {
			err = fmt.Errorf("the endpoint has %s", out)
		}
		return err
	}
}

// carried are all flows, as they are when Cilium carries them: a node is seen at the address that it
// has there.
func (w *world) carried() []flow {
	flows := w.flows()
	for i, f := range flows {
		if strings.HasPrefix(f.name, "node ") {
			flows[i].want = "client="
		}
	}
	return flows
}

// endpointsWay: Cilium carries what sites and devices exchange with the cluster; whatever it puts back
// is put right again, and no more of it is changed than must be.
func (w *world) endpointsWay(t *testing.T) {
	w.nodeLink("CiliumEndpoint")
	w.gatewayIsNew(t, "CiliumEndpoint")
	labtest.Eventually(t, 60*time.Second, "the endpoint has the site's range", w.told(siteHalf, true))
	before := w.spoofed()
	works(t, 60*time.Second, w.carried())
	w.nothingSpoofed(t, before)
	if out, err := w.doctor(t); err != nil || !strings.Contains(out, "nodeLink CiliumEndpoint: the agent on the gateway's node") {
		t.Errorf("culvert doctor: %v: %s", err, out)
	}
	here, there := w.gatewaysNode(t)
	w.verifies(t, here, false)
	t.Run("a policy names the range", func(t *testing.T) { w.named(t, there) })
	t.Run("relabelled", w.toldAgain)
	t.Run("agent restarts", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		watch := w.watchEndpoint(t)
		start := time.Now()
		if err := here.RestartCilium(ctx); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, 60*time.Second, "the endpoint has the site's range", w.told(siteHalf, true))
		works(t, 60*time.Second, w.carried())
		t.Logf("all works %s after Cilium's agent was killed", time.Since(start).Round(100*time.Millisecond))
		watch.held(t)
		w.verifies(t, here, false)
	})
	t.Run("a Site goes", func(t *testing.T) {
		w.In(t).Apply(other)
		labtest.Eventually(t, 20*time.Second, "the endpoint has the other site's range", w.told(otherHalf, true))
		labtest.Eventually(t, 20*time.Second, there.Name+" knows the way to it", w.knows(there, otherHalf, true))
		w.In(t).Kubectl("-n", "vpn", "delete", "site", "other")
		labtest.Eventually(t, 20*time.Second, "the endpoint has it no more", w.told(otherHalf, false))
		labtest.Eventually(t, 20*time.Second, there.Name+" knows no way to it", w.knows(there, otherHalf, false))
	})
	w.nodeLink("Encapsulated")
	w.gatewayIsNew(t, "")
	labtest.Eventually(t, 60*time.Second, "the endpoint has no range", w.told(siteHalf, false))
	labtest.Eventually(t, 20*time.Second, there.Name+" knows no way to it", w.knows(there, siteHalf, false))
	works(t, 60*time.Second, w.flows())
	here, _ = w.gatewaysNode(t)
	w.verifies(t, here, true)
}

// endpointsWayRefused: where packets between nodes travel as they are, a condition and the doctor say
// that this link is not to be had, and what is; the link that was goes on.
func (w *world) endpointsWayRefused(t *testing.T) {
	w.nodeLink("CiliumEndpoint")
	for _, c := range []string{"Accepted", "Ready"} {
		w.In(t).Kubectl("-n", "vpn", "wait", "vpngateway/hq", "--for=condition="+c+"=False", "--timeout=30s")
		out := w.Kubectl("-n", "vpn", "get", "vgw", "hq", "-o", `jsonpath={.status.conditions[?(@.type=="`+c+`")]}`)
		if !strings.Contains(out, `"reason":"NetworkPlugin"`) || !strings.Contains(out, "set Encapsulated") || !strings.Contains(out, "Encapsulated, the last good link, stays in use") {
			t.Errorf("%s is %s", c, out)
		}
	}
	if out, err := w.doctor(t); err == nil || !strings.Contains(out, "nodeLink CiliumEndpoint is refused") {
		t.Errorf("culvert doctor: %v: %s", err, out)
	}
	works(t, 20*time.Second, w.flows())
	w.nodeLink("Encapsulated")
	w.Kubectl("-n", "vpn", "wait", "vpngateway/hq", "--for=condition=Accepted", "--timeout=30s")
	w.gatewayIsNew(t, "")
	works(t, 60*time.Second, w.flows())
}

// gatewaysNode is the node that the gateway's pod is on, and another one.
func (w *world) gatewaysNode(t *testing.T) (here, there *cluster.Node) {
	t.Helper()
	name := w.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.spec.nodeName}")
	if w.Nodes[0].Name == name {
		return w.Nodes[0], w.Nodes[1]
	}
	return w.Nodes[1], w.Nodes[0]
}

// verifies sees whether Cilium verifies the sources of the gateway's pod, and that it does those of
// all others of its node.
func (w *world) verifies(t *testing.T, n *cluster.Node, want bool) {
	t.Helper()
	labtest.Eventually(t, 20*time.Second, "Cilium's options of the endpoints", func() error {
		out, err := n.CiliumDebug(context.Background(), "endpoint", "list", "-o",
			`jsonpath={range [*]}{.status.external-identifiers.k8s-pod-name}={.status.realized.options.SourceIPVerification}{" "}{end}`)
		if err != nil {
			return err
		}
		others := 0
		for pair := range strings.FieldsSeq(out) {
			pod, option, _ := strings.Cut(pair, "=")
			expected := "Enabled"
			if pod == "culvert-hq-0" && !want {
				expected = "Disabled"
			} else if strings.HasPrefix(pod, "web-") {
				others++
			}
			if option != expected {
				return fmt.Errorf("pod %q: sources verified: %s, want %s", pod, option, expected)
			}
		}
		if others == 0 {
			return fmt.Errorf("the web pod is not among them: %s", out)
		}
		return nil
	})
}

// knows sees whether a node's Cilium has a prefix, and a way to another node for it.
func (w *world) knows(n *cluster.Node, prefix string, want bool) func() error {
	return func() error {
		out, err := n.CiliumDebug(context.Background(), "bpf", "ipcache", "list")
		found := false
		for line := range strings.Lines(out) {
			found = found || strings.HasPrefix(line, prefix+" ") && strings.Contains(line, "tunnelendpoint=172.30.0.")
		}
		if err == nil && found != want {
			err = fmt.Errorf("%s: %v, want %v", prefix, found, want)
		}
		return err
	}
}

// named: a policy that names exactly the site's range comes and goes, and nothing is lost.
func (w *world) named(t *testing.T, there *cluster.Node) {
	probes := w.probes(t)
	time.Sleep(time.Second)
	w.In(t).Apply(namesTheRange)
	labtest.Eventually(t, 20*time.Second, "Cilium knows the range by the policy, too", func() error {
		out, err := there.CiliumDebug(context.Background(), "bpf", "ipcache", "list")
		if err == nil && !strings.Contains(out, siteCIDR+" ") {
			err = fmt.Errorf("it does not")
		}
		return err
	})
	time.Sleep(2 * time.Second)
	w.In(t).Kubectl("-n", "apps", "delete", "ciliumnetworkpolicy", "names-the-range")
	time.Sleep(2 * time.Second)
	unharmed(t, probes)
}

// toldAgain: the gateway's pod gets another identity, with which Cilium writes its endpoint anew; the
// ranges are there again within a second.
func (w *world) toldAgain(t *testing.T) {
	watch := w.watchEndpoint(t)
	for i, value := range []string{"one", "two"} {
		w.In(t).Kubectl("-n", "vpn", "label", "pod", "culvert-hq-0", "told="+value, "--overwrite")
		labtest.Eventually(t, 40*time.Second, "Cilium writes its own", func() error { return watch.seen(i + 1) })
	}
	watch.held(t)
	works(t, 60*time.Second, w.carried())
}

// endpointWatch notes for how long the CiliumEndpoint was without the site's range.
type endpointWatch struct {
	mu   sync.Mutex
	lost time.Time // zero: it has it
	gaps []time.Duration
}

func (w *world) watchEndpoint(t *testing.T) *endpointWatch {
	t.Helper()
	x := &endpointWatch{}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, w.Program("kubectl"), "--kubeconfig", w.Kubeconfig(), "-n", "vpn", "get", "ciliumendpoint", "culvert-hq-0", "--watch", "-o", `jsonpath={.status.networking.addressing}{"\n"}`)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			now, has := time.Now(), strings.Contains(lines.Text(), siteHalf)
			x.mu.Lock()
			switch {
			case !has && x.lost.IsZero():
				x.lost = now
			case has && !x.lost.IsZero():
				x.gaps, x.lost = append(x.gaps, now.Sub(x.lost)), time.Time{}
			}
			x.mu.Unlock()
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() { cancel(); <-done })
	return x
}

// seen wants the range to have been away, and to be back, some times.
func (x *endpointWatch) seen(times int) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.gaps) < times || !x.lost.IsZero() {
		return fmt.Errorf("%d times so far, away since %s", len(x.gaps), x.lost)
	}
	return nil
}

// held wants the range to have been away for a second at most: the shortest time counts.
func (x *endpointWatch) held(t *testing.T) {
	t.Helper()
	x.mu.Lock()
	defer x.mu.Unlock()
	t.Logf("the endpoint was without the range for %v", x.gaps)
	if len(x.gaps) > 0 && slices.Min(x.gaps) > time.Second {
		t.Errorf("the endpoint was without the range for %s at best, want 1 s at most", slices.Min(x.gaps))
	}
}
