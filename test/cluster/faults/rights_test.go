package faults_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
)

// unused are the rights that this test does not use, with the reason for each: "role: verb
// group/resource".
var unused = map[string]string{
	"culvert-operator: escalate rbac.authorization.k8s.io/roles":            "used by each Role that it makes; not a request of its own",
	"culvert-operator: bind rbac.authorization.k8s.io/roles":                "used by each RoleBinding that it makes; not a request of its own",
	"culvert-operator: bind rbac.authorization.k8s.io/clusterroles":         "used by each ClusterRoleBinding that it makes; not a request of its own",
	"culvert-operator: get /services":                                       "before Kubernetes 1.33, which has ServiceCIDRs",
	"culvert-operator: get /namespaces":                                     "objects of a namespace that is gone: test/cluster/operator",
	"culvert-operator: get coordination.k8s.io/leases":                      "an address that two operators claim at once: the slower one looks whose it is",
	"culvert-operator: patch /serviceaccounts":                              "an upgrade that changes what is applied",
	"culvert-operator: patch policy/poddisruptionbudgets":                   "an upgrade that changes what is applied",
	"culvert-operator: patch rbac.authorization.k8s.io/rolebindings":        "an upgrade that changes what is applied",
	"culvert-operator: patch rbac.authorization.k8s.io/clusterrolebindings": "an upgrade that changes what is applied",
	"culvert-operator: patch events.k8s.io/events":                          "a warning that is repeated",
	"culvert-operator: patch /events":                                       "a change of leaders that is repeated",
	"culvert-operator: patch culvert.dev/remoteclusters/status":             "RemoteClusters: test/cluster/reverse_test.go",
	"culvert-gateway: create events.k8s.io/events":                          "a site that comes or goes: test/cluster/gateway",
	"culvert-agent: list discovery.k8s.io/endpointslices":                   "NodeEncryption: test/cluster/encryption",
	"culvert-agent: get /services":                                          "NodeEncryption: test/cluster/encryption",
	"culvert-agent: create events.k8s.io/events":                            "NodeEncryption: test/cluster/encryption",
	"culvert-agent: patch events.k8s.io/events":                             "NodeEncryption: test/cluster/encryption",
	"culvert-agent: get apps/daemonsets":                                    "an agent that is stopped: test/cluster/chart",
	"culvert-agent: get culvert.dev/nodetunnels":                            "NodeEncryption: test/cluster/encryption",
	"culvert-agent: create culvert.dev/nodetunnels":                         "NodeEncryption: test/cluster/encryption",
	"culvert-agent: patch culvert.dev/nodetunnels":                          "NodeEncryption: test/cluster/encryption",
	"culvert-agent: get culvert.dev/nodetunnels/status":                     "NodeEncryption: test/cluster/encryption",
	"culvert-agent: create culvert.dev/nodetunnels/status":                  "NodeEncryption: test/cluster/encryption",
	"culvert-agent: patch culvert.dev/nodetunnels/status":                   "NodeEncryption: test/cluster/encryption",
	"culvert-agent: get culvert.dev/nodeencryptions/status":                 "NodeEncryption: test/cluster/encryption",
	"culvert-agent: patch culvert.dev/nodeencryptions/status":               "NodeEncryption: test/cluster/encryption",
	"culvert-agent: get /configmaps":                                        "NodeEncryption, of Cilium's settings: test/cluster/cilium",
}

// request is a line of the API server's audit log: of service accounts, all of them.
type request struct {
	Verb           string
	RequestURI     string
	User           struct{ Username string }
	ObjectRef      *struct{ APIGroup, Resource, Subresource, Namespace, Name string }
	ResponseStatus struct {
		Code    int
		Message string
	}
	RequestReceivedTimestamp time.Time
}

