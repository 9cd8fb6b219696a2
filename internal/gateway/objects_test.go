package gateway

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/store"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

const gatewayText = `apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: default}
spec:
  cluster: {podCIDRs: [10.244.0.0/16]}
  deviceCIDRs: [10.99.0.0/24]
---
`

func site(name, cidr, key string) string {
	return `apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: ` + name + `, namespace: default}
spec:
  gatewayRef: {name: edge}
  cidrs: [` + cidr + `]
  wireguard: {publicKey: "` + strings.Repeat(key, 42) + `A="}
---
`
}

func snapshot(t *testing.T, text string) model.Objects {
	t.Helper()
	decoded, problems := source.Decode([]byte(text), "test.yaml")
	for _, p := range problems {
		t.Fatalf("manifest: %+v", p)
	}
	var o model.Objects
	for _, d := range decoded {
		o.Add(d)
	}
	return o
}

// ranges lists the sites in effect with their first range.
func ranges(m *model.Model) map[string]string {
	out := map[string]string{}
	for _, g := range m.Gateways {
		for _, s := range g.Sites {
			out[s.Name] = s.CIDRs[0].String()
		}
	}
	return out
}

func TestBadEditLeavesTheLastGoodVersion(t *testing.T) {
	var in source.Incumbents
	in.Parse(snapshot(t, gatewayText+site("berlin", "10.1.0.0/16", "B")), model.ParseOptions{})

	for _, bad := range []string{"127.0.0.0/8", "10.244.3.0/24", "0.0.0.0/0"} {
		m, problems, kept := in.Parse(snapshot(t, gatewayText+site("berlin", bad, "B")), model.ParseOptions{})
		if got := ranges(m)["berlin"]; got != "10.1.0.0/16" {
			t.Errorf("with the range %s berlin has %q, want the old range", bad, got)
		}
		if len(problems) == 0 || !kept[model.Ref{Kind: "Site", ID: model.ID{Namespace: "default", Name: "berlin"}}] {
			t.Errorf("with the range %s: problems %v, kept %v", bad, problems, kept)
		}
	}
	m, problems, _ := in.Parse(snapshot(t, gatewayText+site("berlin", "10.2.0.0/16", "B")), model.ParseOptions{})
	if got := ranges(m)["berlin"]; got != "10.2.0.0/16" || len(problems) > 0 {
		t.Errorf("after the repair: %q, %v", got, problems)
	}
	m, _, _ = in.Parse(snapshot(t, gatewayText), model.ParseOptions{})
	if got := ranges(m); len(got) > 0 {
		t.Errorf("after the removal: %v", got)
	}
}

// A changed object is a newcomer with what it asks for anew: it cannot take what another
// one has, whatever the order of names.
func TestChangedObjectCannotTakeAnothersRange(t *testing.T) {
	var in source.Incumbents
	in.Parse(snapshot(t, gatewayText+site("aaa", "10.1.0.0/16", "B")+site("zzz", "10.2.0.0/16", "C")), model.ParseOptions{})
	m, problems, _ := in.Parse(snapshot(t, gatewayText+site("aaa", "10.2.0.0/24", "B")+site("zzz", "10.2.0.0/16", "C")), model.ParseOptions{})
	if got := ranges(m); got["zzz"] != "10.2.0.0/16" || got["aaa"] != "10.1.0.0/16" {
		t.Errorf("sites = %v, want both as before", got)
	}
	if len(problems) != 1 || problems[0].Object.Name != "aaa" || !strings.Contains(problems[0].Message, "zzz") {
		t.Errorf("problems = %+v, want one about aaa that names zzz", problems)
	}
}

func TestNewcomerIsRefusedAcrossRestarts(t *testing.T) {
	known := store.Objects{FirstSeen: map[string]time.Time{}}
	old := snapshot(t, gatewayText+site("zzz", "10.2.0.0/16", "C"))
	stamp(old, model.Objects{}, &known, time.Now())
	// Another process, which has only the first-seen times; "aaa" comes first in every order
	// of names.
	both := snapshot(t, gatewayText+site("aaa", "10.2.0.0/16", "B")+site("zzz", "10.2.0.0/16", "C"))
	if !stamp(both, model.Objects{}, &known, time.Now().Add(time.Second)) {
		t.Error("a new object does not count as a change")
	}
	var in source.Incumbents
	m, _, _ := in.Parse(both, model.ParseOptions{})
	if got := ranges(m); got["zzz"] == "" || got["aaa"] != "" {
		t.Errorf("sites = %v, want the older one", got)
	}
	if stamp(both, model.Objects{}, &known, time.Now()) {
		t.Error("the same objects count as a change")
	}
	stamp(snapshot(t, gatewayText), model.Objects{}, &known, time.Now())
	if len(known.FirstSeen) != 1 {
		t.Errorf("first-seen times of removed objects are kept: %v", known.FirstSeen)
	}
}

