package encryption

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// What a NodeEncryption asks of Cilium's values: packets that fit into encrypted ones, and, so that pods of a booting
// node wait, that others may add to Cilium's network configuration.
var (
	fitting      = []string{"MTU=1440"}
	besideCilium = append([]string{"cni.exclusive=false"}, fitting...)
)

// nativeRouting is without tunnels between nodes.
var nativeRouting = []string{"routingMode=native", "autoDirectNodeRoutes=true", "ipv4NativeRoutingCIDR=10.244.0.0/16", "ipv6NativeRoutingCIDR=fd00:244::/32"}

// TestCilium is TestEncryption beside a real Cilium with kube-proxy: with tunnels between nodes, and, after they were
// taken away while nothing may leave in the clear, with native routing. The faults that Cilium has least to do
// with run with CULVERT_GOALS=1 only: they take ten minutes.
func TestCilium(t *testing.T) {
	all := labtest.Goal(1, 0) == 1
	w := newWorld(t, cluster.Options{Nodes: 2, CNI: cluster.Cilium, CiliumValues: besideCilium})
	w.install()
	w.siteHost = w.site()
	t.Cleanup(w.explain)
	x := w.injector()
	w.unlucky(t)
	w.noticed(t, x, append(w.requests(), w.beyondPods()...))
	w.encrypt()
	t.Run("tunnel", func(t *testing.T) {
		w.besideCilium(t, x, all)
		if all {
			t.Run("address changed", w.moved)
			t.Run("boot without an agent", w.boot)
		}
	})
	t.Run("tunnels taken away", func(t *testing.T) { w.reconfigured(t, append(nativeRouting, fitting...)) })
	t.Run("native routing", func(t *testing.T) {
		w.besideCilium(t, x, all)
		w.podsHeld(t, "False") // Cilium would have taken our network configuration away
		if all {
			t.Run("address changed", w.moved)
			w.reconfigured(t, append(nativeRouting, besideCilium...))
			w.podsHeld(t, "True")
			t.Run("boot without an agent", w.boot)
		}
	})
	t.Run("off", func(t *testing.T) {
		w.off(t)
		w.noticed(t, x, append(w.requests(), w.beyondPods()...))
	})
}

// besideCilium is encryption in both scopes, and what may go wrong with it; all of that, or what Cilium has to do
// with.
func (w *world) besideCilium(t *testing.T, x *injector, all bool) {
	w.talkers(t)
	requests := append(w.requests(), w.beyondPods()...)
	w.works(t, requests)
	w.silence(t, "steady")
	t.Run("plain packets from outside", func(t *testing.T) {
		x.inVain(t)
		w.heard()
	})
	t.Run("large packets", w.whole)
	t.Run("agents killed", func(t *testing.T) { w.killed(t, x) })
	t.Run("undone by hand", w.undone)
	if all || w.tunnels() { // otherwise they have just been replaced
		t.Run("upgrade and rollback under load", w.upgrade)
		t.Run("Cilium's agents killed", w.ciliumKilled)
	}
	t.Run("scope Pods", func(t *testing.T) { w.scopePods(t, requests) })
	if all {
		t.Run("peer deleted", w.forgotten)
		t.Run("key rotation", w.rotation)
		t.Run("policy changed", w.policyChanged)
	}
}

// reconfigured gives Cilium other values while pods and hosts talk, and waits until they do again.
func (w *world) reconfigured(t *testing.T, values []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := w.SetCilium(ctx, values...); err != nil {
		t.Fatal(err)
	}
	requests := w.requests()
	labtest.Eventually(t, time.Minute, "with other values of Cilium's "+requests[0].what, func() error { _, err := requests[0].do(); return err })
	w.works(t, requests)
	w.silence(t, "with other values of Cilium's")
}

// scopePods encrypts what pods and sites say only, and all again: then hosts are heard, and nothing else.
func (w *world) scopePods(t *testing.T, requests []request) {
	w.scope(t, "Pods")
	w.works(t, requests)
	w.heard() // while it changed
	w.works(t, requests)
	heard := w.heard()
	for _, n := range w.Nodes {
		hosts := 0
		for _, l := range heard[n.Name] {
			if inside := slices.ContainsFunc([]string{".8472", ".19604", "10.244.", "fd00:244:", "192.168.50.", "fd00:50:"}, func(s string) bool { return strings.Contains(l, s) }); inside {
				t.Errorf("in the clear at %s: %s", n.Name, l)
			} else {
				hosts++
			}
		}
		if hosts == 0 {
			t.Errorf("nothing that hosts say is heard at %s: the test proves nothing", n.Name)
		}
	}
	w.scope(t, "All")
	time.Sleep(time.Second) // what was under way
	w.heard()
}

// scope changes the scope of encryption, and waits until the guards have it.
func (w *world) scope(t *testing.T, scope string) {
	t.Helper()
	w.Apply(strings.Replace(encryption("Strict"), "All", scope, 1))
	w.enforced()
	for _, n := range w.Nodes {
		labtest.Eventually(t, 20*time.Second, "the scope is "+scope+" on "+n.Name, func() error {
			out, err := n.Output(context.Background(), "nft", "list", "chain", "inet", "culvert-guard", "prerouting")
			if err == nil && strings.Contains(out, "goto in_hosts") != (scope == "All") {
				err = fmt.Errorf("not yet: %s", out)
			}
			return err
		})
	}
}

// podsHeld waits until the agents of all nodes say whether pods of a booting node would wait.
func (w *world) podsHeld(t *testing.T, want string) {
	t.Helper()
	for _, n := range w.Nodes {
		labtest.Eventually(t, time.Minute, "PodsHeld of "+n.Name+" is "+want, func() error {
			out, err := w.TryKubectl("get", "nodetunnel", n.Name, "-o", `jsonpath={.status.conditions[?(@.type=="PodsHeld")].status}`)
			if err == nil && out != want {
				err = fmt.Errorf("it is %q", out)
			}
			return err
		})
	}
}

// tunnels tells whether Cilium has tunnels between nodes.
func (w *world) tunnels() bool {
	return w.Kubectl("-n", "kube-system", "get", "configmap", "cilium-config", "-o", "jsonpath={.data.routing-mode}") == "tunnel"
}

// beyondPods are requests for a pod by a port of any node, also from outside, and those of nodes for the site.
func (w *world) beyondPods() []request {
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
		out = append(out, request{"host " + a.Name + " to the site", func() (string, error) {
			return w.answers(a.IPs()[0].String(), func() (string, error) { return w.onNode(a, "get", url(siteIP)) })
		}})
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
	o.longest("Cilium's agents killed")
	w.silence(t, "Cilium's agents killed")
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
