package kube

import (
	"errors"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
)

func TestNoConfigurationIsSaidSo(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("KUBECONFIG", "")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, _, err := (Options{}).Config(); !errors.Is(err, ErrNoCluster) {
		t.Errorf("%v, want ErrNoCluster", err)
	}
	if _, _, err := (Options{Kubeconfig: "/nowhere/at/all"}).Config(); err == nil || errors.Is(err, ErrNoCluster) {
		t.Errorf("a file that is not there: %v", err)
	}
}

// The static list of kinds says for each what the types' plural and scope are.
func TestEveryKindHasAType(t *testing.T) {
	s, err := NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	m := mapper()
	for _, k := range kinds {
		gvk := k.version.WithKind(k.kind)
		if !s.Recognizes(gvk) {
			t.Errorf("%s is not in the scheme", gvk)
		}
		mapping, err := m.RESTMapping(gvk.GroupKind(), gvk.Version)
		if err != nil {
			t.Errorf("%s: %v", gvk, err)
			continue
		}
		if got := mapping.Scope.Name() == meta.RESTScopeNameNamespace; got != k.namespaced {
			t.Errorf("%s: namespaced %v", gvk, got)
		}
	}
	for kind, want := range map[string]string{"VPNGateway": "vpngateways", "NodeEncryption": "nodeencryptions", "EndpointSlice": "endpointslices"} {
		for _, k := range kinds {
			if k.kind != kind {
				continue
			}
			if mapping, err := m.RESTMapping(k.version.WithKind(kind).GroupKind(), k.version.Version); err != nil || mapping.Resource.Resource != want {
				t.Errorf("%s: %v, %v", kind, mapping, err)
			}
		}
	}
}
