package operator

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// PodManager is the field manager that a gateway pod writes statuses with.
func PodManager(pod string) string { return "culvert-gateway/" + pod }

// departure is a status in which a pod still has a say that is gone for good.
type departure struct {
	kind string
	id   model.ID
	pod  string
}

// departed takes out of statuses what pods wrote that a gateway no longer has: its
// replicas were reduced. A pod that only restarts keeps its entries.
func (r *round) departed(ctx context.Context) error {
	var list []departure
	for id, g := range r.gateways {
		gone := func(pod string) bool {
			number, ok := strings.CutPrefix(pod, workload.GatewayName(id.Name)+"-")
			n, err := strconv.Atoi(number)
			return ok && err == nil && n >= g.Replicas
		}
		note := func(kind string, of model.ID, pod string) {
			if d := (departure{kind, of, pod}); gone(pod) && !slices.Contains(list, d) {
				list = append(list, d)
			}
		}
		o := r.seen.gateways[id]
		for _, e := range o.Status.Endpoints {
			note(model.KindGateway, id, e.Pod)
		}
		for _, x := range o.Status.Replicas {
			note(model.KindGateway, id, x.Name)
		}
		for _, s := range g.Sites {
			for _, p := range r.seen.sites[s.ID].Status.Paths {
				note(model.KindSite, s.ID, p.Replica)
			}
		}
	}
	return each(ctx, list, func(ctx context.Context, d departure) error {
		u := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{}}}
		u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(d.kind))
		u.SetNamespace(d.id.Namespace)
		u.SetName(d.id.Name)
		// Who applies less than before gives up the rest.
		err := r.Writer.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(PodManager(d.pod)), client.ForceOwnership)
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("status of %s %s, of pod %s: %w", d.kind, d.id, d.pod, err)
		}
		return nil
	})
}
