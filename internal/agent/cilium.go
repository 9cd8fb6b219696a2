package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/cilium"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// CiliumCluster is a Cluster whose network plugin may be Cilium.
type CiliumCluster interface {
	// Cilium reads the settings of the cluster's Cilium; nil: there is none.
	Cilium(ctx context.Context) (cilium.Settings, error)
}

// Cilium implements CiliumCluster.
func (k *Kubernetes) Cilium(ctx context.Context) (cilium.Settings, error) {
	var config corev1.ConfigMap
	err := k.client.Get(ctx, client.ObjectKey{Namespace: cilium.ConfigNamespace, Name: cilium.ConfigName}, &config)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("get ConfigMap %s/%s: %w", cilium.ConfigNamespace, cilium.ConfigName, err)
	}
	return cilium.Settings(config.Data), nil
}

// ciliumLink is on every node that Cilium's agent has run on.
const ciliumLink = plan.CiliumHost

// ciliumHost are the node's addresses at that link; none where Cilium has no tunnels between nodes.
func ciliumHost() []netip.Addr {
	l, err := netlink.LinkByName(ciliumLink)
	if err != nil || !exists("cilium_vxlan") && !exists("cilium_geneve") {
		return nil
	}
	list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil
	}
	var out []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.IsLinkLocalUnicast() {
			out = append(out, ip.Unmap())
		}
	}
	return out
}

// ciliumInside are links of Cilium's that lead nowhere but into the node: what arrives by its
// overlay's has been judged in the packet around it.
var ciliumInside = []string{"cilium_net", "cilium_vxlan", "cilium_geneve"}

// looseLinks are those that lead to other nodes, and the encrypted one as soon as it is there.
func looseLinks(n model.Node) ([]string, error) {
	look, err := lookAtLinks(n)
	if err != nil {
		return nil, err
	}
	out := slices.DeleteFunc(look.uplinks, func(l string) bool { return l == netstate.EncryptionLink })
	if exists(netstate.EncryptionLink) {
		out = append(out, netstate.EncryptionLink)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// besideCilium says why nothing can be promised beside the node's Cilium, and by which UDP port
// it carries pods' packets; what was read last holds while nothing can be read.
func (e *encryption) besideCilium(ctx context.Context) (refused string, overlay uint16) {
	cluster, ok := e.cluster.(CiliumCluster)
	if !ok {
		return "", 0
	}
	if e.ciliumAsked.IsZero() || time.Since(e.ciliumAsked) >= askEvery {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		settings, err := cluster.Cilium(ctx)
		if err == nil {
			e.cilium, e.ciliumAsked = settings, time.Now()
		} else if e.ciliumAsked.IsZero() && exists(ciliumLink) {
			return "the network plugin is Cilium, and how it is set cannot be read: " + err.Error(), 0
		}
	}
	switch {
	case e.cilium != nil:
		return e.cilium.RefusesEncryption(), e.cilium.OverlayPort()
	case exists(ciliumLink):
		return fmt.Sprintf("the network plugin is Cilium, and how it is set is not known: there is no ConfigMap %s/%s", cilium.ConfigNamespace, cilium.ConfigName), 0
	}
	return "", 0
}
