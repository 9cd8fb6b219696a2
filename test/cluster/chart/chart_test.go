// Package chart_test installs, upgrades and uninstalls the chart in a real cluster, with the
// real helm and the image of this checkout.
package chart_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// values makes a gateway and a device with the release.
const values = `
gateways:
  main:
    spec:
      deviceCIDRs: [10.99.0.0/24]
      expose: {type: NodePort}
devices:
  laptop: {spec: {gatewayRef: {name: main}}}
`

// elsewhere is what a person made in a namespace of their own.
const elsewhere = `
apiVersion: v1
kind: Namespace
metadata: {name: team}
---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: own, namespace: team}
spec: {deviceCIDRs: [10.98.0.0/24], expose: {type: NodePort}}
---
apiVersion: culvert.dev/v1alpha1
kind: Device
metadata: {name: phone, namespace: team}
spec: {gatewayRef: {name: own}}
`

// TestRelease is the life of a release: each step works on what the one before left. In the cluster that
// it leaves as it was, the values files of examples/ are installed.
func TestRelease(t *testing.T) {
	c := clustertest.Start(t, cluster.Options{})
	file := write(t, values)
	start, before, nodesBefore := time.Now(), everything(t, c), nodes(t, c)

	c.Install("--values", file)
	c.Apply(elsewhere)
	t.Cleanup(func() { _, _ = c.TryKubectl("delete", "namespace", "team", "--ignore-not-found", "--wait=false") })
	ready(t, c, clustertest.System, "vpngateway/main", "device/laptop")
	ready(t, c, "team", "vpngateway/own", "device/phone")
	key := c.Kubectl("get", "vpngateway", "own", "-n", "team", "-o", "jsonpath={.status.publicKey}")

	t.Run("the image's root is read-only", func(t *testing.T) { testReadOnly(t, c) })
	t.Run("restricted", func(t *testing.T) { testRestricted(t, c) })
	t.Run("rights", func(t *testing.T) { testRights(t, c) })
	t.Run("policies", func(t *testing.T) { testPolicies(t, c) })
	t.Run("upgrade", func(t *testing.T) { testUpgrade(t, c, file) })
	t.Run("nothing was forbidden", func(t *testing.T) { testForbidden(t, c, start) })
	t.Run("uninstall", func(t *testing.T) { testUninstall(t, c, before, nodesBefore) })
	t.Run("install again", func(t *testing.T) {
		c.Install("--values", file)
		ready(t, c, clustertest.System, "vpngateway/main", "device/laptop")
		ready(t, c, "team", "vpngateway/own", "device/phone")
		if again := c.Kubectl("get", "vpngateway", "own", "-n", "team", "-o", "jsonpath={.status.publicKey}"); again != key {
			t.Errorf("the gateway that outlived the release had key %s, and has %s now", key, again)
		}
	})
	t.Run("nothing hangs without an operator", func(t *testing.T) { testDeletion(t, c, before) })
	if !t.Failed() { // they begin with nothing
		testExamples(t, c)
	}
}

func write(t *testing.T, text string) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "values-*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// ready waits until objects are Ready.
func ready(t *testing.T, c *clustertest.Cluster, namespace string, objects ...string) {
	t.Helper()
	for _, o := range objects {
		if out, err := c.TryKubectl("wait", "-n", namespace, o, "--for=condition=Ready", "--timeout=90s"); err != nil {
			say, _ := c.TryKubectl("get", "-n", namespace, o, "-o", "yaml")
			pods, _ := c.TryKubectl("get", "pods,events", "-n", namespace, "-o", "wide")
			t.Fatalf("%v: %s\n%s\n%s", err, out, say, pods)
		}
	}
}

