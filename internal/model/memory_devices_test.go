package model

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// world is a random set of objects by name, of which most steps change one Device.
type world struct {
	t       *testing.T
	random  *rand.Rand
	objects map[string]Decoded
	calm    bool // nothing contradicts anything
}

func (w *world) put(name, text string, args ...any) {
	w.objects[name] = read(w.t, fmt.Sprintf(text, args...)).All()[0]
}

// any is one of n numbers, or in calm times the one given.
func (w *world) any(own, n int) int {
	if w.calm {
		return own
	}
	return w.random.IntN(n)
}

func (w *world) gateway(i int) {
	w.put(fmt.Sprint("gateway", i), "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: g%d}\nspec: {deviceCIDRs: [10.%d.0.0/16], cluster: {podCIDRs: [10.244.0.0/16]}}\n",
		i, 90+w.any(i, 3))
}

func (w *world) site(i int) {
	w.put(fmt.Sprint("site", i), "apiVersion: culvert.dev/v1alpha1\nkind: Site\nmetadata: {name: s%d}\nspec: {gatewayRef: {name: g%d}, cidrs: [192.168.%d.0/24], wireguard: {publicKey: %s}}\n",
		i, i%2, i, netstate.Key{1, byte(w.any(100+i, 20))})
}

func (w *world) device(i int) {
	g := w.random.IntN(2)
	extra := ""
	if w.random.IntN(2) == 0 {
		extra += fmt.Sprintf(", addresses: [10.%d.0.%d]", 90+g, 2+w.any(i, 10))
	}
	if w.random.IntN(4) == 0 {
		extra += ", presharedKeySecretRef: {name: psk, key: key}"
	}
	if w.random.IntN(4) > 0 {
		extra += ", publicKey: " + netstate.Key{1, byte(w.any(i, 20))}.String()
	}
	w.put(fmt.Sprint("device", i), "apiVersion: culvert.dev/v1alpha1\nkind: Device\nmetadata: {name: d%d}\nspec: {gatewayRef: {name: g%d}%s}\n", w.any(i, 30), w.any(g, 3), extra)
}

// step changes one object, mostly a Device, in calm times nothing else.
func (w *world) step() {
	i := w.random.IntN(20)
	switch what := w.random.IntN(20); {
	case what == 0 && !w.calm:
		w.gateway(i % 2)
	case what == 1 && !w.calm:
		w.site(i % 4)
	case what < 6:
		delete(w.objects, fmt.Sprint("device", i))
	case what == 6: // nothing
	default:
		w.device(i)
	}
}

func (w *world) snapshot() Objects {
	names := slices.Sorted(maps.Keys(w.objects))
	if !w.calm && w.random.IntN(4) == 0 {
		w.random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	}
	var out Objects
	for _, name := range names {
		out.Add(w.objects[name])
	}
	return out
}

// What changed Devices come to beside all that was there is what a Parse of everything gives,
// and leaves the result before as it was.
func TestMemoryOfDevices(t *testing.T) {
	w := &world{t: t, random: rand.New(rand.NewPCG(3, 4)), objects: map[string]Decoded{}}
	var memory Memory
	var before, alike *Model
	refused, short, last := 0, 0, 0
	for step := range 3000 {
		if w.calm = step%300 < 200; step%300 == 0 {
			clear(w.objects)
			for i := range 4 {
				w.gateway(i % 2)
				w.site(i)
			}
			w.put("psk", "apiVersion: v1\nkind: Secret\nmetadata: {name: psk}\nstringData: {key: %s}\n", netstate.Key{9})
		}
		for range 1 + w.random.IntN(2) {
			w.step()
		}
		snapshot := w.snapshot()
		if memory.Changed(snapshot, ParseOptions{Memory: &memory}) != nil {
			short, last = short+1, step
		}
		with, without := Parse(snapshot, ParseOptions{Memory: &memory}), Parse(snapshot, ParseOptions{})
		if !reflect.DeepEqual(without, with) {
			t.Fatalf("step %d: %+v\nwant %+v", step, with, without)
		}
		if !reflect.DeepEqual(before, alike) {
			t.Fatalf("step %d changed the result before", step)
		}
		before, alike = with, without
		refused += len(with.Problems)
	}
	if refused < 1000 || short < 1000 || last < 2700 {
		t.Errorf("%d problems, %d short ways, the last in step %d: the test tests nothing", refused, short, last)
	}
}

// What a Device had is free when it goes.
func TestMemoryOfDevicesReleases(t *testing.T) {
	const text = "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: g}\nspec: {deviceCIDRs: [10.90.0.0/16], cluster: {podCIDRs: [10.244.0.0/16]}}\n---\n" +
		"apiVersion: culvert.dev/v1alpha1\nkind: Device\nmetadata: {name: %s}\nspec: {gatewayRef: {name: g}, addresses: [10.90.0.5], publicKey: %s}\n"
	first, second := read(t, fmt.Sprintf(text, "a", netstate.Key{1})), read(t, fmt.Sprintf(text, "b", netstate.Key{1}))
	second.list[0] = first.list[0] // the very same gateway
	var memory Memory
	Parse(first, ParseOptions{Memory: &memory})
	if m := memory.Changed(second, ParseOptions{Memory: &memory}); m == nil || len(m.Gateways[0].Devices) != 1 || m.Gateways[0].Devices[0].Name != "b" {
		t.Errorf("b in the place of a: %+v", m)
	}
}

// Changed says no rather than to accept what contradicts.
func TestMemoryOfDevicesRefuses(t *testing.T) {
	const gateway = "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: g}\nspec: {deviceCIDRs: [10.90.0.0/16], cluster: {podCIDRs: [10.244.0.0/16]}}\n"
	device := func(name, rest string) string {
		return "\n---\napiVersion: culvert.dev/v1alpha1\nkind: Device\nmetadata: {name: " + name + "}\nspec: {gatewayRef: {name: g}" + rest + "}\n"
	}
	key := func(b byte) string { return ", publicKey: " + netstate.Key{b}.String() }
	first := read(t, gateway+device("a", key(1)+", addresses: [10.90.0.5]"))
	for name, more := range map[string]string{
		"a key": device("b", key(1)), "an address": device("b", key(2)+", addresses: [10.90.0.5]"), "a name": device("a", key(2)),
		"each other": device("b", key(2)) + device("c", key(2)), "names": device("b", key(2)) + device("b", key(3)),
		"no name": device("B_", key(2)), "no address": device("b", key(2)+", addresses: [10.90.0.1]"), "a Secret": device("b", ", presharedKeySecretRef: {name: psk, key: key}"),
	} {
		var memory Memory
		Parse(first, ParseOptions{Memory: &memory})
		second := first
		for _, d := range read(t, more).All() {
			second = Objects{append(slices.Clone(second.list), d)}
		}
		if m := memory.Changed(second, ParseOptions{Memory: &memory}); m != nil {
			t.Errorf("%s: accepted", name)
		}
		with, without := Parse(second, ParseOptions{Memory: &memory}), Parse(second, ParseOptions{})
		if !reflect.DeepEqual(with, without) || len(with.Problems) == 0 {
			t.Errorf("%s: %+v\nwant %+v", name, with, without)
		}
	}
}
