package netlab

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// pool is what the hosting cluster gives its remote clusters addresses of.
const pool = "192.168.128.0/22"

// hostingYAML is the gateway of the hosting cluster: each remote cluster is a Device.
func hostingYAML(devices string) string {
	return strings.Replace(gatewayYAML(), `deviceCIDRs: [10.99.0.0/20, "fd00:99::/64"]`, "deviceCIDRs: ["+devices+"]", 1)
}

// remoteYAML is the gateway of a remote cluster: what the hosting cluster may reach of it
// is a Service with the address that it was given; more of it is not seen. The hosting
// cluster's whole pool is its service range: so it cannot be used for anything else here.
// Its own pool, for clusters that it hosts itself, is own.
func remoteYAML(address, hosting, own, publicKey string) string {
	return `apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: default}
spec:
  cluster:
    podCIDRs: [10.60.0.0/16]
    serviceCIDRs: [` + hosting + `]
  deviceCIDRs: [` + own + `]
  clusterTraffic: {services: Translate, source: Masquerade}
  expose: {type: None}
` + siteYAML("hosting", "10.244.0.0/16",
		"access: {to: [Services]}",
		"wireguard: {publicKey: "+publicKey+", endpoint: "+public+":51820, persistentKeepaliveSeconds: 5}") +
		serviceYAML("api", []string{address}) + sliceYAML("api", "IPv4", remotePod)
}

// remotePod is in every remote cluster: they all have the same ranges.
const remotePod = "10.60.1.10"

// remote is a cluster that only dials out.
type remote struct {
	nat     *wire
	gateway *gateway
	pod     *labtest.Host
	address string // in the pool
}

// remoteCluster adds one behind NAT, and joins it.
func (n *network) remoteCluster(hosting *gateway, name string) *remote {
	n.t.Helper()
	nat, inside := n.natted(name)
	router(inside)
	r := &remote{nat: nat, pod: n.Host(name + "-pod"), gateway: newGateway(n.t, inside)}
	n.Connect(inside, "pods", "10.60.1.1/24", r.pod, "eth0", remotePod+"/24")
	r.pod.IP("route", "add", "default", "via", "10.60.1.1")
	answer(n.t, r.pod, remotePod)

	hosting.write(name+".yaml", deviceYAML(name, r.gateway.public.String(), "access: {to: []}"))
	hosting.await(name+" has an address", 5*time.Second, func(report *culvert.Report) error {
		p := peer(report, "default/"+name)
		if p == nil || len(p.Addresses) != 1 {
			return fmt.Errorf("%+v", p)
		}
		r.address = p.Addresses[0].Addr().String()
		return nil
	})
	r.gateway.write("gateway.yaml", remoteYAML(r.address, pool, "192.168.132.0/22", hosting.public.String()))
	r.gateway.run()
	r.gateway.awaitNoProblems()
	return r
}

// The WireGuard variant of the reversed tunnel: a hosting cluster reaches two clusters
// that lie behind NAT, dial in and have the very same ranges (also the one for clusters
// that they host themselves), each by an address of the pool, which the gateway allocates.
func TestReversedByWireGuard(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.behind(pool)
	hosting := newGateway(t, n.gateway)
	hosting.write("gateway.yaml", hostingYAML(pool))
	hosting.run()
	a, b := n.remoteCluster(hosting, "shoot-a"), n.remoteCluster(hosting, "shoot-b")
	if a.address != "192.168.128.2" || b.address != "192.168.128.3" {
		t.Errorf("allocated %s and %s", a.address, b.address)
	}
	if os.Getenv("CULVERT_KERNEL") == "1" { // where the kernel has it, the kernel does it
		for _, g := range []*gateway{hosting, a.gateway, b.gateway} {
			if out := g.host.Run("ip", "-o", "link", "show", "type", "wireguard"); strings.Count(out, ": cvt") != 1 {
				t.Fatalf("the links of type wireguard of %s: %q", g.host.Name, out)
			}
		}
	}
	for _, protocol := range []string{"tcp", "udp"} {
		reaches(t, n.web1, protocol, at(a.address, 80), "shoot-a-pod 10.60.1.1", 10*time.Second)
		reaches(t, n.web2, protocol, at(b.address, 80), "shoot-b-pod 10.60.1.1", 10*time.Second)
	}
	// Nothing else of a remote cluster is reached, nor one remote cluster from the other.
	blocked := newGroup(t)
	blocked.blocked(n.web1, "tcp", at(remotePod, port))
	blocked.blocked(n.web1, "tcp", at(a.address, port))
	blocked.blocked(a.pod, "tcp", at(b.address, 80))
	blocked.blocked(a.pod, "tcp", at(web1, port))
	blocked.wait()

	// The NAT gets another address: the remote gateway's keepalive tells the hosting one.
	a.nat.renumber(n)
	took := reaches(t, n.web1, "tcp", at(a.address, 80), "shoot-a-pod", 15*time.Second)
	t.Logf("another address of the NAT: back after %s", took.Round(time.Millisecond))
	// Restarted, and with the hosting side restarted: the addresses stay.
	hosting.kill()
	hosting.run()
	reaches(t, n.web1, "tcp", at(a.address, 80), "shoot-a-pod", 15*time.Second)
	reaches(t, n.web1, "tcp", at(b.address, 80), "shoot-b-pod", 15*time.Second)
}

// A remote cluster that hosts others itself must not use its parent's pool; siblings may
// use the same one, and so may grandchild and grandparent.
func TestPoolsOfParentAndChild(t *testing.T) {
	for name, c := range map[string]struct {
		parent, own string // pools
		refused     bool
	}{
		"child, the same":         {pool, pool, true},
		"child, a part":           {pool, "192.168.128.0/24", true},
		"child, more":             {pool, "192.168.128.0/21", true},
		"child, an unused part":   {pool, "192.168.131.0/24", true},
		"child, the next":         {pool, "192.168.132.0/22", false},
		"grandchild, the first's": {"192.168.132.0/22", pool, false},
	} {
		t.Run(name, func(t *testing.T) {
			address := netip.MustParsePrefix(c.parent).Addr().Next().Next().String()
			g := newGateway(t, labtest.New(t).Host("child"))
			g.write("gateway.yaml", remoteYAML(address, c.parent, c.own, g.public.String()))
			stdout, stderr, code := g.culvert("validate", "-f", g.manifests)
			if (code != 0) != c.refused {
				t.Errorf("exit code %d: %s%s", code, stdout, stderr)
			}
			if c.refused && !strings.Contains(stdout+stderr, c.own+" overlaps "+c.parent) {
				t.Errorf("it is not said what overlaps: %s%s", stdout, stderr)
			}
			t.Log(strings.TrimSpace(stdout + stderr))
		})
	}
}
