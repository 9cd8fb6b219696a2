// Package chart_test holds the chart to its promises with the real helm: values that are
// wrong are refused with a clear line, the examples make objects that Culvert accepts, and
// nobody gets more rights than the architecture says. What happens in a cluster is
// test/cluster's.
package chart_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/culvert-vpn/culvert/internal/cli"
)

var update = flag.Bool("update", false, "write the golden files")

const chart = "../../charts/culvert"

var helmPath = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("../../hack/helm.sh")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
})

// helm runs helm away from the caller's configuration.
func helm(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	path, err := helmPath()
	if err != nil {
		t.Fatalf("hack/helm.sh: %v", err)
	}
	home := t.TempDir()
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG=/dev/null")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", errors.New(errs.String() + out.String())
	}
	return out.String(), nil
}

// render is what "helm template" makes of the chart in namespace culvert-system.
func render(t *testing.T, args ...string) string {
	t.Helper()
	out, err := helm(t, append([]string{"template", "culvert", chart, "--namespace", "culvert-system"}, args...)...)
	if err != nil {
		t.Fatalf("helm template %q: %v", args, err)
	}
	return out
}

// objects decodes what render returned.
func objects(t *testing.T, text string) (list []*unstructured.Unstructured) {
	t.Helper()
	d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		var o unstructured.Unstructured
		err := d.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(o.Object) > 0 {
			list = append(list, &o)
		}
	}
}

// find returns the one object of that kind and name.
func find(t *testing.T, list []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	for _, o := range list {
		if o.GetKind() == kind && o.GetName() == name {
			return o
		}
	}
	t.Fatalf("there is no %s %s", kind, name)
	return nil
}

func examples(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("../../examples/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	return files
}

func TestLint(t *testing.T) {
	for _, values := range append(examples(t), chart+"/values.yaml") {
		if _, err := helm(t, "lint", "--strict", chart, "--values", values); err != nil {
			t.Errorf("%s: %v", values, err)
		}
	}
}

// TestGolden shows every change of what is installed.
func TestGolden(t *testing.T) {
	for name, args := range map[string][]string{
		"default": {"--set", "crds.upgrade=false"},
		"full":    {"--set", "crds.upgrade=false", "--values", "testdata/full.values.yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			have := render(t, args...)
			golden := filepath.Join("testdata", name+".golden.yaml")
			if *update {
				if err := os.WriteFile(golden, []byte(have), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if string(want) == have {
				return
			}
			a, b := strings.Split(string(want), "\n"), strings.Split(have, "\n")
			i := 0
			for i < len(a) && i < len(b) && a[i] == b[i] {
				i++
			}
			t.Errorf("%s is not current from line %d on (go test ./test/chart -update):\nwant %s\nhave %s", golden, i+1,
				strings.Join(a[i:min(i+3, len(a))], "\n     "), strings.Join(b[i:min(i+3, len(b))], "\n     "))
		})
	}
}

func TestRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		set  []string
		want []string
	}{
		"misspelt key":         {[]string{"--set", "operator.replica=1"}, []string{"operator", "'replica' not allowed"}},
		"misspelt top key":     {[]string{"--set", "agents.enabled=true"}, []string{"'agents' not allowed"}},
		"no number":            {[]string{"--set-string", "operator.replicas=two"}, []string{"/operator/replicas", "want integer"}},
		"pull policy":          {[]string{"--set", "image.pullPolicy=Sometimes"}, []string{"/image/pullPolicy", "'Always', 'IfNotPresent', 'Never'"}},
		"digest without name":  {[]string{"--set", "image.digest=abc"}, []string{"/image/digest", "sha256:"}},
		"tag in repository":    {[]string{"--set", "image.repository=x@sha256:1"}, []string{"/image/repository"}},
		"log level":            {[]string{"--set", "agent.logLevel=loud"}, []string{"/agent/logLevel"}},
		"gateway without spec": {[]string{"--set", "gateways.main.namespace=x"}, []string{"/gateways/main", "'spec'"}},
		"gateway's name":       {[]string{"--set", "gateways.Main.spec.replicas=1"}, []string{"Main"}},
		"front without hubs":   {[]string{"--set", "front.enabled=true,featureGates.ReversedTunnel=false"}, []string{"front.enabled is true and featureGates.ReversedTunnel false"}},
		"front's address":      {[]string{"--set", "front.address=example.com"}, []string{"/front/address"}},
		"unknown gate":         {[]string{"--set", "featureGates.Reversed=true"}, []string{"'Reversed' not allowed"}},
		"nobody sets sysctls":  {[]string{"--set", "agent.enabled=false"}, []string{"set gatewayPods.sysctls to InitContainer or Kubelet"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := helm(t, append([]string{"template", "culvert", chart}, tc.set...)...)
			if err == nil {
				t.Fatalf("%q is accepted", tc.set)
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q: %v\ndoes not say %q", tc.set, err, want)
				}
			}
		})
	}
}

