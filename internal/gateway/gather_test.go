package gateway

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/store"
)

// gathering is a gateway that reads files and applies nothing.
func gathering(t *testing.T, dir string) *Gateway {
	t.Helper()
	s, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	g := &Gateway{store: s, log: slog.New(slog.DiscardHandler), failed: map[string]string{}}
	if g.backing, err = newDisk(dir, s); err != nil {
		t.Fatal(err)
	}
	return g
}

func TestSecondGatewayStopsNothing(t *testing.T) {
	dir := t.TempDir()
	g := gathering(t, dir)
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if gw, _ := g.gather(); gw != nil || len(g.problems) != 1 {
		t.Errorf("without manifests: %v, %+v", gw, g.problems)
	}
	put("a.yaml", gatewayText)
	if gw, _ := g.gather(); gw == nil || gw.Name != "edge" || len(g.problems) != 0 {
		t.Fatalf("one gateway: %v, %+v", gw, g.problems)
	}
	put("b.yaml", strings.NewReplacer("edge", "another", "10.99.", "10.98.").Replace(gatewayText))
	if gw, _ := g.gather(); gw == nil || gw.Name != "edge" {
		t.Errorf("with a second gateway: %v", gw)
	}
	if len(g.problems) != 1 || !strings.Contains(g.problems[0].Message, "--name") {
		t.Errorf("problems = %+v, want one that names the way out", g.problems)
	}
	if err := os.Remove(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	if gw, _ := g.gather(); gw == nil || gw.Name != "another" {
		t.Errorf("after the first is gone: %v", gw)
	}
}

func TestUnreadableDirectoryKeepsTheModel(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(gatewayText), 0o600); err != nil {
		t.Fatal(err)
	}
	g := gathering(t, dir)
	g.gather()
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if gw, _ := g.gather(); gw == nil || g.Report().Errors["manifests"] == "" {
		t.Errorf("gateway %v, errors %v", gw, g.Report().Errors)
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	if gw, _ := g.gather(); gw == nil || len(g.Report().Errors) != 0 {
		t.Errorf("after the return: gateway %v, errors %v", gw, g.Report().Errors)
	}
}

func TestFailureStaysUntilItsStepWorks(t *testing.T) {
	g := gathering(t, t.TempDir())
	g.check("ipsec", errors.New("no daemon"))
	g.check("wireguard", nil)
	if r := g.Report(); r.Errors["ipsec"] != "no daemon" || len(r.Errors) != 1 {
		t.Errorf("errors = %v", r.Errors)
	}
	g.check("ipsec", nil)
	if r := g.Report(); len(r.Errors) != 0 {
		t.Errorf("errors = %v", r.Errors)
	}
}

func TestHungLoopIsNotHealthy(t *testing.T) {
	if err := stuck(stuckAfter - 1); err != nil {
		t.Error(err)
	}
	if stuck(stuckAfter) == nil {
		t.Error("a hung loop counts as healthy")
	}
}
