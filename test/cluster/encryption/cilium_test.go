package encryption

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// What a NodeEncryption asks of Cilium's values: that others may add to its network configuration,
// and packets that fit into encrypted ones.
var besideCilium = []string{"cni.exclusive=false", "MTU=1440"}

// nativeRouting is without tunnels between nodes.
var nativeRouting = []string{"routingMode=native", "autoDirectNodeRoutes=true", "ipv4NativeRoutingCIDR=10.244.0.0/16", "ipv6NativeRoutingCIDR=fd00:244::/32"}

// TestCilium is TestEncryption beside a real Cilium with kube-proxy, with and without tunnels between
// nodes.
func TestCilium(t *testing.T) {
	if labtest.Goal(1, 0) == 0 {
		t.Skip("CULVERT_GOALS=1 runs it: it takes five minutes, and test/cluster/cilium has the leak test without faults")
	}
	w := newWorld(t, cluster.Options{Nodes: 2, CNI: cluster.Cilium, CiliumValues: besideCilium})
	w.install()
	w.siteHost = w.site()
	t.Cleanup(w.explain)
	x := w.injector()
	w.works(t, w.requests())
	w.unlucky(t)
	t.Run("tunnel", func(t *testing.T) {
		w.besideCilium(t, x)
	})
	w.off(t)
	w.reconfigure(t, append(nativeRouting, besideCilium...)...)
	t.Run("native routing", func(t *testing.T) { w.besideCilium(t, x) })
	w.off(t)
}

// besideCilium is encryption in both scopes, and what may go wrong with it.
func (w *world) besideCilium(t *testing.T, x *injector) {
	w.heard()
	requests := append(w.requests(), w.nodePorts()...)
	w.works(t, requests)
	delivered := x.inject()
	if delivered[0] == 0 || delivered[1] == 0 {
		t.Fatalf("with encryption off %v of the injector's packets were delivered: the test proves nothing", delivered)
	}
	heard := w.heard()
	for _, n := range w.Nodes {
		if len(heard[n.Name]) < 20 {
			t.Fatalf("with encryption off %d packets in the clear were heard at %s: the test proves nothing", len(heard[n.Name]), n.Name)
		}
		t.Logf("encryption off: %d packets in the clear at %s", len(heard[n.Name]), n.Name)
	}
	w.encrypt()
	for i, n := range w.Nodes { // from now on somebody talks all the time
		to := w.ips("web-" + w.Nodes[(i+1)%len(w.Nodes)].Name)
		w.talker("talker-"+n.Name, n.Name, url(to[0]), url(to[1]))
	}
	for _, n := range w.Nodes {
		w.Wait(namespace, "talker-"+n.Name)
	}
	w.works(t, requests)
	w.silence(t, "steady")
	t.Run("plain packets from outside", func(t *testing.T) {
		if now := x.inject(); now != delivered {
			t.Errorf("%v packets of the injector's were delivered, with encryption off %v", now, delivered)
		}
		w.heard()
	})
	t.Run("large packets", w.whole)
	t.Run("agents killed", func(t *testing.T) { w.killed(t, x) })
	t.Run("undone by hand", w.undone)
	t.Run("peer deleted", w.forgotten)
	if w.tunnels() || labtest.Goal(1, 0) == 1 { // what agents do then does not depend on Cilium
		t.Run("upgrade and rollback under load", w.upgrade)
		t.Run("key rotation", w.rotation)
	}
	t.Run("policy changed", w.policyChanged)
	t.Run("Cilium's agents killed", w.ciliumKilled)
	t.Run("scope Pods", func(t *testing.T) {
		w.Apply(strings.Replace(encryption("Strict"), "All", "Pods", 1))
		w.works(t, requests)
		w.heard() // while it changed
		w.works(t, requests)
		for node, lines := range w.heard() {
			for _, l := range lines {
				for _, inside := range []string{".8472:", ".19604:", "10.244.", "fd00:244:", "192.168.50.", "fd00:50:"} {
					if strings.Contains(l, inside) {
						t.Errorf("in the clear at %s: %s", node, l)
						break
					}
				}
			}
		}
		w.Apply(encryption("Strict"))
		w.enforced()
	})
}

// tunnels tells whether Cilium has tunnels between nodes.
func (w *world) tunnels() bool {
	return w.Kubectl("-n", "kube-system", "get", "configmap", "cilium-config", "-o", "jsonpath={.data.routing-mode}") == "tunnel"
}

