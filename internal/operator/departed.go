package operator

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
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
// replicas were reduced. A pod that only restarts keeps its entries, with one exception: a path
// that is up was left by a pod that died, and goes, when another one works in its place, or when the
// gateway stands still.
func (r *round) departed(ctx context.Context) error {
	var list []departure
	doubted := map[departure]bool{}
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
				d := departure{model.KindSite, s.ID, p.Replica}
				switch {
				case p.State != v1alpha1.PathUp:
				case g.still != nil && !slices.Contains(list, d):
					list = append(list, d)
				case g.still == nil && replaced(o, p.Replica):
					doubted[d] = true
				}
			}
		}
	}
	list = append(list, r.believe(doubted)...)
	return each(ctx, list, r.withdraw)
}

// withdraw takes what a pod said out of a status, as it was when that was decided: a pod that is
// back and has spoken since is not silenced, and the next round looks again.
func (r *round) withdraw(ctx context.Context, d departure) error {
	u := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{}}}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(d.kind))
	u.SetNamespace(d.id.Namespace)
	u.SetName(d.id.Name)
	if d.kind == model.KindSite {
		u.SetResourceVersion(r.seen.sites[d.id].ResourceVersion)
	}
	// Who applies less than before gives up the rest.
	err := r.Writer.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(PodManager(d.pod)), client.ForceOwnership)
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("status of %s %s, of pod %s: %w", d.kind, d.id, d.pod, err)
	}
	return nil
}

// replaced reports whether another pod works than one that has said something.
func replaced(o *v1alpha1.VPNGateway, pod string) bool {
	other := false
	for _, e := range o.Status.Endpoints {
		if e.Active && e.Pod == pod {
			return false
		}
		other = other || e.Active
	}
	return other
}

// doubtFor is how long a pod that lives may take to say that it does not work any more.
const doubtFor = 5 * time.Second

// believe returns what has been in doubt for long enough, and looks again soon at the rest.
func (r *round) believe(doubted map[departure]bool) (list []departure) {
	maps.DeleteFunc(r.doubts, func(d departure, _ time.Time) bool { return !doubted[d] })
	for d := range doubted {
		since, known := r.doubts[d]
		switch {
		case !known:
			r.doubts[d] = r.Now()
			r.waiting = true
		case r.Now().Sub(since) < doubtFor:
			r.waiting = true
		default:
			list = append(list, d)
		}
	}
	return list
}
