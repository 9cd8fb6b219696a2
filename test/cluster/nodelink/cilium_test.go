package nodelink

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// ciliumCRDs are those of the real thing, as its Go module has them.
func ciliumCRDs(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", "github.com/cilium/cilium@v1.20.2")
	cmd.Dir = t.TempDir() // outside of any module
	out, err := cmd.Output()
	var module struct{ Dir, Error string }
	if json.Unmarshal(out, &module) != nil || module.Dir == "" {
		labtest.Skip(t, fmt.Sprintf("needs the Go module github.com/cilium/cilium: %v %s", err, module.Error))
	}
	return filepath.Join(module.Dir, "pkg/k8s/apis/cilium.io/client/crds/v2")
}

// ciliumEndpoint plays Cilium's part against its real CRD in a real API server. It installs
// again what was uninstalled.
func (w *world) ciliumEndpoint(t *testing.T) {
	crds := ciliumCRDs(t)
	w = &world{Cluster: w.Last(t), t: t}
	w.Kubectl("apply", "--server-side", "-f", filepath.Join(crds, "ciliumendpoints.yaml"))
	const config = "nonMasqueradeCIDRs:\n- 10.0.0.0/8\nmasqLinkLocal: true\n"
	w.Kubectl("create", "configmap", "ip-masq-agent", "-n", "kube-system", "--from-literal=config="+config, "--from-literal=other=kept")
	w.Kubectl("create", "configmap", "cilium-config", "-n", "kube-system", "--from-literal=routing-mode=tunnel")
	t.Cleanup(func() {
		_, _ = w.TryKubectl("delete", "configmap", "ip-masq-agent", "cilium-config", "-n", "kube-system")
		_, _ = w.TryKubectl("delete", "crd", "ciliumendpoints.cilium.io")
	})
	w.Install("--set", "cilium.enabled=true")
	w.Namespace("link")
	w.Apply(strings.Replace(objects("Z2F0ZXdheS1nYXRld2F5LWdhdGV3YXktZ2F0ZXdheSE="), "  expose:", "  clusterTraffic: {nodeLink: CiliumEndpoint}\n  expose:", 1))
	w.Kubectl("-n", "link", "wait", "vgw/edge", "--for=condition=Ready", "--timeout=60s")
	// What was uninstalled has left the VPNGateway Ready: that says nothing of the new pod.
	labtest.Eventually(t, 60*time.Second, "the gateway's new pod has addresses", func() error {
		out, err := w.TryKubectl("-n", "link", "get", "pod", "culvert-edge-0", "-o", "jsonpath={.status.podIPs[*].ip} {.metadata.annotations}")
		if err == nil && (len(strings.Fields(out)) < 3 || !strings.Contains(out, `"config.cilium.io/disable-source-ip-verification":"true"`)) {
			err = fmt.Errorf("its addresses, and the annotation that lifts source verification: %q", out)
		}
		return err
	})
	w.Wait("link", "--all")
	ips := w.podIPs("culvert-edge-0")
	own := fmt.Sprintf(`{"ipv4":"%s","ipv6":"%s"}`, ips[0], ips[1])
	w.Apply("apiVersion: cilium.io/v2\nkind: CiliumEndpoint\nmetadata: {name: culvert-edge-0, namespace: link}\n" +
		"status: {id: 7, state: ready, networking: {node: 172.30.0.11, addressing: [" + own + "]}}\n")
	devices4, devices6 := `{"ipv4":"10.99.0.0/25"},{"ipv4":"10.99.0.128/25"}`, `{"ipv6":"fd00:99::/65"},{"ipv6":"fd00:99:0:0:8000::/65"}`
	all := []string{own, devices4, `{"ipv4":"192.168.50.0/25"},{"ipv4":"192.168.50.128/25"}`, `{"ipv6":"fd00:50::/65"},{"ipv6":"fd00:50:0:0:8000::/65"}`, devices6}
	w.addressing(5*time.Second, all)
	var rounds []float64
	for range 5 {
		w.Kubectl("-n", "link", "patch", "ciliumendpoint", "culvert-edge-0", "--type=json", "-p",
			`[{"op":"replace","path":"/status/networking/addressing","value":[`+own+`]}]`)
		rounds = append(rounds, w.addressing(5*time.Second, all).Seconds())
	}
	if took := labtest.Decisive(rounds, func(a, b float64) bool { return a < b }); took > 1 {
		t.Errorf("written again after %.2f s, want 1 s at most (rounds %.2f)", took, rounds)
	}
	w.masquerade("10.0.0.0/8 10.99.0.0/24 192.168.50.0/24 fd00:50::/64 fd00:99::/64")

	w.Kubectl("-n", "link", "delete", "site", "berlin")
	w.addressing(5*time.Second, []string{own, devices4, devices6})
	w.masquerade("10.0.0.0/8 10.99.0.0/24 fd00:99::/64")
	w.Kubectl("-n", "link", "patch", "vgw", "edge", "--type=merge", "-p", `{"spec":{"clusterTraffic":{"nodeLink":"Encapsulated"}}}`)
	w.masquerade("10.0.0.0/8")
	if s := w.Kubectl("-n", "kube-system", "get", "configmap", "ip-masq-agent", "-o", "jsonpath={.data.other} {.data.config} {.metadata.annotations}"); !strings.HasPrefix(s, "kept ") || !strings.Contains(s, "masqLinkLocal: true") || strings.Contains(s, "culvert") {
		t.Errorf("the ConfigMap is %s", s)
	}
}

// addressing waits until the CiliumEndpoint has these entries, and says for how long.
func (w *world) addressing(limit time.Duration, want []string) time.Duration {
	w.t.Helper()
	start := time.Now()
	var took time.Duration
	labtest.Eventually(w.t, limit, "the CiliumEndpoint is right", func() error {
		asked := time.Since(start)
		out := w.Kubectl("-n", "link", "get", "ciliumendpoint", "culvert-edge-0", "-o", "jsonpath={.status.networking.addressing}")
		if out != "["+strings.Join(want, ",")+"]" {
			return errors.New(out)
		}
		took = asked
		return nil
	})
	return took
}

// masquerade waits until ip-masq-agent's list is this.
func (w *world) masquerade(want string) {
	w.t.Helper()
	labtest.Eventually(w.t, 5*time.Second, "ip-masq-agent leaves alone "+want, func() error {
		out := w.Kubectl("-n", "kube-system", "get", "configmap", "ip-masq-agent", "-o", "jsonpath={.data.config}")
		var got []string
		for line := range strings.Lines(out) {
			if s, ok := strings.CutPrefix(strings.TrimSpace(line), "- "); ok {
				got = append(got, s)
			}
		}
		if !slices.Equal(got, strings.Fields(want)) {
			return errors.New(out)
		}
		return nil
	})
}
