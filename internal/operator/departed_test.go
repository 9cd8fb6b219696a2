package operator

import (
	"context"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// What a pod said that died is taken back when another one works, and not when it has spoken since
// the operator looked: it is back.
func TestBackBeforeItsWordIsTakenBack(t *testing.T) {
	for _, back := range []bool{false, true} {
		w := newWorld(t, gateway(func(s *v1alpha1.VPNGatewaySpec) { s.Replicas = new(int32(2)) }), site("berlin", "10.1.0.0/16"))
		say := func(first v1alpha1.PathState) {
			t.Helper()
			var s v1alpha1.Site
			get(w, &s, "default", "berlin")
			s.Status.Paths = []v1alpha1.SitePath{{Replica: "culvert-edge-0", State: first}, {Replica: "culvert-edge-1", State: v1alpha1.PathUp}}
			if err := w.client.Status().Update(t.Context(), &s); err != nil {
				t.Fatal(err)
			}
		}
		say(v1alpha1.PathUp)
		var g v1alpha1.VPNGateway
		get(w, &g, "default", "edge")
		g.Status.Endpoints = []v1alpha1.GatewayEndpoint{{Pod: "culvert-edge-0"}, {Pod: "culvert-edge-1", Active: true}}
		if err := w.client.Status().Update(t.Context(), &g); err != nil {
			t.Fatal(err)
		}
		taken, refused := 0, 0
		o := w.operator(interceptor.Funcs{SubResourceApply: func(ctx context.Context, under client.Client, sub string, a runtime.ApplyConfiguration, opts ...client.SubResourceApplyOption) error {
			var options client.SubResourceApplyOptions
			options.ApplyOpts(opts)
			first := options.FieldManager == PodManager("culvert-edge-0")
			if first && back {
				say(v1alpha1.PathDown)
			}
			err := under.SubResource(sub).Apply(ctx, a, opts...)
			switch {
			case first && apierrors.IsConflict(err):
				refused++
			case first:
				taken++
			}
			return err
		}})
		w.rounds(o)
		w.now = w.now.Add(doubtFor + time.Second)
		if err := o.Round(t.Context()); err != nil {
			t.Errorf("back %v: %v", back, err)
		}
		if want := map[bool][2]int{false: {1, 0}, true: {0, 1}}[back]; want != [2]int{taken, refused} {
			t.Errorf("back %v: taken back %d times, %d times refused", back, taken, refused)
		}
	}
}
