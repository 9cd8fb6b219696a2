package cli

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/secret"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// addressPatience is how long "device add" waits for the operator.
const addressPatience = 30 * time.Second

// inCluster reports whether a device command is about a cluster, and connects.
func (d *deviceFlags) inCluster(cmd *cobra.Command) (*connection, error) {
	if !d.cluster.wanted(cmd, d.manifests, "manifests", "state", "socket") {
		return nil, nil
	}
	if cmd.Flag("namespace").Changed {
		d.cluster.namespace = d.namespace
	}
	return d.cluster.connect()
}

// gateway finds the VPNGateway that a new device is to join: the named one, else the only
// one that lets devices of the namespace in.
func (c *connection) gateway(ctx context.Context, name string) (*v1alpha1.VPNGateway, error) {
	if name != "" {
		ns, short, ok := strings.Cut(name, "/")
		if !ok {
			ns, short = c.namespace, name
		}
		var o v1alpha1.VPNGateway
		if err := c.Get(ctx, client.ObjectKey{Namespace: ns, Name: short}, &o); err != nil {
			return nil, c.explain(err)
		}
		return &o, nil
	}
	var list v1alpha1.VPNGatewayList
	err := c.List(ctx, &list)
	if apierrors.IsForbidden(err) {
		err = c.List(ctx, &list, client.InNamespace(c.namespace))
	}
	if err != nil {
		return nil, c.explain(err)
	}
	list.Items = slices.DeleteFunc(list.Items, func(g v1alpha1.VPNGateway) bool {
		allowed := g.Spec.AllowedDevices.Namespaces
		if len(allowed) == 0 {
			return g.Namespace != c.namespace
		}
		return !slices.Contains(allowed, "*") && !slices.Contains(allowed, v1alpha1.Namespace(c.namespace))
	})
	switch len(list.Items) {
	case 1:
		return &list.Items[0], nil
	case 0:
		return nil, fmt.Errorf("no VPNGateway takes devices of namespace %s: make one there, or ask the owner of one for spec.allowedDevices", c.namespace)
	}
	var names []string
	for _, g := range list.Items {
		names = append(names, g.Namespace+"/"+g.Name)
	}
	return nil, fmt.Errorf("several VPNGateways take devices of namespace %s: choose one with --gateway (%s)", c.namespace, strings.Join(names, ", "))
}

func (a *deviceAdd) inCluster(cmd *cobra.Command, c *connection, d *deviceFlags, name string) error {
	ctx := cmd.Context()
	if !objectName.MatchString(name) {
		return usagef("NAME %q: use lower-case letters, digits, '-' and '.'", name)
	}
	gw, err := c.gateway(ctx, d.gateway)
	if err != nil {
		return err
	}
	id := model.ID{Namespace: c.namespace, Name: name}
	object, err := a.object(id, model.ID{Namespace: gw.Namespace, Name: gw.Name}, time.Now())
	if err != nil {
		return err
	}
	object.Spec.PublicKey = v1alpha1.Key(a.publicKey)
	if err := c.Create(ctx, &object); err != nil {
		if apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("device %s exists already: remove it first, or take another name", id)
		}
		return c.explain(err)
	}
	addrs, err := c.awaitAddress(ctx, id)
	if err != nil {
		return err
	}
	next := command(cmd, fmt.Sprintf("device config %s --namespace %s --qr", name, c.namespace))
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "device %s: %s\nnext: %s\n", id, strings.Join(addrs, ", "), next)
	return err
}

