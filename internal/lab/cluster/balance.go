package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// Balancer plays the cloud's load balancer for one Service: it has an address of each
// family outside, sends what comes to the Service's ports there to the node ports of
// healthy nodes (a client's address chooses which), and ends the flows to a node that is
// no longer healthy. It lives in this process and on the router.
type Balancer struct {
	// Addresses are those that clients dial, IPv4 first; they are in the Service's status.
	Addresses []netip.Addr

	cluster *Cluster
	options BalanceOptions
	service balanced
	table   string
	healthy []string             // names of nodes, sorted
	seen    map[string]time.Time // when a node last said that it is healthy
	stop    context.CancelFunc
	done    chan struct{}
	failed  error // of the loop; read after done
}

// BalanceOptions say how.
type BalanceOptions struct {
	// SNAT hides the clients behind the balancer's inner address, as some clouds do.
	SNAT bool
	// Patience is how long a node that does not answer at all counts as healthy yet: balancers of
	// clouds want several checks to fail, some seconds apart. One that answers that it is not
	// healthy is left at once. Zero: none, one check decides.
	Patience time.Duration
}

// balanced is what a Balancer needs to know of a Service.
type balanced struct {
	Spec struct {
		Type                string
		HealthCheckNodePort int
		Ports               []struct {
			Protocol       string
			Port, NodePort int
		}
	}
}

// Balance gives a Service of type LoadBalancer a load balancer, until Close. Nodes are
// asked once a second whether they are healthy: at the Service's health check port when it
// has one (externalTrafficPolicy Local), else at kube-proxy's.
func (c *Cluster) Balance(ctx context.Context, namespace, service string, o BalanceOptions) (*Balancer, error) {
	out, err := c.Kubectl(ctx, "-n", namespace, "get", "service", service, "-o", "json")
	if err != nil {
		return nil, err
	}
	b := &Balancer{cluster: c, options: o, seen: map[string]time.Time{}, done: make(chan struct{})}
	if err := json.Unmarshal([]byte(out), &b.service); err != nil {
		return nil, err
	}
	if b.service.Spec.Type != "LoadBalancer" {
		return nil, fmt.Errorf("service %s/%s has type %s: only type LoadBalancer gets a load balancer", namespace, service, b.service.Spec.Type)
	}
	if err := b.claim(ctx); err != nil {
		return nil, err
	}
	if err := b.follow(ctx); err != nil {
		return nil, errors.Join(err, b.release())
	}
	status := fmt.Sprintf(`{"status":{"loadBalancer":{"ingress":[{"ip":%q},{"ip":%q}]}}}`, b.Addresses[0], b.Addresses[1])
	if _, err := c.Kubectl(ctx, "-n", namespace, "patch", "service", service, "--subresource=status", "--type=merge", "-p", status); err != nil {
		return nil, errors.Join(err, b.release())
	}
	var loop context.Context
	loop, b.stop = context.WithCancel(context.WithoutCancel(ctx))
	go b.run(loop)
	return b, nil
}

// Close takes the load balancer away; the Service's status stays. The error is the first
// that it met while it ran.
func (b *Balancer) Close() error {
	b.stop()
	<-b.done
	return errors.Join(b.failed, b.release())
}

// claim takes the first free pair of addresses, 198.18.0.100 and 2001:2::100 onwards.
func (b *Balancer) claim(ctx context.Context) error {
	taken, err := b.cluster.Router.Output(ctx, "ip", "-br", "address", "show", "dev", "out0")
	if err != nil {
		return err
	}
	for n := 100; n < 200; n++ {
		b.Addresses = addresses(fmt.Sprintf("198.18.0.%d", n), fmt.Sprintf("2001:2::%d", n))
		b.table = "balancer-" + strconv.Itoa(n)
		if strings.Contains(taken, b.Addresses[0].String()+"/") {
			continue
		}
		return b.cluster.Router.Up("out0", fmt.Sprintf("%s/32 %s/128", b.Addresses[0], b.Addresses[1]))
	}
	return errors.New("all addresses for load balancers are taken")
}

func (b *Balancer) release() error {
	errs := []error{nft(context.Background(), b.cluster.Router, b.clear())}
	for _, n := range b.cluster.Nodes { // the next balancer has these addresses, and other node ports
		b.endFlows(context.Background(), n)
	}
	for _, a := range b.Addresses {
		errs = append(errs, b.cluster.Router.IP("address", "delete", netip.PrefixFrom(a, a.BitLen()).String(), "dev", "out0"))
	}
	return errors.Join(errs...)
}

