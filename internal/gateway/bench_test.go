package gateway

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/store"
)

const lastDevice = `apiVersion: culvert.dev/v1alpha1
kind: Device
metadata: {name: NAME, namespace: default}
spec:
  gatewayRef: {name: edge}
  publicKey: AgMEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
`

// BenchmarkGather takes 10,000 devices, all in one manifest, through the steps between
// the files and the appliers.
func BenchmarkGather(b *testing.B) {
	dir := b.TempDir()
	var text strings.Builder
	text.WriteString(`apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: default}
spec:
  cluster: {podCIDRs: [10.244.0.0/16]}
  deviceCIDRs: [100.64.0.0/16]
`)
	for i := range 10000 {
		fmt.Fprintf(&text, `---
apiVersion: culvert.dev/v1alpha1
kind: Device
metadata: {name: d%d, namespace: default}
spec:
  gatewayRef: {name: edge}
  publicKey: %s
`, i, netstate.Key{1, byte(i >> 8), byte(i)})
	}
	if err := os.WriteFile(filepath.Join(dir, "all.yaml"), []byte(text.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	files := source.NewFiles(dir)
	objects, _, err := files.Read()
	if err != nil || objects.Count() != 10001 {
		b.Fatal(objects.Count(), err)
	}
	known := store.Objects{FirstSeen: map[string]time.Time{}}
	stamp(objects, model.Objects{}, &known, time.Now())
	m := model.Parse(objects, model.ParseOptions{})
	gw := m.Gateways[0]
	addresses, _, _ := plan.Addresses(gw, nil)
	facts := plan.Facts{Addresses: addresses}
	state := plan.Gateway(gw, facts).State
	if len(state.WireGuard[0].Peers) != 10000 {
		b.Fatal("no peers", m.Problems)
	}
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _, _ = source.NewFiles(dir).Read()
		}
	})
	b.Run("edit", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			more := text.String() + strings.ReplaceAll("---\n"+lastDevice, "NAME", fmt.Sprintf("new%d", i))
			if err := os.WriteFile(filepath.Join(dir, "all.yaml"), []byte(more), 0o600); err != nil {
				b.Fatal(err)
			}
			if o, _, err := files.Read(); err != nil || o.Count() != 10002 {
				b.Fatal(o.Count(), err)
			}
		}
	})
	b.Run("stamp", func(b *testing.B) {
		for b.Loop() {
			stamp(objects, model.Objects{}, &known, time.Now())
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		var in source.Incumbents
		for b.Loop() {
			in.Parse(objects, model.ParseOptions{})
		}
	})
	b.Run("refused", func(b *testing.B) { // an edit that breaks all of them
		for b.Loop() {
			b.StopTimer()
			var in source.Incumbents
			in.Parse(objects, model.ParseOptions{})
			var bad model.Objects
			for _, d := range objects.All() {
				if o, ok := d.Object.(*v1alpha1.Device); ok {
					o = o.DeepCopy()
					o.Spec.PublicKey = "none"
					d.Object = o
				}
				bad.Add(d)
			}
			b.StartTimer()
			if _, _, kept := in.Parse(bad, model.ParseOptions{}); len(kept) != 10000 {
				b.Fatal(len(kept))
			}
		}
	})
	b.Run("addresses", func(b *testing.B) {
		book := plan.AddressBook(addresses)
		for b.Loop() {
			plan.Addresses(gw, book)
		}
	})
	b.Run("plan", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			plan.Gateway(gw, facts)
		}
	})
	b.Run("lines", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			state.Lines()
		}
	})
}
