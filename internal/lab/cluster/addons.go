package cluster

import (
	"context"
	_ "embed"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// dnsManifests deploy CoreDNS as kubeadm does, without an upstream.
//
//go:embed dns.yaml
var dnsManifests string

// startNetwork brings up the network for pods that needs more than the nodes have.
func (c *Cluster) startNetwork(ctx context.Context) error {
	if c.options.CNI != Cilium {
		return nil
	}
	return c.SetCilium(ctx, c.options.CiliumValues...)
}

func (c *Cluster) waitReady(ctx context.Context) error {
	if c.options.CNI == NoCNI {
		return c.waitNodes(ctx)
	}
	replace := strings.NewReplacer("IMAGE", dnsImage, "DNS4", DNS[0].String(), "DNS6", DNS[1].String())
	if err := c.Apply(ctx, replace.Replace(dnsManifests)); err != nil {
		return err
	}
	if err := c.waitNodes(ctx); err != nil {
		return err
	}
	if out, err := c.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=180s"); err != nil {
		events, _ := c.Kubectl(ctx, "-n", "kube-system", "get", "events")
		return fmt.Errorf("%w: %s\n%s", err, out, events)
	}
	return nil
}

// waitNodes waits until the nodes are registered and, with a network for pods, Ready.
func (c *Cluster) waitNodes(ctx context.Context) error {
	want := "True"
	if c.options.CNI == NoCNI {
		want = "False"
	}
	err := until(ctx, 3*time.Minute, "nodes report", func() error {
		out, err := c.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.status.conditions[?(@.type=="Ready")].status} {end}`)
		if err != nil {
			return err
		}
		if n := strings.Count(out, want); n != len(c.Nodes) {
			return fmt.Errorf("%d of %s nodes report Ready=%s: %q", n, strconv.Itoa(len(c.Nodes)), want, out)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%w; the log of the first kubelet ends with:\n%s", err, tail(c.Log("node1", "kubelet")))
	}
	return nil
}
