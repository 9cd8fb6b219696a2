package chart_test

import (
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
)

// TestExamples installs each values file of examples/ as it is: everything that it makes
// becomes Ready.
func TestExamples(t *testing.T) {
	c := clustertest.Start(t, cluster.Options{})
	files, err := filepath.Glob("../../../examples/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			c := c.In(t)
			t.Cleanup(func() { _, _ = c.TryKubectl("delete", "namespace", clustertest.System, "--ignore-not-found") })
			c.Apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + clustertest.System + "}\n")
			made := c.Helm("template", clustertest.Release, c.Chart(), "--values", file, "--show-only", "templates/objects.yaml")
			var objects []string
			for d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(made), 4096); ; {
				var o unstructured.Unstructured
				if d.Decode(&o.Object) != nil {
					break
				}
				objects = append(objects, strings.ToLower(o.GetKind())+"/"+o.GetName())
				if name, found, _ := unstructured.NestedString(o.Object, "spec", "ipsec", "auth", "presharedKeySecretRef", "name"); found {
					c.Kubectl("create", "secret", "generic", name, "-n", clustertest.System, "--from-literal=psk=0123456789abcdef0123456789abcdef")
				}
			}
			if len(objects) < 2 {
				t.Fatalf("it makes %q only", objects)
			}
			c.Install("--values", file)
			ready(t, c, clustertest.System, objects...)
		})
	}
}
