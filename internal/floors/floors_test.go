package floors

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The module as it stands keeps every rule.
func TestModule(t *testing.T) {
	packages := list(t)
	if len(packages) < 5 {
		t.Fatalf("go list found %d packages; something is wrong with the test", len(packages))
	}
	for _, line := range Check(packages) {
		t.Error(line)
	}
	uses, err := Uses(packages)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range uses {
		t.Error(line)
	}
}

func list(t *testing.T) []Package {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,GoFiles,Imports,TestImports,XTestImports,Deps", Module+"/...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var packages []Package
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p Package
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

// Every rule is seen to fail: without this a rule that never fires would look like a
// module that keeps it.
func TestCheck(t *testing.T) {
	in := func(paths ...string) []string {
		for i, p := range paths {
			if local, ok := strings.CutPrefix(p, "~"); ok {
				paths[i] = Module + "/" + local
			}
		}
		return paths
	}
	tests := []struct {
		name  string
		pack  string
		given Package
		want  string // part of the only line; empty: no line
	}{
		{"downwards", "internal/plan", Package{Imports: in("~internal/model", "~internal/netstate", "net/netip", "time")}, ""},
		{"the ground", "internal/netstate", Package{Imports: in("~internal/secret")}, ""},
		{"upwards", "internal/model", Package{Imports: in("~internal/plan")}, "model imports internal/plan"},
		{"upwards from the ground", "internal/secret", Package{Imports: in("~internal/netstate")}, "secret imports internal/netstate"},
		{"one applier the other", "internal/wireguard", Package{Imports: in("~internal/route")}, "wireguard imports internal/route"},
		{"one loop the other", "internal/gateway", Package{Imports: in("~internal/agent")}, "gateway imports internal/agent"},
		{"the command line", "internal/gateway", Package{Imports: in("~internal/cli")}, "gateway imports internal/cli"},
		{"own subpackage", "internal/ipsec", Package{Imports: in("~internal/ipsec/vici")}, ""},
		{"own parent", "internal/lab/labtest", Package{Imports: in("~internal/lab")}, ""},
		{"not a subpackage", "internal/lab", Package{Imports: in("~internal/labour")}, "lab imports internal/labour"},
		{"no floor", "internal/common", Package{}, "internal/common stands on no floor"},
		{"no floor beside one", "internal/netstates", Package{}, "internal/netstates stands on no floor"},
		{"code imports the lab", "internal/model", Package{Imports: in("~internal/lab")}, "model imports internal/lab"},
		{"a test imports the lab", "internal/model", Package{XTestImports: in("~internal/lab/labtest")}, ""},
		{"a test imports upwards", "internal/model", Package{TestImports: in("~internal/plan")}, "model (test) imports internal/plan"},
		{"nobody imports tests", "cmd/culvert", Package{Imports: in("~test/netlab")}, "cmd/culvert imports test/netlab"},
		{"pure: file", "internal/plan", Package{Imports: in("os")}, "plan imports os"},
		{"pure: program", "internal/plan", Package{Imports: in("os/exec")}, "plan imports os/exec"},
		{"pure: addresses", "internal/pki", Package{Imports: in("net/netip")}, ""},
		{"pure: web", "internal/ipam", Package{Imports: in("net/http")}, "ipam imports net/http"},
		{"pure: kernel", "internal/model", Package{Imports: in("golang.org/x/sys/unix")}, "model imports golang.org/x/sys/unix"},
		{"pure: golden files in a test", "internal/plan", Package{TestImports: in("os")}, ""},
		{"an applier reads objects", "internal/nft", Package{Deps: in("~internal/model")}, "nft links " + Module + "/internal/model"},
		{"an applier reads the API", "internal/route", Package{Deps: in("~api/v1alpha1")}, "route links " + Module + "/api"},
		{"an applier knows Kubernetes", "internal/ipsec/vici", Package{Deps: in("k8s.io/apimachinery/pkg/types")}, "vici links k8s.io"},
		{"nftables' library is none of it", "internal/nft", Package{Imports: in("sigs.k8s.io/knftables"), Deps: in("sigs.k8s.io/knftables")}, ""},
		{"a small hub", "cmd/culvert-tunnel", Package{Deps: in("k8s.io/client-go/rest")}, "culvert-tunnel links k8s.io/client-go"},
		{"the whole program", "cmd/culvert", Package{Deps: in("k8s.io/client-go/rest")}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.given.ImportPath = Module + "/" + tt.pack
			got := Check([]Package{tt.given})
			if tt.want == "" && len(got) > 0 {
				t.Errorf("refused: %q", got)
			}
			if tt.want != "" && (len(got) != 1 || !strings.Contains(got[0], tt.want)) {
				t.Errorf("got %q, want one line with %q", got, tt.want)
			}
		})
	}
}

// Where the appliers and pure packages are named they also have a floor, and no package
// has two.
func TestTable(t *testing.T) {
	all := slices.Concat(floors...)
	for _, name := range slices.Concat(pure, appliers, forTests) {
		if !slices.Contains(all, name) {
			t.Errorf("%s has a rule but no floor", name)
		}
	}
	slices.Sort(all)
	if len(slices.Compact(slices.Clone(all))) != len(all) {
		t.Errorf("a package is on two floors: %q", all)
	}
}

func TestImpureUses(t *testing.T) {
	tests := []struct {
		name, src string
		want      int
	}{
		{"none", `import "time"; func f(now time.Time, d time.Duration) time.Time { return now.Add(d) }`, 0},
		{"call", `import "time"; var t = time.Now()`, 1},
		{"as a value", `import "time"; var clock = time.Now`, 1},
		{"waiting", `import "time"; func f() { time.Sleep(1); <-time.After(1) }`, 2},
		{"renamed", `import clock "time"; var t = clock.Since(clock.Time{})`, 1},
		{"dot", `import . "time"; var t = Now()`, 1},
		{"another's Now", `import "example.org/sim"; var t = sim.Now()`, 0},
		{"a socket", `import "net"; var l, _ = net.Listen("tcp", "")`, 1},
		{"text of an address", `import "net"; var s = net.JoinHostPort("h", "1")`, 0},
		{"a field", `import "time"; type s struct{ Now time.Time }; func f(x s) time.Time { return x.Now }`, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := impureUses("x.go", "package x\n"+tt.src)
			if err != nil || len(got) != tt.want {
				t.Errorf("got %q, %v; want %d uses", got, err, tt.want)
			}
		})
	}
}
