// Package jobs_test does what Culvert is for on a real cluster: a site with an unmodified
// strongSwan and a device with a stock WireGuard, both behind NAT, reach pods and services
// and are reached, while gateways move, are upgraded and change their ways.
package jobs_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

// Addresses of the site: its host behind a NAT router outside.
const (
	siteCIDR    = "10.50.0.0/24"
	siteHost    = "10.50.0.1"
	sitePSK     = "a pre-shared key of berlin"
	routerOuter = "198.18.1.10"
)

const workloads = `---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: jobs}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: echo, port: 8081, protocol: UDP}
`

func webPod(node string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: web-%[1]s, namespace: jobs, labels: {app: web}}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    image: %[2]s
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
`, node, cluster.TestImage)
}

const gateway = `---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: hq, namespace: vpn}
spec:
  deviceCIDRs: [10.99.0.0/24]
  expose: {type: %s}
  ipsec: {localID: vpn.example.com}
---
apiVersion: v1
kind: Secret
metadata: {name: berlin, namespace: vpn}
stringData: {psk: %q}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: berlin, namespace: vpn}
spec:
  gatewayRef: {name: hq}
  cidrs: [%s]
  ipsec:
    remoteID: berlin.example.com
    auth: {presharedKeySecretRef: {name: berlin, key: psk}}
