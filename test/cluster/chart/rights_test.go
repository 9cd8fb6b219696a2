package chart_test

import (
	"context"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
)

// accounts are the service accounts that a release and its gateways have.
var accounts = []string{
	clustertest.System + ":culvert-operator", clustertest.System + ":culvert-agent", clustertest.System + ":culvert-main", "team:culvert-own",
}

// testRights looks at the rights as the API server adds them up.
func testRights(t *testing.T, c *clustertest.Cluster) {
	admin := client(t, c, rest.ImpersonationConfig{})
	for _, account := range accounts {
		for _, namespace := range []string{"", "default", "kube-system", clustertest.System, "team"} {
			for _, verb := range []string{"get", "list", "watch", "update", "delete"} {
				if may(t, admin, account, verb, namespace, "") {
					t.Errorf("%s may %s any Secret in namespace %q", account, verb, namespace)
				}
			}
		}
		for line := range strings.Lines(c.Kubectl("auth", "can-i", "--list", "--as=system:serviceaccount:"+account, "-n", clustertest.System)) {
			if fields := strings.Fields(line); len(fields) > 0 && (strings.HasPrefix(fields[0], "*") || strings.Contains(line, "[*]")) {
				t.Errorf("%s may: %s", account, line)
			}
		}
	}
	// What a gateway may read by name it may read in its own place only.
	if !may(t, admin, "team:culvert-own", "get", "team", "culvert-own-key") {
		t.Error("a gateway may not read its own key")
	}
	if may(t, admin, "team:culvert-own", "get", clustertest.System, "culvert-main-key") {
		t.Error("a gateway may read another one's key")
	}
}

// may asks whether a service account may do something with a Secret, or with any when the
// name is empty.
func may(t *testing.T, admin dynamic.Interface, account, verb, namespace, name string) bool {
	t.Helper()
	review := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
		"spec": map[string]any{
			"user":   "system:serviceaccount:" + account,
			"groups": []any{"system:serviceaccounts", "system:authenticated"},
			"resourceAttributes": map[string]any{
				"verb": verb, "version": "v1", "resource": "secrets", "namespace": namespace, "name": name,
			},
		},
	}}
	reviews := schema.GroupVersionResource{Group: "authorization.k8s.io", Version: "v1", Resource: "subjectaccessreviews"}
	out, err := admin.Resource(reviews).Create(context.Background(), review, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	allowed, found, _ := unstructured.NestedBool(out.Object, "status", "allowed")
	if !found {
		t.Fatalf("no answer: %v", out.Object)
	}
	return allowed
}

// client is a client of the administrator's, or of who is impersonated.
func client(t *testing.T, c *clustertest.Cluster, who rest.ImpersonationConfig) dynamic.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	config.Impersonate, config.QPS, config.Burst = who, 200, 200
	d, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// as is a client that acts as a service account, on the node of its token.
func as(t *testing.T, c *clustertest.Cluster, account, node string) dynamic.Interface {
	t.Helper()
	who := rest.ImpersonationConfig{UserName: "system:serviceaccount:" + clustertest.System + ":" + account}
	if node != "" {
		who.Extra = map[string][]string{"authentication.kubernetes.io/node-name": {node}}
	}
	return client(t, c, who)
}

const ours = "metadata: {name: culvert-x, labels: {app.kubernetes.io/managed-by: culvert-operator}}\n"

// template is a StatefulSet of the operator's with more in its pod.
func template(pod string) string {
	return ours + "spec: {serviceName: x, selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: b}}, spec: {" + pod + "}}}"
}