// everything lists the objects of the cluster as kind/namespace/name, but for those that come
// and go by themselves.
func everything(t *testing.T, c *clustertest.Cluster) []string {
	t.Helper()
	kinds := strings.Fields(c.Kubectl("api-resources", "--verbs=list", "-o", "name"))
	var list []string
	out := c.Kubectl("get", strings.Join(kinds, ","), "-A", "--ignore-not-found",
		"-o", `jsonpath={range .items[*]}{.kind}.{.apiVersion}{"/"}{.metadata.namespace}{"/"}{.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		kind, rest, _ := strings.Cut(line, "/")
		switch {
		case strings.HasPrefix(kind, "Event."), strings.HasPrefix(kind, "EndpointSlice."), strings.HasPrefix(kind, "Endpoints."), strings.HasPrefix(kind, "IPAddress."):
		case strings.Contains(rest, "/kube-system/"), strings.Contains(rest, "/kube-node-lease/"):
		default:
			list = append(list, line)
		}
	}
	slices.Sort(list)
	return list
}

// added is what is in after and not in before.
func added(before, after []string) (out []string) {
	for _, line := range after {
		if _, found := slices.BinarySearch(before, line); !found {
			out = append(out, line)
		}
	}
	return out
}

// nodes shows what there is of Culvert's on the nodes.
func nodes(t *testing.T, c *clustertest.Cluster) string {
	t.Helper()
	var b strings.Builder
	for _, n := range c.Nodes {
		for _, command := range []string{
			"ip -o link show | grep -o 'cvt[^:@]*'", "ip rule", "ip -6 rule", "ip route show table all | grep 'proto 196'", "ip -6 route show table all | grep 'proto 196'",
			"nft list tables | grep culvert", "ip neigh show | grep cvt", "bridge fdb | grep cvt",
		} {
			out, _ := n.Output(context.Background(), "sh", "-c", command) // grep finds nothing: the wanted case
			fmt.Fprintf(&b, "%s: %s\n%s", n.Name, command, out)
		}
		annotation := c.Kubectl("get", "node", n.Name, "-o", `jsonpath={.metadata.annotations.culvert\.dev/node-link-addresses}`)
		fmt.Fprintf(&b, "%s: annotation %q\n", n.Name, annotation)
	}
	return b.String()
}

func testReadOnly(t *testing.T, c *clustertest.Cluster) {
	for pod, container := range map[string]string{"deploy/culvert-operator": "operator", "ds/culvert-agent": "agent", "culvert-main-0": "culvert"} {
		out, err := c.TryKubectl("exec", "-n", clustertest.System, pod, "-c", container, "--", "sh", "-c", "echo >/usr/x")
		if err == nil || !strings.Contains(err.Error()+out, "Read-only file system") {
			t.Errorf("%s can write to its image: %v %s", pod, err, out)
		}
	}
}

// testRestricted asks the API server which pods it would not let in under "restricted".
func testRestricted(t *testing.T, c *clustertest.Cluster) {
	out := c.Kubectl("label", "namespace", clustertest.System, "--dry-run=server", "--overwrite", "pod-security.kubernetes.io/enforce=restricted")
	if strings.Contains(out, "operator") {
		t.Errorf("the operator is not restricted: %s", out)
	}
	if !strings.Contains(out, "culvert-agent") {
		t.Errorf("the check says nothing of the agent, which is privileged: %s", out)
	}
}

// testUpgrade breaks a CRD as an older version of the chart would have it, and changes values.
func testUpgrade(t *testing.T, c *clustertest.Cluster, file string) {
	const property = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/suspend"
	c.Kubectl("patch", "crd", "devices.culvert.dev", "--type=json", "-p", `[{"op":"remove","path":"`+property+`"}]`)
	uid := c.Kubectl("get", "device", "laptop", "-n", clustertest.System, "-o", "jsonpath={.metadata.uid} {.status.addresses}")

	c.Upgrade("--values", file, "--set", "operator.replicas=1,gatewayPods.resources.requests.cpu=60m,devices.laptop.spec.suspend=true")

	if out := c.Kubectl("get", "device", "laptop", "-n", clustertest.System, "-o", "jsonpath={.spec.suspend}"); out != "true" {
		t.Errorf("a field that is new in the CRD is %q after the upgrade", out)
	}
	if again := c.Kubectl("get", "device", "laptop", "-n", clustertest.System, "-o", "jsonpath={.metadata.uid} {.status.addresses}"); again != uid {
		t.Errorf("the device was %s and is %s", uid, again)
	}
	if out := c.Kubectl("get", "deploy", "culvert-operator", "-n", clustertest.System, "-o", "jsonpath={.status.replicas}"); out != "1" {
		t.Errorf("the operator has %s replicas", out)
	}
	labtest.Eventually(t, 30*time.Second, "the gateway's pods follow gatewayPods.resources", func() error {
		out, err := c.TryKubectl("get", "statefulset", "culvert-main", "-n", clustertest.System, "-o", "jsonpath={.spec.template.spec.containers[0].resources.requests.cpu}")
		if err == nil && out != "60m" {
			err = fmt.Errorf("cpu is %s", out)
		}
		return err
	})
	if out := c.Kubectl("get", "job,cm,sa,clusterrole,clusterrolebinding", "-A", "-o", "name"); strings.Contains(out, "culvert-crds") {
		t.Errorf("the upgrade left its Job behind: %s", out)
	}
}

func testUninstall(t *testing.T, c *clustertest.Cluster, before []string, nodesBefore string) {
	c.Helm("uninstall", clustertest.Release, "--namespace", clustertest.System, "--wait", "--timeout=60s")
	// What stays: CRDs, and what people made, with its data.
	stays := []string{
		"CustomResourceDefinition.apiextensions.k8s.io/v1//", "APIService.apiregistration.k8s.io/v1//v1alpha1.culvert.dev", "/team/own", "/team/phone", "/team/culvert-own-key", "/team/culvert-own-endpoints",
		"/team/culvert-own-10-98-0-2", "/team/phone-wireguard", "Namespace.v1//team", "Namespace.v1//culvert-system",
		"/kube-root-ca.crt", "ServiceAccount.v1/team/default", "ServiceAccount.v1/culvert-system/default",
	}
	labtest.Eventually(t, 30*time.Second, "nothing but data is left", func() error {
		left := added(before, everything(t, c))
		left = slices.DeleteFunc(left, func(o string) bool {
			return slices.ContainsFunc(stays, func(s string) bool { return strings.Contains(o, s) })
		})
		if len(left) > 0 {
			return fmt.Errorf("left: %s", strings.Join(left, ", "))
		}
		return nil
	})
	labtest.Eventually(t, 30*time.Second, "the nodes are as before", func() error {
		if have := nodes(t, c); have != nodesBefore {
			return fmt.Errorf("before:\n%s\nnow:\n%s", nodesBefore, have)
		}
		return nil
	})
}

// testDeletion: objects and CRDs go at once when nobody is left who could say yes.
func testDeletion(t *testing.T, c *clustertest.Cluster, before []string) {
	c.Helm("uninstall", clustertest.Release, "--namespace", clustertest.System, "--wait", "--timeout=60s")
	c.Kubectl("delete", "-n", "team", "vpngateway/own", "device/phone", "--timeout=10s")
	crds := strings.Fields(c.Kubectl("get", "crd", "-o", "name"))
	crds = slices.DeleteFunc(crds, func(n string) bool { return !strings.HasSuffix(n, ".culvert.dev") })
	if len(crds) < 6 {
		t.Errorf("the CRDs that the release left are %q", crds)
	}
	c.Kubectl(append([]string{"delete", "--timeout=30s", "namespace/" + clustertest.System, "namespace/team"}, crds...)...)
	labtest.Eventually(t, 30*time.Second, "the cluster is as before", func() error {
		if left := added(before, everything(t, c)); len(left) > 0 {
			return fmt.Errorf("left: %s", strings.Join(left, ", "))
		}
		return nil
	})
}

// testForbidden: nobody of ours was refused anything, so that no right is missing.
func testForbidden(t *testing.T, c *clustertest.Cluster, start time.Time) {
	text, err := os.ReadFile(c.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	var requests int
	seen := make(map[string]bool)
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		var e struct {
			StageTimestamp time.Time
			Verb           string
			User           struct {
				Username string
				Extra    map[string][]string
			}
			ObjectRef        struct{ APIGroup, Resource, Subresource, Namespace, Name string }
			ResponseStatus   struct{ Code int }
			ImpersonatedUser *struct{ Username string }
		}
		if json.Unmarshal(s.Bytes(), &e) != nil || !strings.Contains(e.User.Username, ":culvert-") || e.ImpersonatedUser != nil || e.StageTimestamp.Before(start) {
			continue
		}
		requests++
		if e.ResponseStatus.Code == 403 || e.ResponseStatus.Code == 422 {
			line := fmt.Sprintf("%s may not %s %s.%s/%s %s/%s: %d", e.User.Username, e.Verb, e.ObjectRef.Resource, e.ObjectRef.APIGroup,
				e.ObjectRef.Subresource, e.ObjectRef.Namespace, e.ObjectRef.Name, e.ResponseStatus.Code)
			if !seen[line] {
				t.Error(line)
			}
			seen[line] = true
		}
	}
	if requests < 100 {
		t.Errorf("the audit log has %d requests of Culvert's only", requests)
	}
}