// requests are what Culvert's service accounts asked for since the test began.
func (s *scene) requests() []request {
	s.t.Helper()
	f, err := os.Open(filepath.Join(filepath.Dir(filepath.Dir(s.Kubeconfig())), "log", "audit.log"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	var out []request
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil || r.ObjectRef == nil || r.RequestReceivedTimestamp.Before(s.start) {
			continue
		}
		if account := strings.TrimPrefix(r.User.Username, "system:serviceaccount:"); strings.HasPrefix(account, clustertest.System+":culvert-") || strings.HasPrefix(account, namespace+":culvert-") {
			out = append(out, r)
		}
	}
	if err := lines.Err(); err != nil || len(out) < 100 {
		s.t.Fatalf("%d requests: %v", len(out), err)
	}
	return out
}

// rights: what the chart's roles allow is used, in the life that this test has given a gateway,
// or stands in a short list with a reason; and nobody tried what is not allowed.
func (s *scene) rights() {
	requests := s.requests()
	used, granted := map[string]bool{}, s.granted()
	for _, r := range requests {
		_, account, _ := strings.Cut(strings.TrimPrefix(r.User.Username, "system:serviceaccount:"), ":")
		if !slices.Contains([]string{"culvert-operator", "culvert-agent"}, account) {
			account = "culvert-gateway"
		}
		resource := r.ObjectRef.Resource
		if r.ObjectRef.Subresource != "" {
			resource += "/" + r.ObjectRef.Subresource
		}
		what := func(verb string) string {
			return fmt.Sprintf("%s: %s %s/%s", account, verb, r.ObjectRef.APIGroup, resource)
		}
		switch {
		case r.ResponseStatus.Code == 403 && (expected(r) || account == "culvert-agent" && granted[what(r.Verb)] != ""):
		case r.ResponseStatus.Code == 403:
			s.t.Errorf("%s %s of %s was forbidden: %s", r.Verb, r.RequestURI, account, r.ResponseStatus.Message)
		case r.ResponseStatus.Code == 201 && r.Verb == "patch": // a server-side apply that creates
			used[what("create")] = true
			used[what("patch")] = true
		case r.Verb == "watch" && r.ResponseStatus.Code < 300:
			// Where an API server cannot stream lists (before Kubernetes 1.34), a watch begins
			// with one.
			used[what("watch")], used[what("list")] = true, true
		case r.ResponseStatus.Code < 300, r.ResponseStatus.Code == 404, r.ResponseStatus.Code == 409:
			used[what(r.Verb)] = true
		}
	}
	n := 0
	for right, role := range granted {
		n++
		if !used[right] && unused[right] == "" {
			s.t.Errorf("%s (%s) was not used: take it out of the chart, or say in this test why it is there", right, role)
		}
	}
	for right := range unused {
		if granted[right] == "" {
			s.t.Errorf("%s is not granted: it is out of date in this test", right)
		}
	}
	s.t.Logf("%d rights, %d used in %d requests, %d for other cases", n, n-len(unused), len(requests), len(unused))
}

// expected are refusals that belong to the order in which things come and go: an API server
// that has just started does not know its roles yet, or only some; a gateway asks for what its Role gives it
// before that has reached the API server's cache, or after it is gone.
func expected(r request) bool {
	if strings.Contains(r.ResponseStatus.Message, `"system:discovery" not found`) {
		return true
	}
	if !strings.HasPrefix(r.User.Username, "system:serviceaccount:"+namespace+":") && !strings.HasSuffix(r.User.Username, ":culvert-operator") {
		return false
	}
	switch r.ObjectRef.Resource {
	case "secrets", "configmaps", "leases", "endpointslices":
		return true
	}
	return false
}

// granted are the rights that the chart's ClusterRoles and Roles give, by "account: verb
// group/resource", with the role.
func (s *scene) granted() map[string]string {
	s.t.Helper()
	out := map[string]string{}
	add := func(kind, name string, rules []rbacv1.PolicyRule) {
		account := name
		for _, rule := range rules {
			for _, g := range rule.APIGroups {
				for _, r := range rule.Resources {
					for _, v := range rule.Verbs {
						out[fmt.Sprintf("%s: %s %s/%s", account, v, g, r)] = kind + " " + name
					}
				}
			}
		}
	}
	var clusterRoles rbacv1.ClusterRoleList
	var roles rbacv1.RoleList
	for kind, into := range map[string]any{"clusterroles": &clusterRoles, "roles": &roles} {
		text := s.Kubectl("get", kind, "-A", "-o", "yaml", "-l", "app.kubernetes.io/managed-by=Helm,app.kubernetes.io/name=culvert")
		if err := yaml.Unmarshal([]byte(text), into); err != nil {
			s.t.Fatal(err)
		}
	}
	for _, r := range clusterRoles.Items {
		add("ClusterRole", r.Name, r.Rules)
	}
	for _, r := range roles.Items {
		add("Role", r.Name, r.Rules)
	}
	if len(out) < 30 {
		s.t.Fatalf("only %d rights: %v", len(out), out)
	}
	return out
}