// testPolicies tries what RBAC alone would allow the operator and the agents.
func testPolicies(t *testing.T, c *clustertest.Cluster) {
	role := "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\n"
	binding := "apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\n"
	set := "apiVersion: apps/v1\nkind: StatefulSet\n"
	plain := "serviceAccountName: culvert-x, containers: [{name: a, image: b}]"
	for name, tc := range map[string]struct {
		manifest string
		denied   string // empty: allowed
	}{
		"a Role for one Secret":    {role + ours + "rules: [{apiGroups: [''], resources: [secrets], resourceNames: [a], verbs: [get]}]", ""},
		"a Role for all Secrets":   {role + ours + "rules: [{apiGroups: [''], resources: [secrets], verbs: [get]}]", "rules[].resourceNames is empty"},
		"a Role without a name":    {role + ours + "rules: [{apiGroups: [''], resources: [secrets], resourceNames: [''], verbs: [get]}]", "rules[].resourceNames is empty"},
		"a Role for anything":      {role + ours + "rules: [{apiGroups: ['*'], resources: ['*'], resourceNames: [a], verbs: ['*']}]", "grants nothing else"},
		"a Role for pods":          {role + ours + "rules: [{apiGroups: [''], resources: [pods], resourceNames: [a], verbs: [get]}]", "grants nothing else"},
		"a Role that lists":        {role + ours + "rules: [{apiGroups: [''], resources: [secrets], resourceNames: [a], verbs: [list]}]", "grants nothing else"},
		"a Role of nobody's":       {role + "metadata: {name: x}\nrules: []", "somebody else made this object"},
		"a binding of a foreigner": {binding + ours + "roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: culvert-x}\nsubjects: [{kind: ServiceAccount, name: default, namespace: default}]", "its gateways and itself only"},
		"a binding of a user":      {binding + ours + "roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: culvert-x}\nsubjects: [{kind: User, apiGroup: rbac.authorization.k8s.io, name: culvert-eve}]", "its gateways and itself only"},
		"a binding of cluster-admin": {binding + ours + "roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}\nsubjects: [{kind: ServiceAccount, name: culvert-x, namespace: default}]",
			"attempting to grant RBAC permissions not currently held"},
		"a StatefulSet":               {set + template(plain), ""},
		"another one's account":       {set + template("serviceAccountName: default, containers: [{name: a, image: b}]"), "not the gateway's own"},
		"privileged":                  {set + template("serviceAccountName: culvert-x, containers: [{name: a, image: b, securityContext: {privileged: true}}]"), "is privileged"},
		"the node's network":          {set + template(plain+", hostNetwork: true"), "shares a namespace of the node"},
		"a Secret as a volume":        {set + template(plain+", volumes: [{name: a, secret: {secretName: b}}]"), "mounts a Secret"},
		"a Secret in the environment": {set + template("serviceAccountName: culvert-x, containers: [{name: a, image: b, env: [{name: X, valueFrom: {secretKeyRef: {name: a, key: b}}}]}]"), "takes a value from a Secret"},
		"the node's files":            {set + template(plain+", volumes: [{name: a, hostPath: {path: /etc}}]"), "mounts a Secret or a directory"},
	} {
		t.Run("operator makes "+name, func(t *testing.T) {
			o := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(tc.manifest), &o.Object); err != nil {
				t.Fatal(err)
			}
			gvk := o.GroupVersionKind()
			resource := schema.GroupVersionResource{Group: gvk.Group, Version: gvk.Version, Resource: strings.ToLower(gvk.Kind) + "s"}
			_, err := as(t, c, "culvert-operator", "").Resource(resource).Namespace("default").
				Create(context.Background(), o, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			judge(t, err, tc.denied)
		})
	}
	t.Run("operator deletes what is not its own", func(t *testing.T) {
		services := schema.GroupVersionResource{Version: "v1", Resource: "services"}
		err := as(t, c, "culvert-operator", "").Resource(services).Namespace("default").
			Delete(context.Background(), "kubernetes", metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}})
		judge(t, err, "somebody else made this object")
	})
	for name, tc := range map[string]struct{ node, patch, denied string }{
		"its own annotation":     {"node1", `{"metadata":{"annotations":{"culvert.dev/node-link-addresses":"192.0.2.1"}}}`, ""},
		"another node's":         {"node2", `{"metadata":{"annotations":{"culvert.dev/node-link-addresses":"192.0.2.1"}}}`, "the Node that it runs on only"},
		"another annotation":     {"node1", `{"metadata":{"annotations":{"x":"y"}}}`, "and nothing else"},
		"an annotation removed":  {"node1", `{"metadata":{"annotations":{"volumes.kubernetes.io/controller-managed-attach-detach":null}}}`, "and nothing else"},
		"a label":                {"node1", `{"metadata":{"labels":{"x":"y"}}}`, "and nothing else"},
		"a taint":                {"node1", `{"spec":{"taints":[{"key":"x","effect":"NoSchedule"}]}}`, "and nothing else"},
		"without a node's token": {"", `{"metadata":{"annotations":{"culvert.dev/node-link-addresses":"192.0.2.1"}}}`, "the Node that it runs on only"},
	} {
		t.Run("agent writes "+name, func(t *testing.T) {
			target, token := tc.node, "node1"
			if target == "" {
				target, token = "node1", ""
			}
			_, err := as(t, c, "culvert-agent", token).Resource(schema.GroupVersionResource{Version: "v1", Resource: "nodes"}).
				Patch(context.Background(), target, types.MergePatchType, []byte(tc.patch), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
			judge(t, err, tc.denied)
		})
	}
}

func judge(t *testing.T, err error, denied string) {
	t.Helper()
	switch {
	case denied == "" && err != nil:
		t.Errorf("refused: %v", err)
	case denied != "" && err == nil:
		t.Error("allowed")
	case denied != "" && !strings.Contains(err.Error(), denied):
		t.Errorf("refused, but not because %q: %v", denied, err)
	}
}