`

const siteConf = `connections {
  culvert {
    version = 2
    remote_addrs = %s
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    dpd_delay = 2s
    keyingtries = 0
    local {
      auth = psk
      id = berlin.example.com
    }
    remote {
      auth = psk
      id = vpn.example.com
    }
    children {
      net {
        local_ts = ` + siteCIDR + `
        remote_ts = 10.244.0.0/16,10.96.0.0/16
        esp_proposals = aes256gcm16-x25519
        start_action = start
        close_action = start
        dpd_action = restart
      }
    }
  }
}
secrets {
  ike-gw {
    id-1 = vpn.example.com
    id-2 = berlin.example.com
    secret = "` + sitePSK + `"
  }
}
`

// site is a network on premises with one host, whose router translates addresses, and the
// cluster that it is joined to.
type site struct {
	*clustertest.Cluster
	t     *testing.T
	host  *labtest.Host
	ike   *strongswan.Daemon
	phone *clustertest.Device
	pods  map[string]string // node → address of its web pod
	web   string            // the service's address
}

// TestSite is jobs J1 and J2 through a load balancer that leaves addresses alone. Each step
// works on what the one before left.
func TestSite(t *testing.T) {
	s := startSite(t, cluster.Options{}, "LoadBalancer")
	steps := []struct {
		name string
		do   func(*site)
	}{
		{"pods on both nodes see the site's own address", func(s *site) { s.reachesPods(siteHost, 30*time.Second) }},
		{"service over TCP and UDP", func(s *site) { s.reachesService(siteHost) }},
		{"name server, API server and ping", (*site).reachesReal},
		{"pods reach the site", (*site).podsReachSite},
		{"100 MB both ways", (*site).bulk},
		{"foreign namespaces", (*site).foreignNamespaces},
		{"gateway pod is deleted", (*site).podDeleted},
		{"the gateway's node is drained", (*site).drained},
		{"helm upgrade of the operator", (*site).operatorUpgraded},
		{"helm upgrade of everything", (*site).allUpgraded},
		{"certificates", (*site).certificates},
		{"modes", (*site).modes},
	}
	// A device takes part in what happens to the gateway.
	s.Culvert("device", "add", "phone", "-n", "vpn", "--gateway", "hq")
	s.phone = s.Device("phone", "198.18.1.20", "192.168.88", s.Culvert("device", "config", "phone", "-n", "vpn"))
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.do(s.in(t)) }) {
			t.FailNow()
		}
	}
	s.nothingSpoofed()
}

// TestSiteOverSmallPackets is the same where every link carries no more than 1280 bytes,
// with the nodes in two subnets and without a load balancer.
func TestSiteOverSmallPackets(t *testing.T) {
	s := startSite(t, cluster.Options{MTU: 1280, TwoSubnets: true}, "HostPort")
	s.reachesPods(siteHost, 30*time.Second)
	s.podsReachSite()
	s.transfer(s.other(), 100<<20)
	s.transfer(s.node(), 10<<20)
	s.nothingSpoofed()
}

func startSite(t *testing.T, o cluster.Options, expose string) *site {
	t.Helper()
	c := clustertest.Start(t, o)
	labtest.Require(t, "nft", "curl", "dig", "ping", "wg-quick", "wireguard-go")
	s := &site{Cluster: c, t: t, pods: map[string]string{}}
	c.Install()
	c.Namespace("jobs")
	c.Namespace("vpn")
	t.Cleanup(s.explain)
	manifests := workloads
	for _, n := range c.Nodes {
		manifests += webPod(n.Name)
	}
	c.Apply(manifests + fmt.Sprintf(gateway, expose, sitePSK, siteCIDR))
	c.Wait("jobs", "--all")
	s.refresh()
	s.host = c.Behind("berlin", routerOuter, "192.168.77")
	s.host.IP("addr", "add", siteHost+"/32", "dev", "lo")
	s.awaitGateway()
	s.ike = strongswan.New(t, s.host.Host, fmt.Sprintf(siteConf, s.public(expose)))
	return s
}

// in is the site for a subtest: errors end that.
func (s *site) in(t *testing.T) *site {
	sub := *s
	sub.Cluster, sub.t = s.Cluster.In(t), t
	return &sub
}

// explain shows, after a failure, what the gateway says.
func (s *site) explain() {
	if !s.t.Failed() {
		return
	}
	for _, args := range [][]string{
		{"get", "vpngateways,sites,devices,pods,services,events", "-o", "wide"},
		{"get", "vpngateway/hq", "site/berlin", "-o", "jsonpath={.items[*].status}"},
		{"logs", "-l", "culvert.dev/gateway=hq", "-c", "culvert", "--tail=30"},
		{"logs", "-l", "culvert.dev/gateway=hq", "-c", "ipsec", "--tail=30"},
	} {
		out, err := s.TryKubectl(append([]string{"-n", "vpn"}, args...)...)
		s.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// refresh learns the addresses of the web pods and their service.
func (s *site) refresh() {
	s.t.Helper()
	for _, n := range s.Nodes {
		s.pods[n.Name] = s.Kubectl("-n", "jobs", "get", "pod", "web-"+n.Name, "-o", "jsonpath={.status.podIP}")
	}
	s.web = s.Kubectl("-n", "jobs", "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
}

// nothingSpoofed: the cluster's network saw none but the nodes' and pods' own addresses.
func (s *site) nothingSpoofed() {
	s.t.Helper()
	for _, n := range s.Nodes {
		if got, err := s.Spoofed(context.Background(), n.Name); err != nil || got > 0 {
			s.t.Errorf("%d packets with foreign sources left %s onto the fabric (%v)", got, n.Name, err)
		}
	}
}

func (s *site) awaitGateway() {
	s.t.Helper()
	s.Kubectl("-n", "vpn", "wait", "vpngateway/hq", "--for=condition=Ready", "--timeout=60s")
}

// node is where the gateway's pod is.
func (s *site) node() string {
	s.t.Helper()
	return s.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.spec.nodeName}")
}

// other is a node where the gateway's pod is not.
func (s *site) other() string {
	s.t.Helper()
	node := s.node()
	for _, n := range s.Nodes {
		if n.Name != node {
			return n.Name
		}
	}
	s.t.Fatal("there is one node only")
	return ""
}

// public is the address outside that leads to the gateway: a load balancer's, or that of the
// node that the gateway's pod is on.
func (s *site) public(expose string) string {
	s.t.Helper()
	if expose == "LoadBalancer" {
		address := s.Balance("vpn", "culvert-hq", cluster.BalanceOptions{}).Addresses[0].String()
		labtest.Eventually(s.t, 10*time.Second, "the gateway knows its address", func() error {
			out, err := s.TryKubectl("-n", "vpn", "get", "vpngateway", "hq", "-o", "jsonpath={.status.address}")
			if err == nil && out != address {
				err = fmt.Errorf("status.address is %q, want %s", out, address)
			}
			return err
		})
		return address
	}
	node := s.node()
	for _, n := range s.Nodes {
		if n.Name == node {
			return n.ExternalIPs()[0].String()
		}
	}
	s.t.Fatalf("the gateway's pod is on the unknown node %q", node)
	return ""
}

// certificates: both sides change from the pre-shared key to certificates of one CA.
func (s *site) certificates() {
	t := s.t
	ca := strongswan.NewAuthority(t)
	day := 24 * time.Hour
	cert, key := ca.Issue(2, "vpn.example.com", -time.Hour, day)
	s.Apply(fmt.Sprintf("apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {name: hq-tls, namespace: vpn}\nstringData: {tls.crt: %q, tls.key: %q}\n", cert, key) +
		fmt.Sprintf("---\napiVersion: v1\nkind: Secret\nmetadata: {name: sites, namespace: vpn}\nstringData: {ca.crt: %q}\n", ca.PEM))
	s.Kubectl("-n", "vpn", "patch", "site", "berlin", "--type=merge", "-p",
		`{"spec":{"ipsec":{"auth":{"presharedKeySecretRef":null,"certificate":{"certificateSecretRef":{"name":"hq-tls"},"caSecretRef":{"name":"sites","key":"ca.crt"}}}}}}`)
	cert, key = ca.Issue(3, "berlin.example.com", -time.Hour, day)
	s.ike.Certify(cert, key, ca.PEM)
	// strongSwan does not try again by itself when it is refused, as it may be until the
	// gateway has its certificate too.
	labtest.Eventually(t, 30*time.Second, "the site's tunnel is up", func() error {
		_, err := s.ike.Swanctl("--initiate", "--child", "net", "--timeout", "3")
		return err
	})
	s.reachesPods(siteHost, 10*time.Second)
	out, err := s.ike.Swanctl("--list-sas")
	if err != nil || !strings.Contains(out, "ESTABLISHED") || s.ike.Conf == "" || strings.Contains(s.ike.Conf, "psk") {
		t.Errorf("the site's SAs (%v):\n%s", err, out)
	}
}
