package model

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
)

// A Parse that remembers the one before gives what one gives that does not, whatever was
// added, changed or removed, and in whatever order things stand.
func TestMemoryChangesNothing(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	service := func(i int, calm bool) string {
		second, last, port := 96, 1+i, 80
		if !calm { // some out of range, some twice
			second, last, port = 96+random.IntN(2)*100, 1+random.IntN(4), 80+random.IntN(2)
		}
		return fmt.Sprintf("---\napiVersion: v1\nkind: Service\nmetadata: {name: s%d}\nspec: {clusterIP: 10.%d.0.%d, ports: [{port: %d}]}\n", i, second, last, port)
	}
	slice := func(i int, calm bool) string {
		address := random.IntN(256)
		if !calm { // some are no addresses
			address = random.IntN(400)
		}
		return fmt.Sprintf("---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: e%d, labels: {kubernetes.io/service-name: s%d}}\naddressType: IPv4\nports: [{name: '', port: 8080}]\nendpoints: [{addresses: [10.244.0.%d]}]\n",
			i, random.IntN(6), address)
	}
	gateway := read(t, serviceGateway).All()[0]
	objects := map[string]Decoded{}
	var memory Memory
	refused, short := 0, 0
	for step := range 2000 {
		calm := step%200 < 150
		if step%200 == 0 {
			clear(objects)
		}
		i, what := random.IntN(6), random.IntN(6)
		if calm {
			what += random.IntN(12) // mostly slices
		}
		switch what {
		case 0:
			delete(objects, fmt.Sprint("s", i))
		case 1:
			delete(objects, fmt.Sprint("e", i))
		case 2, 3:
			objects[fmt.Sprint("s", i)] = read(t, service(i, calm)).All()[0]
		default:
			objects[fmt.Sprint("e", i)] = read(t, slice(i, calm)).All()[0]
		}
		names := slices.Sorted(maps.Keys(objects))
		if !calm && random.IntN(4) == 0 {
			random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		}
		var snapshot Objects
		snapshot.Add(gateway)
		for _, name := range names {
			snapshot.Add(objects[name])
		}
		if m := memory.Changed(snapshot, ParseOptions{Memory: &memory}); m != nil {
			short++
		}
		with := Parse(snapshot, ParseOptions{Memory: &memory})
		without := Parse(snapshot, ParseOptions{})
		if !reflect.DeepEqual(without, with) {
			t.Fatalf("step %d: %+v\nwant %+v", step, with.Gateways[0].Ports, without.Gateways[0].Ports)
		}
		refused += len(with.Problems)
	}
	if refused == 0 || short < 100 || len(memory.services) == 0 {
		t.Errorf("%d problems, %d short ways, %d services remembered: the test tests nothing", refused, short, len(memory.services))
	}
}
