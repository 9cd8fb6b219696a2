package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/workload"
)

// ErrLeaseChanged means that a Lease is not what it was when it was read.
var ErrLeaseChanged = errors.New("somebody else has written the Lease")

// Lease says which of a gateway's pods works: the Lease culvert-NAME of the API.
type Lease struct {
	Holder  string // a pod; empty: nobody
	Version string // as read; empty: there is none
}

// Lease reads the gateway's Lease; the zero value when there is none.
func (k *Kube) Lease(ctx context.Context) (Lease, error) {
	name := workload.GatewayName(k.gateway.Name)
	var l coordinationv1.Lease
	err := k.client.Get(ctx, client.ObjectKey{Namespace: k.gateway.Namespace, Name: name}, &l)
	if apierrors.IsNotFound(err) {
		return Lease{}, nil
	}
	if err != nil {
		return Lease{}, fmt.Errorf("read the Lease %s/%s: %w", k.gateway.Namespace, name, err)
	}
	return leaseOf(&l), nil
}

func leaseOf(l *coordinationv1.Lease) Lease {
	out := Lease{Version: l.ResourceVersion}
	if h := l.Spec.HolderIdentity; h != nil {
		out.Holder = *h
	}
	return out
}

// SaveLease gives the Lease to a holder, or to nobody, if it still has the version given; the
// error is ErrLeaseChanged when it has not. The VPNGateway, whose uid is given, owns it.
// Duration is how long a holder may be silent.
func (k *Kube) SaveLease(ctx context.Context, uid types.UID, to Lease, duration time.Duration) (Lease, error) {
	name := workload.GatewayName(k.gateway.Name)
	meta := k.meta(name, uid)
	if to.Version != "" {
		meta["resourceVersion"] = to.Version
	}
	spec := map[string]any{}
	if to.Holder != "" {
		spec = map[string]any{
			"holderIdentity": to.Holder, "leaseDurationSeconds": int32(max(time.Second, duration.Round(time.Second)) / time.Second),
			"renewTime": metav1.NowMicro(),
		}
	}
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: k.gateway.Namespace, Name: name}}
	// Of two that make it at once the API server refuses one: they are different managers.
	err := k.apply(ctx, k.manager, to.Version != "", map[string]any{
		"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec,
	}, l)
	switch {
	case apierrors.IsConflict(err):
		return Lease{}, ErrLeaseChanged
	case err != nil:
		return Lease{}, fmt.Errorf("write the Lease %s/%s: %w", k.gateway.Namespace, name, err)
	}
	return leaseOf(l), nil
}
