package scenario

import (
	"encoding/json"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/source"
)

// surroundings are the cluster around a node and a gateway's pod (node.json.txt).
type surroundings struct {
	Node        string // this one
	Nodes       []model.Node
	Pods        map[string][]plan.GatewayPod // by gateway, "namespace/name"
	UnderlayMTU int
	Links       map[netip.Addr]string
	OnLink      map[netip.Addr]bool
}

// Each directory with node.json.txt holds objects.yaml and what a node and the gateway's
// first pod make of them.
func TestNodePlans(t *testing.T) {
	files, err := filepath.Glob("*/node.json.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, f := range files {
		dir := filepath.Dir(f)
		t.Run(dir, func(t *testing.T) {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			var s surroundings
			if err := json.Unmarshal(data, &s); err != nil {
				t.Fatal(err)
			}
			m := parse(t, filepath.Join(dir, "objects.yaml"))
			m.Nodes = s.Nodes
			golden(t, filepath.Join(dir, "node.golden"), s.node(t, m))
			golden(t, filepath.Join(dir, "gateway.golden"), s.gateway(m.Gateways[0]).String())
		})
	}
}

func parse(t *testing.T, file string) *model.Model {
	t.Helper()
	objects, problems, err := source.Load([]string{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := model.Parse(objects, model.ParseOptions{SecretsElsewhere: true})
	for _, p := range append(problems, m.Problems...) {
		t.Errorf("%s: %s %s: %s: %s", p.Origin, p.Kind, p.Object, p.Field, p.Message)
	}
	return m
}

// node plans the node, and says what waits.
func (s surroundings) node(t *testing.T, m *model.Model) string {
	t.Helper()
	facts := plan.NodeFacts{Pods: map[model.ID][]plan.GatewayPod{}, UnderlayMTU: s.UnderlayMTU, Links: s.Links, OnLink: s.OnLink}
	for name, pods := range s.Pods {
		ns, gw, _ := strings.Cut(name, "/")
		facts.Pods[model.ID{Namespace: ns, Name: gw}] = pods
	}
	for _, n := range s.Nodes {
		if n.Name == s.Node {
			facts.Node = n
		}
	}
	r := plan.Node(m, facts)
	if diff := netstate.Diff(r.State, plan.Node(m, facts).State); diff != nil {
		t.Errorf("two plans differ: %v", diff)
	}
	out := r.State.String()
	for _, object := range slices.Sorted(maps.Keys(r.Waiting)) {
		out += "waiting " + object + ": " + r.Waiting[object] + "\n"
	}
	return out
}

// gateway plans the gateway's first pod.
func (s surroundings) gateway(gw *model.Gateway) netstate.State {
	facts := plan.Facts{Nodes: s.Nodes, UnderlayMTU: s.UnderlayMTU}
	if pods := s.Pods[gw.ID.String()]; len(pods) > 0 {
		facts.NodeName, facts.PodIPs = pods[0].Node, pods[0].PodIPs
	}
	return plan.Gateway(gw, facts).State
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("plan differs from %s (-want +got), see -update:\n%s", file, diff)
	}
}
