// Package tunnel is the loops behind "culvert hub", "culvert spoke" and "culvert egress":
// they gather objects, certificates and files, hand them to internal/reverse, and follow
// their changes.
//
// Everything works standalone, from flags and files. What a cluster does differently has
// one seam each: where objects come from (the manifests directory is a mounted ConfigMap
// there), where the authority's state lives (State), and where a member keeps its identity
// (Keeper).
package tunnel

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/reverse/hub"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Common is what hub, spoke and egress share.
type Common struct {
	HTTP   string // address:port for health and metrics; empty: none
	PProf  bool
	Logger *slog.Logger
}

// serveHTTP offers health and metrics.
func (c Common) serveHTTP(g *process.Group, r *prometheus.Registry, ready func() error, status any) error {
	if c.HTTP == "" {
		return nil
	}
	health := process.NewHealth()
	health.AddReady("tunnel", ready)
	m := process.Mux(health, r, c.PProf)
	if h, ok := status.(http.Handler); ok {
		m.Handle("GET /v1/status", h)
	}
	return process.ServeTCP(g, c.HTTP, m)
}

// policyOf is what an object's targets allow.
func policyOf(targets []model.Target) policy.Policy {
	var p policy.Policy
	for _, t := range targets {
		r := policy.Rule{CIDRs: t.CIDRs, Names: t.Names}
		for _, x := range t.Ports {
			r.Ports = append(r.Ports, policy.Ports{First: x.First, Last: x.Last})
		}
		p.Rules = append(p.Rules, r)
	}
	return p
}

// exportsOf are an object's exports.
func exportsOf(exports []model.Export) []hub.Export {
	var out []hub.Export
	for _, x := range exports {
		out = append(out, hub.Export{Listener: wire.Listener{Name: x.Name, Listen: x.Listen.String()}, Target: x.Target})
	}
	return out
}

// hubAddresses pairs each replica with where it is reached: one address for all of them
// (a front), or one for each.
func hubAddresses(c *model.RemoteCluster, uid string, addresses []string) ([]wire.HubAddress, error) {
	if len(addresses) != 1 && len(addresses) != c.Replicas {
		return nil, fmt.Errorf("%d addresses for %d hubs: give one for all, or one for each", len(addresses), c.Replicas)
	}
	out := make([]wire.HubAddress, c.Replicas)
	for i := range out {
		a := addresses[0]
		if len(addresses) > 1 {
			a = addresses[i]
		}
		if _, _, err := net.SplitHostPort(a); err != nil {
			return nil, fmt.Errorf("address %q: write host:port", a)
		}
		out[i] = wire.HubAddress{Address: a, ServerName: wire.HubServerName(uid, i, c.FrontName)}
	}
	return out, nil
}

// splitNames sorts names for a certificate into DNS names and addresses.
func splitNames(names []string) (dns []string, addrs []netip.Addr) {
	for _, n := range names {
		if a, err := netip.ParseAddr(n); err == nil {
			addrs = append(addrs, a)
		} else {
			dns = append(dns, strings.ToLower(n))
		}
	}
	return dns, addrs
}

// writeFile replaces a file completely or not at all; only its owner can read it.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// listenTCP listens on an address.
func listenTCP(ctx context.Context, what, address string) (net.Listener, error) {
	c := net.ListenConfig{KeepAlive: -1} // sessions have pings of their own
	l, err := c.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for %s: %w", what, err)
	}
	return l, nil
}

// loopbackOnly refuses addresses that others could reach: there is no password on them.
func loopbackOnly(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("--listen %q: write address:port", address)
	}
	if a, err := netip.ParseAddr(host); host == "localhost" || err == nil && a.IsLoopback() {
		return nil
	}
	return fmt.Errorf("--listen %s: everybody who reaches it could use the tunnel: use a loopback address such as 127.0.0.1:8133", address)
}
