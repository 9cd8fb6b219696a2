package model

import (
	"context"
	stdjson "encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/util/json"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

// apiServer does with an object what an API server with our CRDs does, before any of our
// code: defaulting, schema, list types, CEL.
type apiServer map[string]*apiKind

type apiKind struct {
	structural *schema.Structural
	schema     validation.SchemaValidator
	cel        *cel.Validator
}

// newAPIServer reads the CRDs of the chart; one that an API server would not take (CEL
// that does not compile or costs too much, a default that is invalid) fails the test.
func newAPIServer(t *testing.T) apiServer {
	t.Helper()
	files, err := filepath.Glob("../../charts/culvert/crds/*.yaml")
	if err != nil || len(files) != 6 {
		t.Fatalf("%d CRDs (%v), want 6", len(files), err)
	}
	s := apiServer{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var v1 apiextensionsv1.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(data, &v1); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		apiextensionsv1.SetDefaults_CustomResourceDefinition(&v1)
		apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&v1.Spec)
		v1.Status.StoredVersions = []string{"v1alpha1"}
		var crd apiextensions.CustomResourceDefinition
		if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(&v1, &crd, nil); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		for _, e := range crdvalidation.ValidateCustomResourceDefinition(context.Background(), &crd) {
			t.Errorf("%s: an API server would refuse it: %v", filepath.Base(f), e)
		}
		props := crd.Spec.Validation.OpenAPIV3Schema
		structural, err := schema.NewStructural(props)
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		v, _, err := validation.NewSchemaValidator(props)
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		s[crd.Spec.Names.Kind] = &apiKind{structural, v, cel.NewValidator(structural, true, celconfig.PerCallLimit)}
	}
	return s
}

// admit says why an object would be refused, and what it would be stored as.
func (s apiServer) admit(t testing.TB, tree map[string]any) (stored map[string]any, refused []string) {
	t.Helper()
	data, err := stdjson.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	object := map[string]any{}
	if err := json.Unmarshal(data, &object); err != nil { // whole numbers as int64
		t.Fatal(err)
	}
	kind, _ := object["kind"].(string)
	k := s[kind]
	if k == nil {
		return object, nil
	}
	defer func() {
		// The schema validator expects what decoding would have refused before it.
		if p := recover(); p != nil {
			refused = append(refused, fmt.Sprint(p))
		}
	}()
	defaulting.Default(object, k.structural)
	errs := validation.ValidateCustomResource(nil, object, k.schema)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, k.structural, object)...)
	celErrs, _ := k.cel.Validate(context.Background(), nil, k.structural, object, nil, celconfig.RuntimeCELCostBudget)
	for _, e := range append(errs, celErrs...) {
		refused = append(refused, e.Error())
	}
	sort.Strings(refused)
	return object, refused
}

func TestAPIServerTakesTheCRDs(t *testing.T) {
	if s := newAPIServer(t); len(s) != 6 {
		t.Errorf("%d kinds, want 6", len(s))
	}
}
