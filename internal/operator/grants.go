package operator

import (
	"cmp"
	"context"
	"maps"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

func sortedIDs[V any](m map[model.ID]V) []model.ID {
	return slices.SortedFunc(maps.Keys(m), func(a, b model.ID) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}

func compareStrings(a, b string) int { return cmp.Compare(a, b) }

// grants lets each gateway read the Secrets that its accepted sites and devices name, and
// the operator those of devices.
func (r *round) grants(ctx context.Context) error {
	var sets [][]workload.Object
	for _, id := range sortedIDs(r.gateways) {
		byNamespace := map[string][]string{}
		add := func(ref model.Ref) {
			d, ok := r.good.InEffect(ref)
			if !ok {
				return
			}
			for _, s := range d.Secrets() {
				byNamespace[s.ID.Namespace] = append(byNamespace[s.ID.Namespace], s.ID.Name)
			}
		}
		g := r.gateways[id]
		for _, s := range g.Sites {
			add(model.Ref{Kind: model.KindSite, ID: s.ID})
		}
		for _, d := range g.Devices {
			add(model.Ref{Kind: model.KindDevice, ID: d.ID})
		}
		for _, ns := range slices.Sorted(maps.Keys(byNamespace)) {
			sets = append(sets, r.Workload.Grant(id, ns, byNamespace[ns]))
		}
	}
	if r.ServiceAccount.Name != "" {
		sets = append(sets, r.ownGrants()...)
	}
	return r.applySets(ctx, sets)
}

// ownGrants are for the Secrets of the devices whose key pairs are made here.
func (r *round) ownGrants() [][]workload.Object {
	configurations, presharedKeys := map[string][]string{}, map[string][]string{}
	namespaces := map[string]bool{}
	for id := range r.devices {
		d := r.devices[id]
		if !r.needsSecret(d) {
			continue
		}
		namespaces[id.Namespace] = true
		configurations[id.Namespace] = append(configurations[id.Namespace], workload.DeviceSecret(id.Name))
		if ref := r.seen.devices[id].Spec.PresharedKeySecretRef; ref != nil {
			presharedKeys[id.Namespace] = append(presharedKeys[id.Namespace], ref.Name)
		}
	}
	var sets [][]workload.Object
	for _, ns := range slices.Sorted(maps.Keys(namespaces)) {
		sets = append(sets, r.Workload.OperatorGrant(r.ServiceAccount, ns, configurations[ns], presharedKeys[ns]))
	}
	return sets
}

// needsSecret reports whether a device's Secret is to be made, or to be removed.
func (r *round) needsSecret(d *deviceState) bool {
	return d.PublicKey.IsZero() || r.seen.devices[d.ID].Status.ConfigurationSecret != ""
}

// applySets applies sets of objects side by side, each set in its order.
func (r *round) applySets(ctx context.Context, sets [][]workload.Object) error {
	var work [][]func(context.Context) error
	for _, set := range sets {
		var writes []func(context.Context) error
		for _, o := range set {
			write, err := r.want(o)
			if err != nil {
				return err
			}
			if write != nil {
				writes = append(writes, write)
			}
		}
		if len(writes) > 0 {
			work = append(work, writes)
		}
	}
	return each(ctx, work, func(ctx context.Context, writes []func(context.Context) error) error {
		for _, write := range writes {
			if err := write(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

// workloads makes what the accepted gateways consist of.
func (r *round) workloads(ctx context.Context) error {
	var sets [][]workload.Object
	var failed []error
	for _, id := range sortedIDs(r.gateways) {
		g := r.gateways[id]
		objects, err := workload.Gateway(g.Gateway, r.Workload)
		if err != nil {
			failed = append(failed, err)
			r.keepAll(id)
			continue
		}
		sets = append(sets, objects)
	}
	if err := r.applySets(ctx, sets); err != nil {
		failed = append(failed, err)
	}
	return summary(failed)
}

// keepAll exempts everything of a gateway from pruning.
func (r *round) keepAll(id model.ID) {
	labels := workload.Labels(id, workload.ComponentGateway)
	for key, o := range r.seen.owned {
		if sameGateway(o.meta.Labels, labels) {
			r.desired[key] = true
		}
	}
}

func sameGateway(a, b map[string]string) bool {
	return a[workload.LabelGateway] == b[workload.LabelGateway] && a[workload.LabelGatewayNamespace] == b[workload.LabelGatewayNamespace]
}

// hubsUnwanted reports whether hubs' objects that are not desired can go: their RemoteCluster
// is accepted, or off, or gone. Of one that is refused nothing is deleted.
func (r *round) hubsUnwanted(ctx context.Context, m metav1.ObjectMeta, live *map[model.ID]bool) bool {
	if *live == nil {
		*live = map[model.ID]bool{}
		var list v1alpha1.RemoteClusterList
		if err := r.Live.List(ctx, &list); err != nil {
			r.Logger.Warn("cannot look for remote clusters; nothing of theirs is pruned", "error", err)
			*live = nil
			return false
		}
		for i := range list.Items {
			if o := &list.Items[i]; r.refused(idOf(o)) || r.seen.remotes[idOf(o)] == nil {
				(*live)[idOf(o)] = true
			}
		}
	}
	for id := range *live {
		if id.Namespace == m.Namespace && sameRemote(m.Labels, workload.HubLabels(id)) {
			return false
		}
	}
	return true
}

// prune deletes what nobody asks for any more. Of a gateway that is there but refused
// nothing is deleted: it may be running.
func (r *round) prune(ctx context.Context) error {
	type doomed struct {
		key objectKey
		ownedObject
	}
	var list []doomed
	for key, o := range r.seen.owned {
		if !r.desired[key] && o.meta.DeletionTimestamp.IsZero() {
			list = append(list, doomed{key, o})
		}
	}
	slices.SortFunc(list, func(a, b doomed) int {
		return cmp.Or(cmp.Compare(a.key.kind.Kind, b.key.kind.Kind), cmp.Compare(a.key.namespace, b.key.namespace), cmp.Compare(a.key.name, b.key.name))
	})
	var live *v1alpha1.VPNGatewayList
	var liveRemotes map[model.ID]bool
	list = slices.DeleteFunc(list, func(d doomed) bool {
		labels := d.meta.Labels
		if labels[workload.LabelRemoteCluster] != "" {
			return !r.hubsUnwanted(ctx, d.meta, &liveRemotes)
		}
		if labels[workload.LabelGateway] == "" {
			return labels[workload.LabelComponent] != workload.ComponentGrant
		}
		for id := range r.gateways {
			if sameGateway(labels, workload.Labels(id, "")) {
				return false
			}
		}
		if live == nil {
			live = &v1alpha1.VPNGatewayList{}
			if err := r.Live.List(ctx, live); err != nil {
				r.Logger.Warn("cannot look for gateways; nothing is pruned", "error", err)
				live = nil
				return true
			}
		}
		return slices.ContainsFunc(live.Items, func(g v1alpha1.VPNGateway) bool {
			return sameGateway(labels, workload.Labels(idOf(&g), ""))
		})
	})
	return each(ctx, list, func(ctx context.Context, d doomed) error {
		err := r.remove(ctx, d.key.kind.WithVersion(d.version), d.meta)
		if err == nil {
			r.Logger.Info("deleted what is not needed any more", "kind", d.key.kind.Kind, "object", idOf(&d.meta).String())
		}
		return err
	})
}
