package netlab

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// The second hosting gateway's addresses.
const (
	public2   = "203.0.114.10"
	fabricIP2 = "10.244.3.10"
	pool2     = "192.168.132.0/22"
)

// secondGateway adds a gateway of the same cluster, with ranges of its own behind it.
func (n *network) secondGateway(ranges ...string) *labtest.Host {
	n.t.Helper()
	h := n.Host("gateway-2")
	n.Connect(n.internet, "gateway-2", "203.0.114.1/24", h, "public", public2+"/24")
	n.Connect(n.fabric, "gateway-2", "10.244.3.1/24", h, "eth0", fabricIP2+"/24")
	h.IP("route", "add", "default", "via", "203.0.114.1")
	h.IP("route", "add", "10.244.0.0/16", "via", "10.244.3.1")
	for _, r := range ranges {
		n.fabric.IP("route", "add", r, "via", fabricIP2)
	}
	return h
}

// pathsYAML are the fields of a site with two gateways in front of it.
func pathsYAML(prefer, keyA, probeA, localA, keyB, probeB, localB string) string {
	return fmt.Sprintf("wireguard: {prefer: %s, publicKey: %s, endpoint: \"%s:51820\", persistentKeepaliveSeconds: 5, probe: {address: %s, localAddress: %s}, "+
		"alternatives: [{publicKey: %s, endpoint: \"%s:51820\", probe: {address: %s, localAddress: %s}}]}",
		prefer, keyA, public, probeA, localA, keyB, public2, probeB, localB)
}

// inUse is the index of the path that a gateway uses for its site "hosting"; negative: none.
func inUse(r *culvert.Report) (int, error) {
	p := peer(r, "default/hosting")
	if p == nil || len(p.Paths) != 2 {
		return -1, fmt.Errorf("site hosting: %+v", p)
	}
	for i, path := range p.Paths {
		if path.Active {
			return i, nil
		}
	}
	return -1, nil
}

// awaitPaths waits until a gateway uses a path and knows the health of both.
func (g *gateway) awaitPaths(want int, health ...string) {
	g.t.Helper()
	g.await(fmt.Sprintf("path %d is in use, paths are %v", want, health), 30*time.Second, func(r *culvert.Report) error {
		got, err := inUse(r)
		if err != nil {
			return err
		}
		paths := peer(r, "default/hosting").Paths
		if got != want || paths[0].Health != health[0] || paths[1].Health != health[1] {
			return fmt.Errorf("uses %d; %+v", got, paths)
		}
		return nil
	})
}

// hostedTwice is a remote cluster that two gateways of a hosting cluster know as a site.
type hostedTwice struct {
	*network
	a, b, remote *gateway
	pod          *labtest.Host
	outside      *capture // on the remote side's way to the internet
}

// newHostedTwice joins them; the remote gateway's address in the tunnels is local.
func newHostedTwice(t *testing.T, local string) *hostedTwice {
	n := newNetwork(t)
	x := &hostedTwice{network: n, a: newGateway(t, n.gateway), b: newGateway(t, n.secondGateway())}
	_, inside := n.natted("remote")
	router(inside)
	x.remote, x.pod = newGateway(t, inside), n.Host("remote-pod")
	n.Connect(inside, "pods", "10.60.1.1/24", x.pod, "eth0", remotePod+"/24")
	x.pod.IP("route", "add", "default", "via", "10.60.1.1")
	x.outside = sniff(t, inside, "eth0", nil)
	for _, g := range []*gateway{x.a, x.b} {
		g.write("gateway.yaml", strings.Replace(gatewayYAML("clusterTraffic: {source: Masquerade}"), "  deviceCIDRs: [10.99.0.0/20, \"fd00:99::/64\"]\n", "", 1)+
			siteYAML("remote", "10.60.0.0/16", "wireguard: {publicKey: "+x.remote.public.String()+"}"))
		g.run()
	}
	x.remote.write("gateway.yaml", "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: edge, namespace: default}\nspec: {cluster: {podCIDRs: [10.60.0.0/16]}, expose: {type: None}}\n"+
		siteYAML("hosting", "10.244.0.0/16", pathsYAML("EvenOdd", x.a.public.String(), fabricIP, local, x.b.public.String(), fabricIP2, local)))
	x.remote.run()
	x.remote.awaitNoProblems()
	return x
}