// nodePorts are requests for a pod by a port of any node, also from outside.
func (w *world) nodePorts() []request {
	var out []request
	known := w.addresses()
	for i, a := range w.Nodes {
		b := w.Nodes[(i+1)%len(w.Nodes)]
		for _, on := range w.Nodes {
			port := known["Service/web-"+on.Name][1]
			inside, outside := fmt.Sprintf("http://%s:%s/", b.IPs()[0], port), fmt.Sprintf("http://%s:%s/", a.ExternalIPs()[0], port)
			out = append(out,
				request{"a pod of " + a.Name + " to a port of " + b.Name + ", pod on " + on.Name, func() (string, error) { return w.inPod("web-"+a.Name, "get", inside) }},
				request{"host " + a.Name + " to a port of " + b.Name + ", pod on " + on.Name, func() (string, error) { return w.onNode(a, "get", inside) }},
				request{"outside to a port of " + a.Name + ", pod on " + on.Name, func() (string, error) {
					ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
					defer cancel()
					return w.siteHost.Output(ctx, w.TestServer(), "get", outside)
				}})
		}
	}
	return out
}

// whole: what pods send in full packets is not cut into pieces on its way.
func (w *world) whole(t *testing.T) {
	pieces := func() (sum string) {
		for _, n := range w.Nodes {
			sum += w.run(t, n, `awk '$1 == "Ip:" && !col { for (i = 1; i <= NF; i++) if ($i == "FragCreates") col = i; next } $1 == "Ip:" { print $col }' /proc/net/snmp`)
		}
		return sum
	}
	before := pieces()
	for i, n := range w.Nodes {
		to := w.ips("web-" + w.Nodes[(i+1)%len(w.Nodes)].Name)[0]
		labtest.Eventually(t, 20*time.Second, "a million bytes", func() error { _, err := w.inPod("web-"+n.Name, "hash", url(to)+"bytes?n=1000000"); return err })
	}
	if now := pieces(); now != before {
		t.Errorf("fragments made, by node: %q, before %q", now, before)
	}
	w.silence(t, "large packets")
}

// policyChanged: a policy that lets the nodes' pods talk comes and goes while they do.
func (w *world) policyChanged(t *testing.T) {
	o := w.watch(t, w.flows(t, w.Nodes[0]))
	w.In(t).Apply(`apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: own, namespace: ` + namespace + `}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {}}, {ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]}]
  egress: [{to: [{podSelector: {}}, {ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]}]
`)
	time.Sleep(3 * time.Second)
	w.In(t).Kubectl("-n", namespace, "delete", "networkpolicy", "own")
	o.event = time.Now() // to the policy, nodes are neither pods nor a part of the world
	o.over("policy changed")
	w.silence(t, "policy changed")
}

// ciliumKilled: Cilium's agents, all at once, load all their programs anew.
func (w *world) ciliumKilled(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	flows := w.flows(t, w.Nodes[0])
	o := w.watch(t, flows)
	var group sync.WaitGroup
	for _, n := range w.Nodes {
		group.Go(func() {
			if err := n.RestartCilium(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	o.over("Cilium's agents killed")
	w.silence(t, "Cilium's agents killed")
}

// reconfigure gives Cilium other values.
func (w *world) reconfigure(t *testing.T, values ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := w.SetCilium(ctx, values...); err != nil {
		t.Fatal(err)
	}
}

// off ends encryption, and sees that nothing of it is left.
func (w *world) off(t *testing.T) {
	t.Helper()
	w.Kubectl("delete", "nodeencryption", "cluster", "--ignore-not-found")
	for _, n := range w.Nodes {
		w.Kubectl("-n", namespace, "delete", "pod", "talker-"+n.Name)
	}
	for _, n := range w.Nodes {
		labtest.Eventually(t, 20*time.Second, n.Name+" has nothing of it any more", func() error { return nothingLeft(n) })
	}
	w.works(t, w.requests())
}

// unlucky gives the pods identities whose numbers look like Culvert's marks (0x…c3, 0x…c1):
// Cilium writes them into the marks of what the pods send.
func (w *world) unlucky(t *testing.T) {
	t.Helper()
	for i, n := range w.Nodes {
		pod, number := "web-"+n.Name, fmt.Sprint([]int{0x30c3, 0x30c1}[i])
		identity := func() (string, error) {
			return w.TryKubectl("-n", namespace, "get", "ciliumendpoint", pod, "-o", "jsonpath={.status.identity.id}")
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
		w.Apply(string(b))
		w.Kubectl("-n", namespace, "label", "pod", pod, "luck=none")
		labtest.Eventually(t, 20*time.Second, pod+" has the identity "+number, func() error {
			if now, err := identity(); err != nil || now != number {
				return errors.Join(fmt.Errorf("has %s", now), err)
			}
			return nil
		})
	}
}