// clear is the nft script that removes the balancer's tables, if any.
func (b *Balancer) clear() string {
	return fmt.Sprintf("table ip %[1]s\ndelete table ip %[1]s\ntable ip6 %[1]s\ndelete table ip6 %[1]s\n", b.table)
}

func (b *Balancer) run(ctx context.Context) {
	defer close(b.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		if err := b.follow(ctx); err != nil && ctx.Err() == nil && b.failed == nil {
			b.failed = err
		}
	}
}

// follow asks the nodes for their health and turns to those that have it.
func (b *Balancer) follow(ctx context.Context) error {
	port, path := b.service.Spec.HealthCheckNodePort, "/"
	if port == 0 {
		port, path = 10256, "/healthz"
	}
	var healthy []string
	for _, n := range b.cluster.Nodes {
		switch says(ctx, b.cluster.Router, "http://"+net.JoinHostPort(n.IPs()[0].String(), strconv.Itoa(port))+path) {
		case http.StatusOK:
			b.seen[n.Name] = time.Now()
			healthy = append(healthy, n.Name)
		case 0:
			if time.Since(b.seen[n.Name]) < b.options.Patience {
				healthy = append(healthy, n.Name)
			}
		default:
			delete(b.seen, n.Name)
		}
	}
	if b.healthy != nil && slices.Equal(healthy, b.healthy) {
		return nil
	}
	if err := nft(ctx, b.cluster.Router, b.clear()+b.rules(healthy)); err != nil {
		return err
	}
	for _, n := range b.cluster.Nodes {
		if slices.Contains(b.healthy, n.Name) && !slices.Contains(healthy, n.Name) {
			b.endFlows(ctx, n)
		}
	}
	b.healthy = append([]string{}, healthy...)
	return nil
}

// endFlows forgets the flows to a node; that there were none is no error.
func (b *Balancer) endFlows(ctx context.Context, n *Node) {
	for i, family := range []string{"ipv4", "ipv6"} {
		_, _ = b.cluster.Router.Output(ctx, "conntrack", "-D", "-f", family, "--orig-dst", b.Addresses[i].String(), "--reply-src", n.IPs()[i].String())
	}
}

// rules is the nft script for a set of healthy nodes.
func (b *Balancer) rules(healthy []string) string {
	var s strings.Builder
	for i, family := range []string{"ip", "ip6"} {
		fmt.Fprintf(&s, "table %s %s {\n", family, b.table)
		var choice []string
		for _, n := range b.cluster.Nodes {
			if !slices.Contains(healthy, n.Name) {
				continue
			}
			choice = append(choice, fmt.Sprintf("%d : goto %s", len(choice), n.Name))
			fmt.Fprintf(&s, "\tchain %s {\n", n.Name)
			for _, p := range b.service.Spec.Ports {
				fmt.Fprintf(&s, "\t\t%s dport %d dnat to %s\n", strings.ToLower(p.Protocol), p.Port, netip.AddrPortFrom(n.IPs()[i], uint16(p.NodePort)))
			}
			s.WriteString("\t}\n")
		}
		fmt.Fprintf(&s, "\tchain prerouting {\n\t\ttype nat hook prerouting priority dstnat - 5;\n")
		if len(choice) > 0 {
			fmt.Fprintf(&s, "\t\t%[1]s daddr %[2]s jhash %[1]s saddr mod %[3]d vmap { %[4]s }\n", family, b.Addresses[i], len(choice), strings.Join(choice, ", "))
		}
		s.WriteString("\t}\n")
		if len(choice) == 0 {
			// Not even a conntrack entry: a flow that is tried again is to find its node later.
			fmt.Fprintf(&s, "\tchain nobody {\n\t\ttype filter hook prerouting priority raw;\n\t\t%s daddr %s drop\n\t}\n", family, b.Addresses[i])
		}
		if b.options.SNAT {
			fmt.Fprintf(&s, "\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat - 5;\n\t\tct original %s daddr %s masquerade\n\t}\n", family, b.Addresses[i])
		}
		s.WriteString("}\n")
	}
	return s.String()
}

// says is the status with which an HTTP server, seen from a host, answers; 0: it does not.
func says(ctx context.Context, from *lab.Host, url string) (status int) {
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, address string) (conn net.Conn, err error) {
		err = from.Do(func() error {
			var err error
			conn, err = net.DialTimeout(network, address, time.Second)
			return err
		})
		return conn, err
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0
	}
	answer, err := (&http.Client{Transport: t, Timeout: 2 * time.Second}).Do(r)
	if err != nil {
		return 0
	}
	defer answer.Body.Close()
	return answer.StatusCode
}
