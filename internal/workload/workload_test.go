package workload

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"pgregory.net/rapid"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/secret"
)

var update = flag.Bool("update", false, "write testdata anew")

func gateway(expose string) *model.Gateway {
	return &model.Gateway{
		ID: model.ID{Namespace: "vpn", Name: "edge"}, WireGuardPort: 51820, Replicas: 2,
		Expose: model.Expose{Type: expose},
	}
}

func golden(t *testing.T, name string, objects []Object) {
	t.Helper()
	var b bytes.Buffer
	for _, o := range objects {
		text, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString("---\n")
		b.Write(text)
	}
	path := filepath.Join("testdata", name+".yaml")
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("%s (go test ./internal/workload -update):\n%s", path, diff)
	}
}

func TestGateway(t *testing.T) {
	options := Options{
		Image: "culvert.example/culvert:v1", ClusterRole: "culvert-gateway",
		Owner: &metav1.OwnerReference{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "ClusterRole", Name: "culvert-gateway", UID: "owner"},
	}
	lb := gateway("LoadBalancer")
	lb.Expose.Annotations = map[string]string{"example.com/internal": "true"}
	lb.Expose.LoadBalancerClass = "example.com/lb"
	nodePort := gateway("NodePort")
	nodePort.WireGuardPort = 31820
	for name, x := range map[string]struct {
		gw  *model.Gateway
		pod string
	}{
		"loadbalancer": {lb, ""},
		"nodeport":     {nodePort, `{"spec":{"priorityClassName":"important","containers":[{"name":"culvert","resources":{"limits":{"memory":"1Gi"}}}]},"metadata":{"labels":{"team":"net","culvert.dev/gateway":"no"}}}`},
		"hostport":     {gateway("HostPort"), ""},
	} {
		o := options
		o.Pod = []byte(x.pod)
		objects, err := Gateway(x.gw, o)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, objects)
	}
	for _, bad := range []string{"[]", `{"spec":{"containers":"none"}}`} {
		o := options
		o.Pod = []byte(bad)
		if _, err := Gateway(lb, o); err == nil || !strings.Contains(err.Error(), "file does not fit") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestHubs(t *testing.T) {
	c := &model.RemoteCluster{ID: model.ID{Namespace: "team", Name: "prod"}, Replicas: 2}
	o := Options{Image: "culvert:test", Owner: &metav1.OwnerReference{Kind: "ClusterRole", Name: "culvert-gateway"}, HubPod: []byte(`{"spec":{"priorityClassName":"high"}}`)}
	objects, err := Hubs(c, o)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "hubs", objects)
}

func TestGrantsAndDevice(t *testing.T) {
	o := Options{}
	objects := o.Grant(model.ID{Namespace: "vpn", Name: "edge"}, "branch", []string{"psk-b", "psk-a", "psk-b"})
	objects = append(objects, o.OperatorGrant(model.ID{Namespace: "culvert-system", Name: "culvert-operator"}, "branch", []string{"phone-wireguard"}, []string{"psk"})...)
	holder := Holder{model.ID{Namespace: "branch", Name: "phone"}, "device-uid"}
	objects = append(objects,
		Claim{model.ID{Namespace: "vpn", Name: "edge"}, netip.MustParseAddr("10.99.0.2"), holder}.Lease("gateway-uid"),
		Claim{model.ID{Namespace: "vpn", Name: "edge"}, netip.MustParseAddr("fd00::2"), holder}.Lease("gateway-uid"),
		Keys{Private: secret.New(bytes.Repeat([]byte{7}, 32)), Config: secret.New([]byte("[Interface]\n"))}.Secret(holder))
	golden(t, "device", objects)
	if got := o.Grant(model.ID{Namespace: "vpn", Name: "edge"}, "branch", nil); got != nil {
		t.Errorf("a grant of nothing: %v", got)
	}
}

// Every rule that is made names single objects: the chart's policy refuses others.
func TestRulesNameObjects(t *testing.T) {
	objects, err := Gateway(gateway("None"), Options{Image: "x"})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, o := range objects {
		role, ok := o.(*rbacv1.Role)
		if !ok {
			continue
		}
		for _, r := range role.Rules {
			n++
			if len(r.ResourceNames) == 0 || slices.Contains(r.Verbs, "*") || slices.Contains(r.Verbs, "list") {
				t.Errorf("%+v", r)
			}
		}
	}
	if n == 0 {
		t.Error("no rules were seen")
	}
}

// Names fit what Kubernetes allows, whatever a gateway or device is called, and different
// ones stay different.
func TestNames(t *testing.T) {
	name := rapid.StringMatching(`[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?`).Filter(func(s string) bool {
		return len(validation.IsDNS1123Subdomain(s)) == 0
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b := name.Draw(t, "a"), name.Draw(t, "b")
		gw := GatewayName(a)
		if len(gw) > longestWorkload || len(validation.IsDNS1035Label(gw)) > 0 {
			t.Errorf("gateway %s: %s", a, gw)
		}
		for k, v := range Labels(model.ID{Namespace: "ns", Name: a}, ComponentGateway) {
			if len(validation.IsValidLabelValue(v)) > 0 {
				t.Errorf("label %s: %s", k, v)
			}
		}
		for _, n := range []string{DeviceSecret(a), KeySecret(a), ClaimName(a, netip.MustParseAddr("fd00::1")), global("culvert-secrets-", model.ID{Namespace: "ns", Name: a})} {
			if len(validation.IsDNS1123Subdomain(n)) > 0 {
				t.Errorf("%s gives the name %s", a, n)
			}
		}
		if a != b && (gw == GatewayName(b) || DeviceSecret(a) == DeviceSecret(b)) {
			t.Errorf("%s and %s share a name", a, b)
		}
	})
}

func TestParseClaim(t *testing.T) {
	c := Claim{model.ID{Namespace: "vpn", Name: "edge"}, netip.MustParseAddr("fd00::2"), Holder{model.ID{Namespace: "a", Name: "b"}, "uid"}}
	lease := c.Lease("g")
	if got, ok := ParseClaim(lease); !ok || got != c {
		t.Errorf("%+v %v", got, ok)
	}
	lease.Annotations[AnnotationAddress] = "fd00::3" // says another address than its name
	if _, ok := ParseClaim(lease); ok {
		t.Error("a claim whose name is of another address was believed")
	}
}
