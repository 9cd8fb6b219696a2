package chart_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// TestRights: no Secret, no wildcard, and the verbs that lead to more rights only where
// the design says so.
func TestRights(t *testing.T) {
	stronger := map[string][]string{
		"ClusterRole culvert-operator roles":        {"escalate", "bind"},
		"ClusterRole culvert-operator clusterroles": {"bind"},
	}
	for _, o := range objects(t, render(t, "--values", "testdata/full.values.yaml")) {
		if o.GetKind() != "ClusterRole" && o.GetKind() != "Role" {
			continue
		}
		var role rbacv1.ClusterRole
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &role); err != nil {
			t.Fatal(err)
		}
		for _, rule := range role.Rules {
			for _, resource := range rule.Resources {
				who := o.GetKind() + " " + o.GetName() + " " + resource
				if strings.HasPrefix(resource, "secrets") {
					t.Errorf("%s: the operator gives single Secrets, the chart none", who)
				}
				if strings.ContainsAny(resource+strings.Join(rule.APIGroups, ""), "*") {
					t.Errorf("%s of %q is a wildcard", who, rule.APIGroups)
				}
				for _, verb := range rule.Verbs {
					if slices.Contains([]string{"*", "escalate", "bind", "impersonate", "deletecollection"}, verb) && !slices.Contains(stronger[who], verb) {
						t.Errorf("%s may %s", who, verb)
					}
				}
				if resource == "clusterroles" && !slices.Equal(rule.ResourceNames, []string{"culvert-gateway"}) {
					t.Errorf("%s: names %q", who, rule.ResourceNames)
				}
			}
		}
	}
}

// TestRestricted: what needs no privilege has none (Pod Security Standards, "restricted").
func TestRestricted(t *testing.T) {
	list := objects(t, render(t, "--set", "front.enabled=true"))
	for name, kind := range map[string]string{"culvert-operator": "Deployment", "culvert-front": "Deployment", "culvert-crds": "Job"} {
		pod, _, _ := unstructured.NestedMap(find(t, list, kind, name).Object, "spec", "template", "spec")
		expect := func(in map[string]any, want any, path ...string) {
			t.Helper()
			have, _, _ := unstructured.NestedFieldNoCopy(in, path...)
			a, _ := json.Marshal(have)
			b, _ := json.Marshal(want)
			if string(a) != string(b) {
				t.Errorf("%s %s: %s is %s, want %s", kind, name, strings.Join(path, "."), a, b)
			}
		}
		expect(pod, true, "securityContext", "runAsNonRoot")
		expect(pod, "RuntimeDefault", "securityContext", "seccompProfile", "type")
		expect(pod, nil, "hostNetwork")
		containers, _ := pod["containers"].([]any)
		for _, c := range containers {
			c := c.(map[string]any)
			expect(c, false, "securityContext", "allowPrivilegeEscalation")
			expect(c, true, "securityContext", "readOnlyRootFilesystem")
			expect(c, []string{"ALL"}, "securityContext", "capabilities", "drop")
			expect(c, nil, "securityContext", "capabilities", "add")
			expect(c, nil, "securityContext", "privileged")
		}
	}
}

// TestDashboard: the dashboard asks for metrics that exist, by labels that they have.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile(chart + "/files/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	exists := metricNames(t)
	metric := regexp.MustCompile(`\b(culvert|wireguard)_[a-z_]+`)
	var asked int
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			for _, name := range metric.FindAllString(target.Expr, -1) {
				name = strings.TrimSuffix(name, "_bucket")
				if name == "culvert_dev_gateway" { // the label that the PodMonitor adds
					continue
				}
				if asked++; !exists[name] {
					t.Errorf("%s: there is no metric %s", p.Title, name)
				}
			}
		}
	}
	if asked < 10 {
		t.Errorf("the dashboard asks for %d metrics only", asked)
	}
	have := find(t, objects(t, render(t, "--set", "metrics.dashboard.enabled=true")), "ConfigMap", "culvert-dashboard")
	data, _, _ := unstructured.NestedString(have.Object, "data", "culvert.json")
	if strings.TrimSpace(data) != strings.TrimSpace(string(text)) {
		t.Error("the ConfigMap has another dashboard")
	}
}

// metricNames are the gateways' metrics, by their reference, and the operator's and agent's, by
// their code.
func metricNames(t *testing.T) map[string]bool {
	t.Helper()
	files, err := filepath.Glob("../../internal/[ao][gp]e*/*.go")
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	name := regexp.MustCompile("[`\"]((?:culvert|wireguard)_[a-z_]+)[`\"]")
	for _, file := range append(files, "../../docs/reference/metrics.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range name.FindAllStringSubmatch(string(text), -1) {
			names[m[1]] = true
		}
	}
	return names
}
