package operator

import (
	"fmt"
	"net/netip"

	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/culvert-vpn/culvert/internal/cilium"
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

// tellCilium names every gateway pod: those that lead nowhere by Cilium with no ranges, so
// that what they once had is taken back.
func (r *round) tellCilium() {
	if r.Behind == nil {
		return
	}
	var list []cilium.Endpoint
	var ranges []netip.Prefix
	for _, gw := range r.model.Gateways {
		behind := plan.BehindGateway(gw)
		ranges = append(ranges, behind...)
		o := r.seen.gateways[gw.ID]
		if o == nil {
			continue
		}
		for _, pod := range o.Status.Endpoints {
			e := cilium.Endpoint{Namespace: gw.Namespace, Pod: pod.Pod}
			if pod.Active {
				e.Ranges = behind
			}
			list = append(list, e)
		}
	}
	r.Behind(list, ranges)
}