// What is stamped beside the snapshot before is what is stamped from nothing.
func TestStampOfWhatDiffers(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	known, fresh := store.Objects{FirstSeen: map[string]time.Time{}}, store.Objects{FirstSeen: map[string]time.Time{"Site default/old": {}}}
	known.FirstSeen["Site default/old"] = time.Time{}
	var list []model.Decoded
	var last model.Objects
	removed := 0
	for step := range 500 {
		for range random.IntN(3) {
			d := snapshot(t, site(fmt.Sprint("s", random.IntN(12)), "10.1.0.0/16", "B")).All()[0] // some twice
			switch i := random.IntN(len(list) + 1); {
			case len(list) < 8 || i == len(list):
				list = slices.Insert(slices.Clone(list), i, d)
			case random.IntN(3) > 0:
				list = slices.Delete(slices.Clone(list), i, i+1)
			default:
				list = slices.Clone(list)
				list[i] = d
			}
		}
		var objects model.Objects
		for _, d := range list {
			objects.Add(d)
		}
		now, before := time.Unix(int64(step), 0), len(known.FirstSeen)
		got := stamp(objects, last, &known, now)
		if want := stamp(objects, model.Objects{}, &fresh, now); got != want || !reflect.DeepEqual(known, fresh) {
			t.Fatalf("step %d: changed %t, %v\nwant %t, %v", step, got, known, want, fresh)
		}
		for _, d := range list {
			if c := d.Object.GetCreationTimestamp(); c.IsZero() {
				t.Fatalf("step %d: %s has no time", step, d.Ref())
			}
		}
		if len(known.FirstSeen) < before {
			removed++
		}
		last = objects
	}
	if removed < 20 {
		t.Errorf("names went %d times: the test tests little", removed)
	}
}

func TestChoose(t *testing.T) {
	a := &model.Gateway{ID: model.ID{Namespace: "x", Name: "a"}}
	b := &model.Gateway{ID: model.ID{Namespace: "y", Name: "a"}}
	for _, c := range []struct {
		list []*model.Gateway
		name string
		want *model.Gateway
	}{
		{[]*model.Gateway{a}, "", a}, {[]*model.Gateway{a, b}, "", nil}, {[]*model.Gateway{a, b}, "a", nil},
		{[]*model.Gateway{a, b}, "y/a", b}, {nil, "", nil}, {[]*model.Gateway{a}, "b", nil},
	} {
		got, err := Choose(c.list, c.name)
		if got != c.want || (err == nil) != (c.want != nil) {
			t.Errorf("Choose(%d, %q) = %v, %v", len(c.list), c.name, got, err)
		}
	}
}

func TestPeerStates(t *testing.T) {
	now := time.Now()
	key := netstate.Key{1}
	for name, c := range map[string]struct {
		handshake time.Time
		there     bool
		connected bool
		reason    string
	}{
		"fresh":      {now.Add(-2 * time.Minute), true, true, ""},
		"stale":      {now.Add(-staleAfter - time.Second), true, false, "Stale"},
		"never":      {time.Time{}, true, false, "NoHandshake"},
		"not a peer": {time.Time{}, false, false, "NotConfigured"},
	} {
		peers := map[netstate.Key]wireguard.Peer{}
		if c.there {
			peers[key] = wireguard.Peer{PublicKey: key, LastHandshake: c.handshake}
		}
		var p PeerReport
		p.fromWireGuard(key, peers, now)
		if p.Connected != c.connected || p.Reason != c.reason {
			t.Errorf("%s: connected %v, reason %q", name, p.Connected, p.Reason)
		}
		p.waits("spec.suspend is true")
		if p.Connected || p.Reason != "Waiting" {
			t.Errorf("%s and waiting: connected %v, reason %q", name, p.Connected, p.Reason)
		}
	}
}
