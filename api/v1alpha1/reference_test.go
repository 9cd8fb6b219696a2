package v1alpha1

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write docs/reference/api.md anew")

// The object reference is generated from the CRDs, and so from the types' own comments.
func TestReferenceIsCurrent(t *testing.T) {
	files, err := filepath.Glob("../../charts/culvert/crds/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no CRDs: %v", err)
	}
	var b strings.Builder
	b.WriteString("# Objects\n\nAPI group `culvert.dev`, version `v1alpha1`. Generated from the CRDs\n(`go test ./api/v1alpha1 -run Reference -update`).\n")
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var crd apiextensionsv1.CustomResourceDefinition
		if err := yaml.Unmarshal(data, &crd); err != nil {
			t.Fatal(err)
		}
		schema := crd.Spec.Versions[0].Schema.OpenAPIV3Schema
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\nScope: %s. Short names: %s.\n\n| field | type | meaning |\n|---|---|---|\n", crd.Spec.Names.Kind,
			strings.TrimSpace(schema.Description), crd.Spec.Scope, strings.Join(crd.Spec.Names.ShortNames, ", "))
		for _, part := range []string{"spec", "status"} {
			s := schema.Properties[part]
			fields(&b, part, &s)
		}
	}
	const path = "../../docs/reference/api.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != b.String() {
		t.Errorf("docs/reference/api.md is not current: go test ./api/v1alpha1 -run Reference -update (%v)", err)
	}
}

func fields(b *strings.Builder, path string, s *apiextensionsv1.JSONSchemaProps) {
	for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
		p := s.Properties[name]
		at, typ := path+"."+name, p.Type
		next := &p
		if p.Type == "array" && p.Items != nil && p.Items.Schema != nil {
			at, next, typ = at+"[]", p.Items.Schema, "list of "+p.Items.Schema.Type
		}
		var notes []string
		if slices.Contains(s.Required, name) {
			notes = append(notes, "Required.")
		}
		if p.Default != nil {
			notes = append(notes, "Default: `"+string(p.Default.Raw)+"`.")
		}
		if len(next.Enum) > 0 {
			var values []string
			for _, e := range next.Enum {
				values = append(values, "`"+strings.Trim(string(e.Raw), `"`)+"`")
			}
			notes = append(notes, "One of "+strings.Join(values, ", ")+".")
		}
		text := strings.Join(strings.Fields(p.Description), " ")
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", at, typ, strings.TrimSpace(strings.ReplaceAll(text, "|", "\\|")+" "+strings.Join(notes, " ")))
		if strings.HasSuffix(at, ".conditions[]") {
			continue // metav1.Condition, the same everywhere
		}
		fields(b, at, next)
	}
}
