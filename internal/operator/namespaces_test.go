package operator

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// In a namespace that is being deleted, or is gone and has left objects behind, nothing is tried:
// every round would fail, and what others wait for with it. A new one that the cache has not seen
// yet is none of these.
func TestNamespacesThatLeave(t *testing.T) {
	w := newWorld(t, gateway(), device("phone"))
	leaving := namespace("leaving")
	leaving.Finalizers = []string{"example.com/slow"}
	for _, n := range []*corev1.Namespace{leaving, namespace("new")} {
		if err := w.client.Create(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	for _, in := range []string{"leaving", "gone", "new"} {
		g, d := gateway(), device("phone")
		g.Namespace, d.Namespace = in, in
		w.create(g)
		w.create(d)
	}
	if err := w.client.Delete(t.Context(), leaving); err != nil {
		t.Fatal(err)
	}
	w.gatewayRuns()
	var log bytes.Buffer
	o := w.operator(interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
		if in := o.GetNamespace(); in == "leaving" || in == "gone" {
			return apierrors.NewNotFound(schema.GroupResource{Resource: "namespaces"}, in)
		}
		return c.Create(ctx, o, opts...)
	}})
	o.Cached = interceptor.NewClient(w.client, interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
		return withoutNew(ctx, c, l, opts)
	}})
	o.Logger = slog.New(slog.NewTextHandler(&log, nil))
	w.rounds(o)
	var leases coordinationv1.LeaseList
	w.list(&leases)
	var in []string
	for _, l := range leases.Items {
		in = append(in, l.Namespace)
	}
	if got := strings.Join(in, " "); got != "default new" {
		t.Errorf("devices have addresses in %q", got)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "namespace=gone") {
		t.Errorf("it says:\n%s", log.String())
	}
}

// withoutNew lists all namespaces but the one named new.
func withoutNew(ctx context.Context, c client.WithWatch, l client.ObjectList, opts []client.ListOption) error {
	if err := c.List(ctx, l, opts...); err != nil {
		return err
	}
	if p, ok := l.(*metav1.PartialObjectMetadataList); ok && p.Kind == "NamespaceList" {
		p.Items = slices.DeleteFunc(p.Items, func(m metav1.PartialObjectMetadata) bool { return m.Name == "new" })
	}
	return nil
}