// Two gateways of a hosting cluster: which one the remote cluster uses follows from its
// address, the other one takes over in two seconds, also for what is open, and what goes
// through it stays there when the first one is back: nothing is lost then. With both gone
// nothing leaves, and who asks is told at once.
func TestTwoGatewaysEvenOdd(t *testing.T) {
	for local, want := range map[string]int{"10.60.0.2": 0, "10.60.0.3": 1} {
		t.Run(local, func(t *testing.T) {
			x := newHostedTwice(t, local)
			first, second := x.a, x.b
			seen := []string{"web-1 " + fabricIP, "web-1 " + fabricIP2}
			if want == 1 {
				first, second = x.b, x.a
				seen[0], seen[1] = seen[1], seen[0]
			}
			x.remote.awaitPaths(want, "up", "up")
			reaches(t, x.pod, "udp", at(web1, port), seen[0], 5*time.Second)

			flow := watch(t, x.pod, at(web1, port), 10*time.Millisecond)
			time.Sleep(300 * time.Millisecond)
			died := time.Now()
			first.kill()
			took := flow.awaitBack(died.Add(50*time.Millisecond), 10*time.Second)
			t.Logf("one gateway killed: back after %s; %s", took.Round(time.Millisecond), flow.stop())
			if most := time.Duration(labtest.Goal(2, 4) * float64(time.Second)); took > most {
				t.Errorf("back after %s, want at most %s", took, most)
			}
			reaches(t, x.pod, "tcp", at(web1, port), seen[1], 5*time.Second)
			if want == 1 {
				return // what follows does not depend on which one is preferred
			}

			open := watch(t, x.pod, at(web1, port), 10*time.Millisecond)
			first.run()
			x.remote.awaitPaths(want, "up", "up")
			reaches(t, x.pod, "udp", at(web1, port), seen[0], 5*time.Second)
			open.unharmed()

			first.kill()
			second.kill()
			x.remote.awaitPaths(-1, "down", "down")
			if _, err := whoFrom(x.pod, "tcp", "", at(web1, port), 2*time.Second); err == nil || !strings.Contains(err.Error(), unix.EHOSTUNREACH.Error()) {
				t.Errorf("with both gateways gone: %v, want %v", err, unix.EHOSTUNREACH)
			}
			x.outside.stop()
			if n := x.outside.clear.Load(); n > 0 || x.outside.total.Load() == 0 {
				t.Errorf("%d of %d packets in the clear, first %+v", n, x.outside.total.Load(), x.outside.first)
			}
		})
	}
}

// The seed's own arrangement: the remote cluster has an address of the pool of either
// gateway. Whoever asks by one is answered through that tunnel, whichever one the remote
// cluster prefers, and both ways in work at once.
func TestTwoPools(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.behind(pool)
	a, b := newGateway(t, n.gateway), newGateway(t, n.secondGateway(pool2))
	_, inside := n.natted("shoot")
	router(inside)
	remote, pod := newGateway(t, inside), n.Host("shoot-pod")
	n.Connect(inside, "pods", "10.60.1.1/24", pod, "eth0", remotePod+"/24")
	pod.IP("route", "add", "default", "via", "10.60.1.1")
	answer(t, pod, remotePod)
	const addressA, addressB = "192.168.128.2", "192.168.132.2"
	for g, devices := range map[*gateway]string{a: pool, b: pool2} {
		g.write("gateway.yaml", hostingYAML(devices)+deviceYAML("shoot", remote.public.String()))
		g.run()
	}
	one, two := serviceYAML("one", []string{addressA})+sliceYAML("one", "IPv4", remotePod), serviceYAML("two", []string{addressB})+sliceYAML("two", "IPv4", remotePod)
	remote.write("gateway.yaml", `apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: default}
spec:
  cluster: {podCIDRs: [10.60.0.0/16], serviceCIDRs: [192.168.128.0/21]}
  clusterTraffic: {services: Translate, source: Masquerade}
  expose: {type: None}
`+siteYAML("hosting", "10.244.0.0/16", "access: {to: [Services]}",
		pathsYAML("EvenOdd", a.public.String(), "192.168.128.1", addressA, b.public.String(), "192.168.132.1", addressB))+one+two)
	remote.run()
	remote.awaitNoProblems()
	remote.awaitPaths(0, "up", "up")
	for _, address := range []string{addressA, addressB} {
		for _, protocol := range []string{"tcp", "udp"} {
			reaches(t, n.web1, protocol, at(address, 80), "shoot-pod 10.60.1.1", 5*time.Second)
		}
		if _, err := whoFrom(n.web1, "tcp", "", at(address, 81), 2*time.Second); err == nil || !strings.Contains(err.Error(), unix.ECONNREFUSED.Error()) {
			t.Errorf("a port that no service has, on %s: %v, want %v", address, err, unix.ECONNREFUSED)
		}
	}
	// What the remote gateway opens itself goes out as its address in the tunnel in use.
	reaches(t, inside, "udp", at(web1, port), "web-1 "+addressA, 5*time.Second)

	other := watch(t, n.web1, at(addressB, 80), 10*time.Millisecond)
	a.kill()
	remote.awaitPaths(1, "down", "up")
	reaches(t, inside, "udp", at(web1, port), "web-1 "+addressB, 5*time.Second)
	a.run()
	remote.awaitPaths(0, "up", "up")
	reaches(t, n.web1, "tcp", at(addressA, 80), "shoot-pod 10.60.1.1", 5*time.Second)
	other.unharmed()
}
