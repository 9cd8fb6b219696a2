// Package scenario compares plans with text: each directory holds manifests, optionally
// the facts of a host (facts.json), and the plan that must come out (plan.golden).
package scenario

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/source"
)

var update = flag.Bool("update", false, "write plan.golden anew")

func TestPlans(t *testing.T) {
	dirs, err := filepath.Glob("*/gateway.yaml")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, d := range dirs {
		dir := filepath.Dir(d)
		t.Run(dir, func(t *testing.T) {
			got := planOf(t, dir)
			golden := filepath.Join(dir, "plan.golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("plan differs from %s (-want +got), see -update:\n%s", golden, diff)
			}
		})
	}
}

// planOf plans the one gateway of a scenario at a fixed time.
func planOf(t *testing.T, dir string) netstate.State {
	t.Helper()
	objects, problems, err := source.Load([]string{dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := model.Parse(objects, model.ParseOptions{})
	for _, p := range append(problems, m.Problems...) {
		t.Errorf("%s: %s %s: %s: %s", p.Origin, p.Kind, p.Object, p.Field, p.Message)
	}
	gw, err := gateway.Choose(m.Gateways, "")
	if err != nil {
		t.Fatal(err)
	}
	facts := readFacts(t, dir)
	given, _, problems := plan.Addresses(gw, plan.AddressBook(facts.Addresses))
	for _, p := range problems {
		t.Errorf("%s: %s", p.Object, p.Message)
	}
	facts.Addresses = given
	return plan.Gateway(gw, facts).State
}

func readFacts(t *testing.T, dir string) plan.Facts {
	t.Helper()
	public := gateway.PublicFacts{PublicKey: "Z2F0ZXdheS1nYXRld2F5LWdhdGV3YXktZ2F0ZXdheSE="}
	data, err := os.ReadFile(filepath.Join(dir, "facts.json.txt"))
	if err == nil {
		err = json.Unmarshal(data, &public)
	}
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	facts, err := public.Facts()
	if err != nil {
		t.Fatal(err)
	}
	facts.Now = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	return facts
}

// A plan does not depend on the order of the objects, and planning twice gives the same.
func TestPlanIsAFunction(t *testing.T) {
	dirs, _ := filepath.Glob("*/gateway.yaml")
	for _, d := range dirs {
		a, b := planOf(t, filepath.Dir(d)), planOf(t, filepath.Dir(d))
		if diff := netstate.Diff(a, b); diff != nil {
			t.Errorf("%s: two plans differ: %v", d, diff)
		}
	}
}
