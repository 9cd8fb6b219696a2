package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// What is printed for the remote cluster holds: a pod at Pod Security level "restricted", a right
// to one Secret, no key, an invitation that a spoke can read.
func TestSpokeManifest(t *testing.T) {
	o := &v1alpha1.RemoteCluster{ObjectMeta: metav1.ObjectMeta{Name: "prod.eu", Namespace: "team", UID: "5c2f9d6e-1b0a"}}
	o.Spec.Targets = []v1alpha1.RemoteTarget{{CIDRs: []v1alpha1.CIDR{"10.0.0.0/8"}, Ports: []v1alpha1.TargetPort{{Port: 443}}}}
	o.Spec.Exports = []v1alpha1.RemoteExport{{Name: "api", Listen: "0.0.0.0:6443", Target: "192.0.2.1:6443"}, {Name: "own", Listen: "127.0.0.1:1", Target: "192.0.2.1:1"}}
	o.Status.Address, o.Status.ServerName = "tunnel.example.com:443", "h0-5c2f9d6e-1b0a.hubs.example.com"
	parsed, err := tunnel.ParseRemoteCluster(o)
	if err != nil {
		t.Fatal(err)
	}
	h := &hubsOf{object: o, parsed: parsed}
	invitation, err := yaml.Marshal(tunnel.Invitation{RemoteCluster: "team/prod.eu", UID: parsed.UID, Hubs: h.addresses("spoke"), Authorities: "-----BEGIN CERTIFICATE-----\nx\n", Expires: time.Now().UTC()})
	if err != nil {
		t.Fatal(err)
	}
	m := spokeManifest{Namespace: "culvert-spoke", Image: "culvert:test", PullPolicy: "Always", Replicas: 3, Proxy: "http://p:3128"}
	var out bytes.Buffer
	if err := m.print(&out, h, string(invitation)); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, doc := range strings.Split(out.String(), "\n---\n") {
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		kinds[meta.Kind]++
		into := map[string]runtime.Object{"Deployment": &appsv1.Deployment{}, "Secret": &corev1.Secret{}, "Service": &corev1.Service{}}[meta.Kind]
		if into == nil {
			continue
		}
		if err := yaml.UnmarshalStrict([]byte(doc), into); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		switch x := into.(type) {
		case *appsv1.Deployment:
			c := x.Spec.Template.Spec.Containers[0]
			if *x.Spec.Replicas != 3 || c.Image != "culvert:test" || !*x.Spec.Template.Spec.SecurityContext.RunAsNonRoot || *c.SecurityContext.AllowPrivilegeEscalation || c.Env[0].Value != "http://p:3128" {
				t.Errorf("%+v", x.Spec)
			}
		case *corev1.Secret:
			if text := x.StringData["invitation.yaml"]; text != "" {
				var i tunnel.Invitation
				if err := yaml.UnmarshalStrict([]byte(text), &i); err != nil || len(i.Hubs) != 2 || i.Hubs[1].ServerName != "h1-5c2f9d6e-1b0a.hubs.example.com" || i.Hubs[0].Address != "tunnel.example.com:443" {
					t.Errorf("%v: %+v", err, i)
				}
			}
		case *corev1.Service:
			if len(x.Spec.Ports) != 1 || x.Spec.Ports[0].Port != 6443 {
				t.Errorf("exports: %+v", x.Spec.Ports)
			}
		}
	}
	if kinds["Secret"] != 2 || kinds["Role"] != 1 || kinds["ClusterRole"] != 0 || kinds["Deployment"] != 1 || kinds["Service"] != 1 {
		t.Errorf("%v", kinds)
	}
	if strings.Contains(out.String(), "PRIVATE KEY") {
		t.Error("it holds a key")
	}
	var egress bytes.Buffer
	if err := egressManifest(&egress, h, "kube-apiserver", string(invitation)); err != nil || strings.Contains(egress.String(), "%!") {
		t.Errorf("%v: %s", err, egress.String())
	}
	if a := h.addresses("client"); !strings.HasPrefix(a[1].Address, "culvert-hub-prod-eu-") || !strings.HasSuffix(a[1].Address, "-1.team.svc:8132") {
		t.Errorf("%+v", a)
	}
}

// Flags that contradict each other end the operator at once.
func TestFeatureGates(t *testing.T) {
	for args, want := range map[string]string{
		"--feature-gates Reversed=true":                                                    `"Reversed=true": write ReversedTunnel=true or ReversedTunnel=false`,
		"--feature-gates ReversedTunnel=maybe":                                             "write ReversedTunnel=true",
		"--feature-gates ReversedTunnel=false --front-routes culvert-system/routes":        "the front leads to nothing but hubs",
		"--front-service culvert-front":                                                    "write NAMESPACE/NAME",
		"--front-address tunnel.example.com":                                               "write host:port",
		"--front-domain=":                                                                  "--front-domain is empty",
		"--feature-gates ReversedTunnel=false --kubeconfig /nowhere --namespace x --alone": "/nowhere",
	} {
		var errs bytes.Buffer
		code := Run(t.Context(), append([]string{"operator", "--image", "x"}, strings.Fields(args)...), Streams{Out: &bytes.Buffer{}, Err: &errs})
		if code == 0 || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: %d, %s", args, code, errs.String())
		}
	}
}
