package encryption

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// noAgent is a label of nodes that the agents of this test keep away from.
const noAgent = "culvert.dev/test-no-agent"

const agentAffinity = `agent.affinity={"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"` + noAgent + `","operator":"DoesNotExist"}]}]}}}`

const (
	chain  = "/etc/cni/net.d/0-culvert.conflist"
	owners = "/etc/cni/net.d/10-cvk.conflist"
)

// waiting tells, on a node, whether our plug-in has a pod wait.
const waiting = `for p in /proc/[0-9]*; do
	if grep -q culvert-cni $p/cmdline && tr '\0' '\n' <$p/environ | grep -qx CNI_COMMAND=ADD; then exit 0; fi
done 2>/dev/null
exit 1`

// How long a booted node is watched without an agent.
const (
	goalAbsent  = 60
	guardAbsent = 15
)

// talker is a pod that asks for pages again and again, from its first moment on.
func (w *world) talker(name, node string, to ...string) {
	w.t.Helper()
	var gets strings.Builder
	for _, x := range to {
		fmt.Fprintf(&gets, "/server get %s & ", x)
	}
	w.Apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 0
  containers:
  - name: talker
    image: "%s"
    imagePullPolicy: Never
    command: [/bin/sh, -c, "while :; do %ssleep 0.5; done"]
`, name, namespace, node, cluster.TestImage, gets.String()))
}

// talkers are on each node, and talk to a pod of the next one in both families from now on.
func (w *world) talkers(t *testing.T) {
	t.Helper()
	for i, n := range w.Nodes {
		w.Kubectl("-n", namespace, "delete", "pod", "talker-"+n.Name, "--ignore-not-found")
		to := w.ips("web-" + w.Nodes[(i+1)%len(w.Nodes)].Name)
		w.talker("talker-"+n.Name, n.Name, url(to[0]), url(to[1]))
	}
	for _, n := range w.Nodes {
		w.Wait(namespace, "talker-"+n.Name)
	}
}

// held sees that our plug-in is behind the network plug-in, or that it is not.
func (w *world) held(t *testing.T, n *cluster.Node, want bool) {
	t.Helper()
	labtest.Eventually(t, 20*time.Second, fmt.Sprintf("the plug-in is in %s's chain: %v", n.Name, want), func() error {
		out, err := n.Run(context.Background(), "sh", "-c", "cat "+chain+" 2>/dev/null || true")
		if err == nil && strings.Contains(out, "culvert-cni") != want {
			err = fmt.Errorf("%q", out)
		}
		return err
	})
}

func (w *world) run(t *testing.T, n *cluster.Node, script string) string {
	t.Helper()
	out, err := n.Run(context.Background(), "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A node that boots without an agent: its pods get no network, so they say nothing. The
// agent comes, and they do.
func (w *world) boot(t *testing.T) {
	n, target := w.Nodes[1], url(w.ips("web-" + w.Nodes[0].Name)[0])
	w.held(t, n, true)
	w.Kubectl("label", "node", n.Name, noAgent+"=")
	t.Cleanup(func() { _, _ = w.TryKubectl("label", "node", n.Name, noAgent+"-") })
	labtest.Eventually(t, 40*time.Second, "no agent on "+n.Name, func() error {
		out, err := w.TryKubectl("-n", clustertest.System, "get", "pods", "-l", "app.kubernetes.io/component=agent", "--field-selector", "spec.nodeName="+n.Name, "-o", "name")
		if err == nil && out != "" {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	w.heard()
	if err := n.PowerOff(); err != nil {
		t.Fatal(err)
	}
	if err := n.PowerOn(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.listen(n)
	booted := time.Now()
	if out := w.run(t, n, "nft list tables"); strings.Contains(out, "culvert-guard") {
		t.Fatalf("a guard stands on a node that has just booted: the test proves nothing: %s", out)
	}
	if w.cilium { // which says nothing to other nodes; without it pods would get no network anyway
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := n.AwaitCilium(ctx); err != nil {
			t.Fatal(err)
		}
	}
	labtest.Eventually(t, time.Minute, "pods wait for the guard", func() error {
		_, err := n.Run(context.Background(), "sh", "-c", waiting)
		return err
	})
	absent := time.Duration(labtest.Goal(goalAbsent, guardAbsent)) * time.Second
	for time.Since(booted) < absent {
		time.Sleep(time.Second)
	}
	w.silence(t, fmt.Sprintf("%s booted and without an agent for %s", n.Name, time.Since(booted).Round(time.Second)))

	// The same without our plug-in: a pod talks, and it is heard.
	w.run(t, n, "mv "+chain+" /tmp/"+n.Namespace+"-chain")
	w.talker("control", n.Name, target)
	labtest.Eventually(t, time.Minute, "a pod that is not held is heard", func() error {
		if lines := w.heard()[w.Nodes[0].Name]; len(lines) == 0 {
			return fmt.Errorf("nothing is heard")
		}
		return nil
	})
	w.Kubectl("-n", namespace, "delete", "pod", "control", "--grace-period=0", "--force")
	w.run(t, n, "mv /tmp/"+n.Namespace+"-chain "+chain)

	w.Kubectl("label", "node", n.Name, noAgent+"-")
	start := time.Now()
	labtest.Eventually(t, 60*time.Second, "the guard is back", func() error {
		_, err := n.Run(context.Background(), "nft", "list", "table", "inet", "culvert-guard")
		return err
	})
	time.Sleep(300 * time.Millisecond) // what was under way
	w.heard()
	w.Wait(namespace, "talker-"+n.Name, "web-"+n.Name)
	took := time.Since(start)
	t.Logf("pods were back %s after the agent was let in", took.Round(100*time.Millisecond))
	if limit := time.Duration(labtest.Goal(goalRepair, guardRepair)) * time.Second; took > limit {
		t.Errorf("pods were back %s after the agent was let in, want %s at most", took.Round(100*time.Millisecond), limit)
	}
	w.works(t, w.requests())
	w.silence(t, "after the boot")
}

// The network configuration follows its owner; kubelet and container runtime may restart.
func (w *world) follows(t *testing.T) {
	n := w.Nodes[0]
	w.held(t, n, true)
	w.run(t, n, "sed -i 's/\"hairpinMode\": true/\"hairpinMode\": false/' "+owners)
	labtest.Eventually(t, 15*time.Second, "a change of the owner's is followed", func() error {
		out := w.run(t, n, "cat "+chain)
		if !strings.Contains(out, `"hairpinMode": false`) || !strings.Contains(out, "culvert-cni") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	for _, program := range []string{"containerd", "kubelet"} {
		if err := w.KillProgram(n.Name, program); err != nil {
			t.Fatal(err)
		}
	}
	pod := "after-restart"
	w.talker(pod, n.Name, url(w.ips("web-" + w.Nodes[1].Name)[0]))
	w.Wait(namespace, pod)
	w.Kubectl("-n", namespace, "delete", "pod", pod)
	w.works(t, w.requests())
	w.silence(t, "kubelet and containerd restarted")
}

// helm uninstall says what would happen, and removes nothing; the release can be upgraded
// afterwards.
func (w *world) uninstalled(t *testing.T) {
	out, err := w.TryHelm("uninstall", clustertest.Release, "--namespace", clustertest.System)
	if err == nil || !strings.Contains(err.Error(), "kubectl delete nodeencryption cluster") {
		t.Fatalf("uninstalled while Strict: %v: %s", err, out)
	}
	w.works(t, w.requests())
	w.silence(t, "an uninstallation that was refused")
	w.Helm("rollback", clustertest.Release, "1", "--namespace", clustertest.System)
}
