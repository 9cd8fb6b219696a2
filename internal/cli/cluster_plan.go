package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// world is a cluster's objects and what they mean. Secrets are not read: nobody needs the
// right to see a plan in which they are redacted.
type world struct {
	model    *model.Model
	gateways map[model.ID]*v1alpha1.VPNGateway
	devices  map[model.ID]*v1alpha1.Device
}

func (c *connection) world(ctx context.Context) (*world, error) {
	w := &world{gateways: map[model.ID]*v1alpha1.VPNGateway{}, devices: map[model.ID]*v1alpha1.Device{}}
	inv, err := c.inventory(ctx, "")
	if err != nil {
		return nil, err
	}
	var objects model.Objects
	add := func(o metav1.Object) { objects.Add(model.Decoded{Object: o}) }
	opts := model.ParseOptions{SecretsElsewhere: true}
	for i := range inv.gateways {
		o := &inv.gateways[i]
		w.gateways[model.ID{Namespace: o.Namespace, Name: o.Name}] = o
		add(o)
		found := &o.Status.Cluster
		opts.Found = model.ClusterRanges{Pods: ranges(found.PodCIDRs), Services: ranges(found.ServiceCIDRs), Nodes: ranges(found.NodeCIDRs)}
	}
	for i := range inv.sites {
		add(&inv.sites[i])
	}
	for i := range inv.devices {
		o := &inv.devices[i]
		w.devices[model.ID{Namespace: o.Namespace, Name: o.Name}] = o
		add(o)
	}
	var services corev1.ServiceList
	var slices discoveryv1.EndpointSliceList
	var nodes corev1.NodeList
	for _, list := range []client.ObjectList{&services, &slices, &nodes} {
		if err := c.List(ctx, list); err != nil {
			return nil, c.explain(err)
		}
	}
	for i := range services.Items {
		add(&services.Items[i])
	}
	for i := range slices.Items {
		add(&slices.Items[i])
	}
	for i := range nodes.Items {
		add(&nodes.Items[i])
	}
	opts.InEffect = model.InEffect(objects)
	w.model = model.Parse(objects, opts)
	return w, nil
}

func ranges(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// facts are what operator and gateway have told in status.
func (w *world) facts(gw *model.Gateway) plan.Facts {
	f := plan.Facts{
		Now: time.Now(), Addresses: map[model.ID][]netip.Addr{}, DeviceKeys: map[model.ID]netstate.Key{},
		Nodes: w.model.Nodes,
	}
	status := &w.gateways[gw.ID].Status
	f.PublicKey, _ = netstate.ParseKey(status.PublicKey)
	for _, r := range status.Replicas {
		f.IPsecDatapath = netstate.IPsecDatapath(r.IPsecDatapath)
	}
	for _, e := range status.Endpoints {
		f.NodeName = e.Node
		f.PodIPs = nil
		for _, ip := range e.PodIPs {
			if a, err := netip.ParseAddr(string(ip)); err == nil {
				f.PodIPs = append(f.PodIPs, a)
			}
		}
	}
	for _, d := range gw.Devices {
		o := w.devices[d.ID]
		f.Addresses[d.ID] = addressesOf(o)
		if key, err := netstate.ParseKey(o.Status.PublicKey); err == nil && d.PublicKey.IsZero() {
			f.DeviceKeys[d.ID] = key
		}
	}
	return f
}

// dialled is the gateway as its far sides reach it, with the MTU that its pods have found.
func (w *world) dialled(gw *model.Gateway) *model.Gateway {
	out := *gw
	status := &w.gateways[gw.ID].Status
	if status.Address != "" {
		out.Address = status.Address
	}
	if status.WireGuardPort != 0 {
		out.WireGuardPort = uint16(status.WireGuardPort)
	}
	for _, r := range status.Replicas {
		if mtu := int(r.MTU); mtu > 0 && (out.MTU == 0 || mtu < out.MTU) {
			out.MTU = mtu
		}
	}
	return &out
}

// planOfCluster plans the gateway that the flags name, with what the cluster knows of it.
func planOfCluster(cmd *cobra.Command, flags *clusterFlags, name string) ([]string, error) {
	c, err := flags.connect()
	if err != nil {
		return nil, err
	}
	w, err := c.world(cmd.Context())
	if err != nil {
		return nil, err
	}
	for _, p := range w.model.Problems {
		fmt.Fprintln(cmd.ErrOrStderr(), problemLine(p))
	}
	gw, err := gateway.Choose(w.model.Gateways, name)
	if err != nil {
		if len(w.model.Gateways) == 0 {
			return nil, errors.New("the cluster has no VPNGateway in effect")
		}
		return nil, err
	}
	return plan.Gateway(gw, w.facts(gw)).State.Lines(), nil
}
