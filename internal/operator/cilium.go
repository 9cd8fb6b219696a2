package operator

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/culvert-vpn/culvert/internal/cilium"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// addCilium lets the leader keep Cilium's objects; nil when it is not asked for.
func addCilium(m manager.Manager, o Options) (func([]cilium.Endpoint, []netip.Prefix), error) {
	if !o.Cilium {
		return nil, nil
	}
	client, err := dynamic.NewForConfig(m.GetConfig())
	if err != nil {
		return nil, fmt.Errorf("operator: client for Cilium's objects: %w", err)
	}
	c := cilium.New(cilium.Options{Client: client, Logger: o.Logger})
	if err := m.Add(manager.RunnableFunc(c.Run)); err != nil {
		return nil, fmt.Errorf("operator: %w", err)
	}
	return c.Set, nil
}

// decideLinks finds out which node link each gateway has in effect: the one that it asks for, or,
// where Cilium cannot carry that, the one that it had.
func (r *round) decideLinks(ctx context.Context) {
	all := *r.model // shared with the next Parse, so copied
	all.Gateways = slices.Clone(all.Gateways)
	for i, gw := range all.Gateways {
		asking := *gw
		asking.NodeLink = gw.AskedLink
		all.Gateways[i] = &asking
	}
	r.model = &all
	refused := ""
	if slices.ContainsFunc(all.Gateways, func(gw *model.Gateway) bool { return len(plan.BehindGateway(gw)) > 0 }) {
		refused = r.ciliumRefuses(ctx)
	}
	for _, gw := range all.Gateways {
		link := gw.NodeLink
		if refused != "" && len(plan.BehindGateway(gw)) > 0 {
			link = r.refuseLink(gw, refused)
		}
		if g := r.gateways[gw.ID]; g != nil {
			g.Gateway, g.link = gw, link
		}
	}
}

// refuseLink leaves a gateway with the link that it had, and returns it; empty: it had none that
// can be carried.
func (r *round) refuseLink(gw *model.Gateway, why string) string {
	had := ""
	if o := r.seen.gateways[gw.ID]; o != nil && string(o.Status.NodeLink) != gw.AskedLink {
		had = string(o.Status.NodeLink)
	}
	message := "CiliumEndpoint: " + why
	if had != "" {
		gw.NodeLink = had
		message += "; " + had + ", the last good link, stays in use"
	}
	ref := model.Ref{Kind: model.KindGateway, ID: gw.ID}
	r.problems[ref] = append(r.problems[ref], model.Problem{
		Kind: ref.Kind, Object: gw.ID, Field: "spec.clusterTraffic.nodeLink", Reason: model.ReasonNetworkPlugin, Message: message,
	})
	return had
}

// tellCilium names every gateway pod: those that lead nowhere by Cilium with no ranges, so
// that what they once had is taken back.
func (r *round) tellCilium() {
	if r.Behind == nil {
		return
	}
	var list []cilium.Endpoint
	var ranges []netip.Prefix
	for _, gw := range r.model.Gateways {
		g := r.gateways[gw.ID]
		if g == nil {
			continue
		}
		var behind []netip.Prefix
		if g.link != "" {
			behind = plan.BehindGateway(gw)
		}
		ranges = append(ranges, behind...)
		for _, pod := range r.seen.gateways[gw.ID].Status.Endpoints {
			e := cilium.Endpoint{Namespace: gw.Namespace, Pod: pod.Pod}
			if pod.Active {
				e.Ranges = behind
			}
			list = append(list, e)
		}
	}
	r.Behind(list, ranges)
}

// ciliumRefuses says why no Cilium carries the traffic of sites and devices here, and what to do;
// empty: one does.
func (r *round) ciliumRefuses(ctx context.Context) string {
	if r.Behind == nil {
		return "the operator and the agents may not tell Cilium anything: install the chart with cilium.enabled=true, or set Encapsulated"
	}
	var config corev1.ConfigMap
	err := r.Live.Get(ctx, types.NamespacedName{Namespace: cilium.ConfigNamespace, Name: cilium.ConfigName}, &config)
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Sprintf("there is no ConfigMap %s/%s, so no Cilium that could carry it: set Encapsulated", cilium.ConfigNamespace, cilium.ConfigName)
	case err != nil:
		r.Logger.Warn("cannot read Cilium's settings: taken to be as they should", "error", err)
		return ""
	}
	return cilium.Settings(config.Data).RefusesEndpoints()
}
