package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

// CRDManager is the field manager of CRDs that ApplyCRDs wrote.
const CRDManager = "culvert-crds"

// establishTimeout is how long an API server may take to serve a CRD.
const establishTimeout = 30 * time.Second

var crdResource = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// ApplyCRDs makes the API server's CRDs those of the files *.yaml in a directory, one to a
// file, and waits until all of them are served. Objects that exist are kept; it never deletes
// anything. done is told the name of each, when it is served.
func ApplyCRDs(ctx context.Context, config *rest.Config, dir string, done func(name string)) error {
	crds, err := readCRDs(dir)
	if err != nil {
		return err
	}
	c, err := dynamic.NewForConfig(config)
	if err != nil {
		return err
	}
	for _, crd := range crds {
		// Force: Helm, which made the CRD in the first place, never looks at it again.
		_, err := c.Resource(crdResource).Apply(ctx, crd.GetName(), crd, metav1.ApplyOptions{FieldManager: CRDManager, Force: true})
		if err != nil {
			return fmt.Errorf("apply the CRD %s: %w", crd.GetName(), err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, establishTimeout)
	defer cancel()
	for _, crd := range crds {
		if err := awaitEstablished(ctx, c.Resource(crdResource), crd.GetName()); err != nil {
			return err
		}
		done(crd.GetName())
	}
	return nil
}

func awaitEstablished(ctx context.Context, crds dynamic.ResourceInterface, name string) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		crd, err := crds.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("wait until the CRD %s is served: %w", name, err)
		}
		if established(crd) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the API server does not serve the CRD %s: see the conditions in its status: %w", name, ctx.Err())
		case <-tick.C:
		}
	}
}

func established(crd *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(crd.Object, "status", "conditions")
	return slices.ContainsFunc(conditions, func(c any) bool {
		m, ok := c.(map[string]any)
		return ok && m["type"] == "Established" && m["status"] == "True"
	})
}

// readCRDs reads the CRDs of a directory; one at least.
func readCRDs(dir string) ([]*unstructured.Unstructured, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, errors.New(dir + " has no *.yaml: it is to have a CRD in each, as the chart's directory crds")
	}
	var crds []*unstructured.Unstructured
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		crd := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(b, &crd.Object); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		if crd.GetKind() != "CustomResourceDefinition" || crd.GetAPIVersion() != crdResource.GroupVersion().String() || crd.GetName() == "" {
			return nil, fmt.Errorf("%s: kind is %q of %q, named %q: it is to be one CustomResourceDefinition of %s",
				f, crd.GetKind(), crd.GetAPIVersion(), crd.GetName(), crdResource.GroupVersion())
		}
		unstructured.RemoveNestedField(crd.Object, "status")
		unstructured.RemoveNestedField(crd.Object, "metadata", "creationTimestamp")
		crds = append(crds, crd)
	}
	return crds, nil
}
