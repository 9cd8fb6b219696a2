package cluster_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// testBalancer calls the server on the last node through load balancers that leave the
// caller's address and that hide it.
func testBalancer(t *testing.T, c *clustertest.Cluster) {
	last := c.Nodes[len(c.Nodes)-1]
	outside := []string{"198.18.1.2", "2001:2::1:2"}
	h := c.OutsideHost("o2", outside[0]+"/15", outside[1]+"/48")
	for _, o := range []struct {
		cluster.BalanceOptions
		name, policy string
		seen         []string
	}{
		{cluster.BalanceOptions{}, "local", "Local", outside},
		{cluster.BalanceOptions{SNAT: true}, "hidden", "Local", []string{"172.30.0.1", "fd00:30::1"}},
	} {
		c.Apply(fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: ground}
spec:
  type: LoadBalancer
  externalTrafficPolicy: %s
  selector: {app: ground, node: %s}
  ipFamilyPolicy: RequireDualStack
  ports: [{name: web, port: 80, targetPort: 8080}, {name: echo, port: 81, targetPort: 8081, protocol: UDP}]
`, o.name, o.policy, last.Name))
		b := c.Balance("ground", o.name, o.BalanceOptions)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for i, a := range b.Addresses {
			for what, command := range map[string][]string{
				"TCP": {"get", "http://" + netip.AddrPortFrom(a, 80).String() + "/"},
				"UDP": {"echo", "udp", netip.AddrPortFrom(a, 81).String(), "hello"},
			} {
				labtest.Eventually(t, 20*time.Second, fmt.Sprintf("%s, %s by %s", o.name, what, a), func() error {
					out, err := h.Output(ctx, c.TestServer(), command...)
					if want := "client=" + o.seen[i] + " "; err == nil && !strings.Contains(out, want) {
						err = fmt.Errorf("%q does not have %q", out, want)
					}
					return err
				})
			}
		}
	}
}

// testBalancerMoves takes the server away that a client's UDP flow leads to: the same flow,
// by its ports, then leads to another.
func testBalancerMoves(t *testing.T, c *clustertest.Cluster) {
	h := c.OutsideHost("o3", "198.18.1.3/15")
	c.Apply(`apiVersion: v1
kind: Service
metadata: {name: moves, namespace: ground}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: ground}
  ipFamilyPolicy: RequireDualStack
  ports: [{name: web, port: 80, targetPort: 8080}, {name: echo, port: 81, targetPort: 8081, protocol: UDP}]
`)
	b := c.Balance("ground", "moves", cluster.BalanceOptions{})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	flow := func() error {
		out, err := h.Output(ctx, "sh", "-c", "echo hello | socat -t1 - UDP4:"+b.Addresses[0].String()+":81,sourceport=5000,reuseaddr")
		if err == nil && out != "client=198.18.1.3 hello\n" {
			err = fmt.Errorf("answer %q", out)
		}
		return err
	}
	labtest.Eventually(t, 20*time.Second, "a flow by the load balancer", flow)
	// The client's address alone decides about the node.
	out, err := h.Output(ctx, c.TestServer(), "get", "http://"+b.Addresses[0].String()+"/")
	_, node, ok := strings.Cut(strings.TrimSpace(out), "node=")
	if err != nil || !ok {
		t.Fatalf("no answer with a node: %v: %s", err, out)
	}
	c.Kubectl("-n", "ground", "delete", "pod", "on-"+node, "--grace-period=1")
	labtest.Eventually(t, 20*time.Second, "the flow leads to another node", flow)
	c.Apply(serverPod("ground", node))
	c.Wait("ground", "-l", "app=ground")
}