// awaitAddress waits until the operator has allocated addresses, or refused the device.
func (c *connection) awaitAddress(ctx context.Context, id model.ID) ([]string, error) {
	var o v1alpha1.Device
	for deadline := time.Now().Add(addressPatience); ; {
		if err := c.Get(ctx, client.ObjectKey{Namespace: id.Namespace, Name: id.Name}, &o); err != nil {
			return nil, c.explain(err)
		}
		if len(o.Status.Addresses) > 0 {
			return o.Status.Addresses, nil
		}
		accepted := condition(o.Status.Conditions, v1alpha1.ConditionAccepted)
		if accepted.Status == metav1.ConditionFalse {
			return nil, fmt.Errorf("device %s is made, and refused: %s", id, accepted.Message)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("device %s is made, and has no address after %s: see whether the operator runs (culvert doctor)", id, addressPatience)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (c *connection) listDevices(cmd *cobra.Command, out *output) error {
	var list v1alpha1.DeviceList
	if err := c.List(cmd.Context(), &list, client.InNamespace(c.namespace)); err != nil {
		return c.explain(err)
	}
	items := []deviceItem{}
	now := time.Now()
	for i := range list.Items {
		items = append(items, clusterItem(&list.Items[i], now))
	}
	return out.print(cmd.OutOrStdout(), items, func(w io.Writer) error { return printDevices(w, items) })
}

func clusterItem(o *v1alpha1.Device, now time.Time) deviceItem {
	it := deviceItem{
		Name: o.Namespace + "/" + o.Name, Addresses: addressesOf(o), PublicKey: o.Status.PublicKey, State: "active",
		Access: accessText(o.Spec.Access.To),
	}
	if it.PublicKey == "" {
		it.PublicKey = string(o.Spec.PublicKey)
	}
	switch connected := condition(o.Status.Conditions, v1alpha1.ConditionConnected); {
	case condition(o.Status.Conditions, v1alpha1.ConditionAccepted).Status == metav1.ConditionFalse:
		it.State = "refused"
	case connected.Status == metav1.ConditionTrue:
		it.State = "connected"
	}
	if t := o.Spec.ExpirationTime; t != nil {
		it.Expires = &t.Time
		if !t.After(now) {
			it.State = "expired"
		}
	}
	if o.Spec.Suspend {
		it.State = "suspended"
	}
	return it
}

func addressesOf(o *v1alpha1.Device) []netip.Addr {
	var out []netip.Addr
	for _, s := range o.Status.Addresses {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}

func accessText(to []v1alpha1.AccessTarget) string {
	var access netstate.Access
	for _, t := range to {
		switch t {
		case v1alpha1.AccessPods:
			access |= netstate.AccessPods
		case v1alpha1.AccessServices:
			access |= netstate.AccessServices
		case v1alpha1.AccessNodes:
			access |= netstate.AccessNodes
		case v1alpha1.AccessSites:
			access |= netstate.AccessSites
		}
	}
	return access.String()
}

// deviceConfig is the configuration that the operator has made, or, when the device has
// its own key, one without it.
func (c *connection) deviceConfig(ctx context.Context, name string) (secret.Bytes, error) {
	id := model.ID{Namespace: c.namespace, Name: name}
	var o v1alpha1.Device
	if err := c.Get(ctx, client.ObjectKey{Namespace: id.Namespace, Name: id.Name}, &o); err != nil {
		if apierrors.IsNotFound(err) && !isKindMissing(err) {
			return secret.Bytes{}, fmt.Errorf("there is no device %s: see 'culvert device list', or add it with 'culvert device add %s'", id, name)
		}
		return secret.Bytes{}, c.explain(err)
	}
	if accepted := condition(o.Status.Conditions, v1alpha1.ConditionAccepted); accepted.Status == metav1.ConditionFalse {
		return secret.Bytes{}, fmt.Errorf("device %s is refused: %s", id, accepted.Message)
	}
	if o.Spec.PublicKey != "" {
		return c.ownKeyConfig(ctx, id)
	}
	if o.Status.ConfigurationSecret == "" {
		return secret.Bytes{}, fmt.Errorf("device %s has no configuration yet: see its conditions (kubectl describe device -n %s %s)", id, id.Namespace, name)
	}
	var s corev1.Secret
	if err := c.Get(ctx, client.ObjectKey{Namespace: id.Namespace, Name: o.Status.ConfigurationSecret}, &s); err != nil {
		return secret.Bytes{}, c.explain(err)
	}
	config := s.Data[workload.SecretConfig]
	if len(config) == 0 {
		return secret.Bytes{}, fmt.Errorf("device %s has no configuration yet (Secret %s has no %s): the gateway must be up and have an address first, see 'culvert status'", id, s.Name, workload.SecretConfig)
	}
	return secret.New(config), nil
}

// ownKeyConfig works out the configuration of a device whose key pair was made elsewhere.
func (c *connection) ownKeyConfig(ctx context.Context, id model.ID) (secret.Bytes, error) {
	w, err := c.world(ctx)
	if err != nil {
		return secret.Bytes{}, err
	}
	for _, gw := range w.model.Gateways {
		for _, d := range gw.Devices {
			if d.ID != id {
				continue
			}
			facts := w.facts(gw)
			return plan.DeviceConfig(w.dialled(gw), d, secret.Bytes{}, facts)
		}
	}
	return secret.Bytes{}, fmt.Errorf("device %s is not in effect: see 'culvert status'", id)
}

func (c *connection) removeDevice(cmd *cobra.Command, name string) error {
	id := model.ID{Namespace: c.namespace, Name: name}
	err := c.Delete(cmd.Context(), &v1alpha1.Device{ObjectMeta: metav1.ObjectMeta{Namespace: id.Namespace, Name: id.Name}})
	switch {
	case apierrors.IsNotFound(err) && !isKindMissing(err):
		return fmt.Errorf("there is no device %s: see '%s'", id, command(cmd, "device list"))
	case err != nil:
		return c.explain(err)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "device %s removed\n", id)
	return err
}
