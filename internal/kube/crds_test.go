package kube_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/culvert-vpn/culvert/internal/kube"
)

// TestApplyCRDs sees the requests that an API server would get; test/cluster has a real one.
func TestApplyCRDs(t *testing.T) {
	var mu sync.Mutex
	applied, asked := map[string]map[string]any{}, map[string]int{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		name, ok := strings.CutPrefix(r.URL.Path, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/")
		if !ok {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		w.Header().Set("Content-Type", "application/json")
		object := map[string]any{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": map[string]any{"name": name}}
		switch r.Method {
		case http.MethodPatch:
			if r.Header.Get("Content-Type") != "application/apply-patch+yaml" || r.URL.Query().Get("force") != "true" || r.URL.Query().Get("fieldManager") != kube.CRDManager {
				t.Errorf("%s %s is no forced apply of ours", r.Header.Get("Content-Type"), r.URL)
			}
			b, _ := io.ReadAll(r.Body)
			var o map[string]any
			if err := json.Unmarshal(b, &o); err != nil {
				t.Error(err)
			}
			applied[name] = o
		case http.MethodGet:
			// Served at the second look only.
			if asked[name]++; asked[name] > 1 {
				object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}}
			}
		default:
			t.Errorf("%s %s", r.Method, r.URL)
		}
		_ = json.NewEncoder(w).Encode(object)
	}))
	defer server.Close()

	files, _ := filepath.Glob("../../charts/culvert/crds/*.yaml")
	var done []string
	err := kube.ApplyCRDs(context.Background(), &rest.Config{Host: server.URL}, "../../charts/culvert/crds", func(name string) { done = append(done, name) })
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 6 || len(applied) != len(files) || len(done) != len(files) {
		t.Fatalf("%d files, %d applied, %d said to be served", len(files), len(applied), len(done))
	}
	for _, name := range done {
		if asked[name] != 2 {
			t.Errorf("%s was looked at %d times; it was served at the second", name, asked[name])
		}
		if _, ok := applied[name]["spec"].(map[string]any)["versions"]; !ok {
			t.Errorf("%s was applied without versions", name)
		}
	}
}

func TestApplyCRDsRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ file, want string }{
		"nothing":    {"", "has no *.yaml"},
		"no CRD":     {"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n", `kind is "ConfigMap"`},
		"no YAML":    {"a: [", "yaml"},
		"old format": {"apiVersion: apiextensions.k8s.io/v1beta1\nkind: CustomResourceDefinition\nmetadata: {name: x}\n", "v1beta1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if tc.file != "" {
				if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(tc.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			err := kube.ApplyCRDs(context.Background(), &rest.Config{Host: "http://127.0.0.1:1"}, dir, func(string) {})
			if err == nil || !strings.Contains(fmt.Sprint(err), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}