func TestImage(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	for name, tc := range map[string]struct {
		set  string
		want string
	}{
		"default": {"image.tag=", "ghcr.io/culvert-vpn/culvert:0.1.0"},
		"tag":     {"image.repository=example.com/c,image.tag=v2", "example.com/c:v2"},
		"digest":  {"image.tag=v2,image.digest=" + digest, "ghcr.io/culvert-vpn/culvert@" + digest},
	} {
		t.Run(name, func(t *testing.T) {
			list := objects(t, render(t, "--set", tc.set))
			for kind, object := range map[string]string{"Deployment": "culvert-operator", "DaemonSet": "culvert-agent", "Job": "culvert-crds"} {
				containers, _, _ := unstructured.NestedSlice(find(t, list, kind, object).Object, "spec", "template", "spec", "containers")
				if have := containers[0].(map[string]any)["image"]; have != tc.want {
					t.Errorf("%s %s runs %v, want %s", kind, object, have, tc.want)
				}
			}
			args, _, _ := unstructured.NestedSlice(find(t, list, "Deployment", "culvert-operator").Object, "spec", "template", "spec", "containers")
			if text := strings.Join(texts(args[0].(map[string]any)["args"]), " "); !strings.Contains(text, "--image="+tc.want+" ") {
				t.Errorf("gateways are to run something else: %s", text)
			}
		})
	}
}

func texts(v any) (out []string) {
	list, _ := v.([]any)
	for _, x := range list {
		s, _ := x.(string)
		out = append(out, s)
	}
	return out
}

// TestExamples gives what the examples make to the code that gateways and operator use.
func TestExamples(t *testing.T) {
	for _, values := range examples(t) {
		t.Run(filepath.Base(values), func(t *testing.T) {
			var docs []string
			for _, o := range objects(t, render(t, "--values", values, "--show-only", "templates/objects.yaml")) {
				// A cluster finds its ranges by itself; on paper they must be said.
				if o.GetKind() == "VPNGateway" {
					ranges := map[string]any{"podCIDRs": []any{"10.244.0.0/16"}, "serviceCIDRs": []any{"10.96.0.0/16"}}
					if err := unstructured.SetNestedField(o.Object, ranges, "spec", "cluster"); err != nil {
						t.Fatal(err)
					}
				}
				b, err := o.MarshalJSON()
				if err != nil {
					t.Fatal(err)
				}
				docs = append(docs, string(b))
				if name, found, _ := unstructured.NestedString(o.Object, "spec", "ipsec", "auth", "presharedKeySecretRef", "name"); found {
					docs = append(docs, "apiVersion: v1\nkind: Secret\nmetadata: {name: "+name+", namespace: culvert-system}\nstringData: {psk: 0123456789abcdef0123456789abcdef}\n")
				}
			}
			text := strings.Join(docs, "\n---\n")
			file := filepath.Join(t.TempDir(), "objects.yaml")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if code := cli.Run(context.Background(), []string{"validate", "-f", file}, cli.Streams{In: strings.NewReader(""), Out: &out, Err: &out}); code != 0 {
				t.Errorf("culvert validate: exit code %d: %s\n%s", code, &out, text)
			}
		})
	}
}
