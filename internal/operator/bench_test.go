package operator

import (
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/source"
)

// BenchmarkDecide is the decision of a round about devices none of which changed.
func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var objects model.Objects
			g := gateway()
			g.Spec.DeviceCIDRs[0] = "10.64.0.0/16"
			objects.Add(model.Decoded{Object: g})
			for i := range n {
				d := device(fmt.Sprintf("d%d", i))
				d.CreationTimestamp = metav1.NewTime(time.Unix(int64(i), 0))
				objects.Add(model.Decoded{Object: d})
			}
			var in source.Incumbents
			for b.Loop() {
				m, problems, _ := in.Parse(objects, model.ParseOptions{InEffect: model.InEffect(objects), SecretsElsewhere: true})
				if len(problems) > 0 || len(m.Gateways[0].Devices) != n {
					b.Fatalf("%d problems", len(problems))
				}
			}
		})
	}
}
