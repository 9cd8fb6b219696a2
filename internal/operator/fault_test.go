package operator

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

var errKilled = errors.New("killed")

// killed makes every write from the n-th on fail: the n-th one before or after it was
// done, as when a process is killed. Count is the number of writes that were tried.
func killed(n int64, after bool, count *atomic.Int64) interceptor.Funcs {
	guard := func(do func() error) error {
		switch i := count.Add(1); {
		case i < n:
			return do()
		case i == n && after:
			_ = do()
		}
		return errKilled
	}
	return interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			return guard(func() error { return c.Create(ctx, o, opts...) })
		},
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			return guard(func() error { return c.Delete(ctx, o, opts...) })
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
			return guard(func() error { return c.Patch(ctx, o, p, opts...) })
		},
		Apply: func(ctx context.Context, c client.WithWatch, o runtime.ApplyConfiguration, opts ...client.ApplyOption) error {
			return guard(func() error { return c.Apply(ctx, o, opts...) })
		},
		SubResourceApply: func(ctx context.Context, c client.Client, sub string, o runtime.ApplyConfiguration, opts ...client.SubResourceApplyOption) error {
			return guard(func() error { return c.SubResource(sub).Apply(ctx, o, opts...) })
		},
	}
}

// The operator is killed at each of its writes in turn, before and after it is done; the
// next one always comes to the same end.
func TestKilledAtEachWrite(t *testing.T) {
	for _, after := range []bool{false, true} {
		for n := int64(1); ; n++ {
			w := newWorld(t, gateway(), site("berlin", "192.168.1.0/24"), device("phone"), device("old"), device("tablet"))
			w.rounds(w.operator(interceptor.Funcs{}))
			w.gatewayRuns()
			// One device goes, one comes, one gets a key of its own, the site another Secret.
			var old v1alpha1.Device
			get(w, &old, "default", "old")
			if err := w.client.Delete(context.Background(), &old); err != nil {
				t.Fatal(err)
			}
			w.collectGarbage()
			w.create(device("new"))
			edit(w, &v1alpha1.Device{}, "tablet", func(d *v1alpha1.Device) {
				d.Spec.PublicKey = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="
			})
			edit(w, &v1alpha1.Site{}, "berlin", func(s *v1alpha1.Site) { s.Spec.IPsec.Auth.PresharedKeySecretRef.Name = "other" })

			var count atomic.Int64
			victim := w.operator(killed(n, after, &count))
			for range 5 {
				if err := victim.Round(context.Background()); err != nil {
					break
				}
			}
			w.rounds(w.operator(interceptor.Funcs{}))
			w.exact()
			if t.Failed() {
				t.Fatalf("after a kill at write %d (after it: %v)", n, after)
			}
			if count.Load() < n {
				if n < 8 {
					t.Errorf("only %d writes were seen: what is tested?", n-1)
				}
				t.Logf("killed at each of %d writes, after it: %v", n-1, after)
				break
			}
		}
	}
}

// Devices come and go at random while operators are killed at random and two of them work
// at once.
func TestRandomDevices(t *testing.T) {
	w := newWorld(t, gateway(), site("berlin", "192.168.1.0/24"))
	w.rounds(w.operator(interceptor.Funcs{}))
	w.gatewayRuns()
	random := rand.New(rand.NewPCG(1, 2))
	var count atomic.Int64
	operators := []*Operator{w.operator(interceptor.Funcs{}), w.operator(interceptor.Funcs{})}
	present := map[string]bool{}
	for step := range 40 {
		for range 10 {
			name := fmt.Sprintf("d%d", random.IntN(60))
			if present[name] {
				var d v1alpha1.Device
				get(w, &d, "default", name)
				if err := w.client.Delete(context.Background(), &d); err != nil {
					t.Fatal(err)
				}
			} else {
				w.create(device(name))
			}
			present[name] = !present[name]
		}
		if step%3 == 0 {
			count.Store(0)
			operators[step%2] = w.operator(killed(1+random.Int64N(40), step%2 == 0, &count))
		}
		var wg sync.WaitGroup
		for _, o := range operators {
			wg.Go(func() { _ = o.Round(context.Background()) })
		}
		wg.Wait()
		w.collectGarbage()
		if step%3 == 2 {
			operators = []*Operator{w.operator(interceptor.Funcs{}), w.operator(interceptor.Funcs{})}
		}
	}
	w.rounds(w.operator(interceptor.Funcs{}))
	w.collectGarbage()
	w.rounds(w.operator(interceptor.Funcs{}))
	w.exact()
	var devices v1alpha1.DeviceList
	w.list(&devices)
	n := 0
	for _, here := range present {
		if here {
			n++
		}
	}
	if len(devices.Items) != n || n < 10 {
		t.Errorf("%d devices are there, of %d", len(devices.Items), n)
	}
}

// Two operators that know nothing of each other never give one address to two devices, nor
// two to one.
func TestTwoOperators(t *testing.T) {
	w := newWorld(t, gateway())
	for i := range 50 {
		w.create(device(fmt.Sprintf("d%d", i)))
	}
	w.gatewayRuns()
	a, b := w.operator(interceptor.Funcs{}), w.operator(interceptor.Funcs{})
	for range 5 {
		var wg sync.WaitGroup
		for _, o := range []*Operator{a, b} {
			wg.Go(func() { _ = o.Round(context.Background()) })
		}
		wg.Wait()
	}
	w.rounds(a)
	w.exact()
}

// hiding shows an operator a cluster without some devices and without claims, as a cache
// does that is behind.
func (w *world) hiding(hidden func(name string) bool) client.Reader {
	return interceptor.NewClient(w.client, interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
			err := c.List(ctx, l, opts...)
			switch x := l.(type) {
			case *v1alpha1.DeviceList:
				x.Items = slices.DeleteFunc(x.Items, func(d v1alpha1.Device) bool { return hidden(d.Name) })
			case *metav1.PartialObjectMetadataList:
				if x.Kind == "LeaseList" {
					x.Items = nil
				}
			}
			return err
		},
	})
}

// Each of two operators knows other devices and none of the claims: no address is ever
// given twice, and in the end each device has one.
func TestTwoOperatorsThatKnowNothingOfEachOther(t *testing.T) {
	w := newWorld(t, gateway(), device("a"), device("b"), device("c"), device("d"))
	w.gatewayRuns()
	first, second := w.operator(interceptor.Funcs{}), w.operator(interceptor.Funcs{})
	first.Cached = w.hiding(func(name string) bool { return name < "c" })
	second.Cached = w.hiding(func(name string) bool { return name >= "c" })
	for range 3 {
		for _, o := range []*Operator{first, second} {
			_ = o.Round(context.Background())
			var devices v1alpha1.DeviceList
			w.list(&devices)
			owners := map[string]string{}
			for _, d := range devices.Items {
				for _, a := range d.Status.Addresses {
					if owners[a] != "" {
						t.Errorf("%s and %s both have %s", owners[a], d.Name, a)
					}
					owners[a] = d.Name
				}
			}
		}
	}
	w.rounds(w.operator(interceptor.Funcs{}))
	w.exact()
}
