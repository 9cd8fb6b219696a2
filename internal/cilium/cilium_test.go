package cilium

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestAddressing(t *testing.T) {
	own := map[string]any{"ipv4": "10.0.1.5", "ipv6": "fd00::5"}
	stale := map[string]any{"ipv4": "192.168.1.0/24"}
	got := addressing([]any{stale, own}, prefixes("192.168.50.0/24", "fd00:50::/64", "192.168.60.7/32"))
	want := []any{own, map[string]any{"ipv4": "192.168.50.0/25"}, map[string]any{"ipv4": "192.168.50.128/25"},
		map[string]any{"ipv6": "fd00:50::/65"}, map[string]any{"ipv6": "fd00:50:0:0:8000::/65"}, map[string]any{"ipv4": "192.168.60.7/32"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("addressing (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]any{own}, addressing(got, nil)); diff != "" {
		t.Errorf("without ranges (-want +got):\n%s", diff)
	}
}

// merged runs merge over a configuration and returns what it is afterwards, parsed.
func merged(t *testing.T, o *unstructured.Unstructured, ranges ...string) (config map[string]any, changed bool) {
	t.Helper()
	changed, err := merge(o, prefixes(ranges...))
	if err != nil {
		t.Fatal(err)
	}
	text, _, _ := unstructured.NestedString(o.Object, "data", masqKey)
	if err := yaml.Unmarshal([]byte(text), &config); err != nil {
		t.Fatal(err)
	}
	return config, changed
}

func configMap(text string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{"data": map[string]any{"other": "kept"}}}
	_ = unstructured.SetNestedField(o.Object, text, "data", masqKey)
	o.SetAnnotations(map[string]string{"their/own": "kept"})
	return o
}

// What was there before is there afterwards, whatever came in between.
func TestMergeAndUndo(t *testing.T) {
	for name, text := range map[string]string{
		"list":        "nonMasqueradeCIDRs: [10.0.0.0/8]\nmasqLinkLocal: true\nresyncInterval: 60s\n",
		"json":        `{"nonMasqueradeCIDRs":["10.0.0.0/8"],"masqLinkLocal":true}`,
		"theirs, too": "nonMasqueradeCIDRs: [192.168.50.0/24, 10.0.0.0/8]\n",
		"no list":     "masqLinkLocal: true\n",
		"empty list":  "nonMasqueradeCIDRs: []\nmasqLinkLocal: true\n",
		"nothing":     "",
	} {
		t.Run(name, func(t *testing.T) {
			o := configMap(text)
			before := o.DeepCopy()
			if _, changed := merged(t, o); changed {
				t.Error("a change without any range")
			}
			config, changed := merged(t, o, "192.168.50.0/24", "fd00:50::/64")
			list, _ := config[masqField].([]any)
			has := map[any]bool{}
			for _, x := range list {
				has[x] = true
			}
			if !changed || !has["192.168.50.0/24"] || !has["fd00:50::/64"] || !has["10.0.0.0/8"] {
				t.Errorf("changed %v: %v", changed, list)
			}
			if _, changed := merged(t, o, "192.168.50.0/24", "fd00:50::/64"); changed {
				t.Error("the second time changed something")
			}
			merged(t, o, "192.168.60.0/24")
			after, changed := merged(t, o)
			was := map[string]any{}
			if err := yaml.Unmarshal([]byte(text), &was); err != nil {
				t.Fatal(err)
			}
			if list, ok := was[masqField].([]any); ok && len(list) == 0 {
				delete(was, masqField) // means the same
			}
			if after == nil {
				after = map[string]any{}
			}
			if diff := cmp.Diff(was, after); diff != "" || !changed {
				t.Errorf("undone, changed %v (-before +after):\n%s", changed, diff)
			}
			if diff := cmp.Diff(before.GetAnnotations(), o.GetAnnotations()); diff != "" {
				t.Errorf("annotations (-before +after):\n%s", diff)
			}
			if s, _, _ := unstructured.NestedString(o.Object, "data", "other"); s != "kept" {
				t.Error("another key is lost")
			}
		})
	}
}

// A list that we began and somebody has gone on with is theirs.
func TestTakenOverList(t *testing.T) {
	o := configMap("")
	merged(t, o, "192.168.50.0/24")
	config, _ := merged(t, o, "192.168.50.0/24")
	config[masqField] = append(config[masqField].([]any), "8.8.8.0/24")
	b, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	_ = unstructured.SetNestedField(o.Object, string(b), "data", masqKey)
	config, _ = merged(t, o)
	list := config[masqField].([]any)
	if len(list) != len(implied)+1 || list[len(list)-1] != "8.8.8.0/24" {
		t.Errorf("what they have added is not kept: %v", list)
	}
}

func TestMergeRefusesWhatIsNoList(t *testing.T) {
	for _, text := range []string{"nonMasqueradeCIDRs: 10.0.0.0/8\n", "nonMasqueradeCIDRs: [1]\n", ":\n-"} {
		if _, err := merge(configMap(text), prefixes("192.168.50.0/24")); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}
