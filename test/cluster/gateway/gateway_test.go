// Package gateway_test runs gateways as pods of a real cluster, and takes them away.
package gateway_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

const (
	namespace = "vpn"
	siteHost  = "198.18.7.1" // the site's public address
	siteInner = "10.10.0.5"
	psk       = "a pre-shared key for the cluster test"
)

// objects are a gateway and a site that it dials: all that a person writes.
const objects = `
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: vpn}
spec:
  deviceCIDRs: [10.99.0.0/24]
  expose: {type: NodePort, address: 198.18.0.11} # of node-1, outside
---
apiVersion: v1
kind: Secret
metadata: {name: berlin, namespace: vpn}
stringData: {psk: "` + psk + `"}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: berlin, namespace: vpn}
spec:
  gatewayRef: {name: edge}
  cidrs: [10.10.0.0/24]
  ipsec:
    address: ` + siteHost + `
    localID: vpn.example.com
    remoteID: berlin.example.com
    dpdDelaySeconds: 2
    auth: {presharedKeySecretRef: {name: berlin, key: psk}}
`

// siteConf is the far side's swanctl.conf.
const siteConf = `connections {
  culvert {
    version = 2
    local_addrs = ` + siteHost + `
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    dpd_delay = 2s
    unique = replace
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
        local_ts = 10.10.0.0/24
        remote_ts = 10.244.0.0/16,10.96.0.0/16
        esp_proposals = aes256gcm16-x25519
      }
    }
  }
}
secrets {
  ike-gw {
    id-1 = vpn.example.com
    id-2 = berlin.example.com
    secret = "` + psk + `"
  }
}
`

// scene is a cluster with a gateway, a site and a device, all connected.
type scene struct {
	*clustertest.Cluster
	t           *testing.T
	site, phone *lab.Host
	pods        []string // the servers' addresses, one per node
	link        string
}

// TestGatewayPod is the life of a gateway pod: each step works on what the one before left.
func TestGatewayPod(t *testing.T) {
	c := clustertest.Start(t, cluster.Options{})
	labtest.Require(t, "wg", "wireguard-go", "charon-systemd", "swanctl")
	c.Install()
	c.Namespace(namespace)
	s := &scene{Cluster: c, t: t}
	t.Cleanup(s.explain)
	s.servers()
	c.Apply(objects)
	s.ready("vpngateway/edge", 60*time.Second)
	s.connectSite()
	s.connectPhone()
	t.Run("culvert killed", func(t *testing.T) { s.in(t).culvertKilled() })
	t.Run("pod deleted", func(t *testing.T) { s.in(t).podDeleted() })
	t.Run("API server away", func(t *testing.T) { s.in(t).serverAway() })
	t.Run("replicas", func(t *testing.T) { s.in(t).replicas() })
	t.Run("remote clusters that dial in", func(t *testing.T) { s.in(t).reversed() })
}

// in is the scene for a subtest: errors end that.
func (s *scene) in(t *testing.T) *scene {
	sub := *s
	sub.Cluster, sub.t = s.Cluster.In(t), t
	return &sub
}

// explain shows, after a failure, what the gateway and the phone say.
func (s *scene) explain() {
	if !s.t.Failed() {
		return
	}
	for _, args := range [][]string{
		{"get", "vpngateways,sites,devices,pods,services", "-o", "wide"},
		{"get", "vpngateway/edge", "-o", "jsonpath={.status}"},
		{"logs", "-l", "culvert.dev/gateway=edge", "-c", "culvert", "--tail=30"},
	} {
		out, err := s.TryKubectl(append([]string{"-n", namespace}, args...)...)
		s.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	if s.phone != nil {
		out, err := s.phone.Output(context.Background(), "wg", "show")
		s.t.Logf("the phone's WireGuard: %v\n%s", err, out)
	}
}

func (s *scene) servers() {
	s.t.Helper()
	text := ""
	for _, n := range s.Nodes {
		text += fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: on-%[1]s, namespace: %[2]s, labels: {app: server}}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: server, image: "%[3]s", imagePullPolicy: Never, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
`, n.Name, namespace, cluster.TestImage)
	}
	s.Apply(text)
	s.Wait(namespace, "-l", "app=server")
	for _, n := range s.Nodes {
		s.pods = append(s.pods, s.Kubectl("-n", namespace, "get", "pod", "on-"+n.Name, "-o", "jsonpath={.status.podIP}"))
	}
}

func (s *scene) ready(object string, timeout time.Duration) {
	s.t.Helper()
	if out, err := s.TryKubectl("-n", namespace, "wait", object, "--for=condition=Ready", "--timeout="+timeout.String()); err != nil {
		say, _ := s.TryKubectl("-n", namespace, "get", object, "-o", "jsonpath={.status}")
		logs, _ := s.TryKubectl("-n", namespace, "logs", "-l", "culvert.dev/gateway=edge", "--all-containers", "--tail=20")
		pods, _ := s.TryKubectl("-n", namespace, "get", "pods,events", "-o", "wide")
		s.t.Fatalf("%v: %s\n%s\n%s\n%s", err, out, say, pods, logs)
	}
}

// run runs a program on a host to its end.
func run(t testing.TB, h *lab.Host, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := h.Output(ctx, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// background runs a program on a host until the test's end.
func background(t testing.TB, h *lab.Host, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.Command(ctx, name, args...)
	if err := h.Start(cmd); err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
}

// connectSite starts an unmodified strongSwan, which the gateway dials.
func (s *scene) connectSite() {
	s.t.Helper()
	s.site = s.OutsideHost("berlin", siteHost+"/15")
	run(s.t, s.site, "ip", "addr", "add", siteInner+"/32", "dev", "lo")
	background(s.t, s.site, s.TestServer())
	strongswan.New(s.t, s.site, siteConf)
	s.ready("site/berlin", 20*time.Second)
	s.connected("site/berlin", 20*time.Second)
	for _, pod := range s.pods {
		s.reaches(s.site, siteInner, pod+":8081", 20*time.Second)
	}
}

func (s *scene) connected(object string, timeout time.Duration) {
	s.t.Helper()
	if out, err := s.TryKubectl("-n", namespace, "wait", object, "--for=condition=Connected", "--timeout="+timeout.String()); err != nil {
		say, _ := s.TryKubectl("-n", namespace, "get", object, "-o", "jsonpath={.status}")
		logs, _ := s.TryKubectl("-n", namespace, "logs", "-l", "culvert.dev/gateway=edge", "--all-containers", "--tail=20")
		s.t.Fatalf("%v: %s\n%s\n%s", err, out, say, logs)
	}
}

// reaches waits until a datagram comes back.
func (s *scene) reaches(h *lab.Host, source, to string, timeout time.Duration) {
	s.t.Helper()
	labtest.Eventually(s.t, timeout, "a route from "+source, func() error { // there is none without an SA
		return h.Do(func() error {
			c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(source)}}).DialContext(s.t.Context(), "udp", to)
			if err == nil {
				err = c.Close()
			}
			return err
		})
	})
	p := clustertest.Watch(s.t, h, source, to, 100*time.Millisecond)
	p.AwaitAny(timeout)
}

// connectPhone adds a device as a person does, and gives a stock WireGuard what "kubectl
// culvert device config" prints.
func (s *scene) connectPhone() {
	s.t.Helper()
	s.Culvert("device", "add", "phone", "--namespace", namespace)
	s.ready("device/phone", 20*time.Second)
	config := s.Culvert("device", "config", "phone", "--namespace", namespace)
	s.phone, s.link = s.OutsideHost("phone", "198.18.7.2/15"), fmt.Sprintf("gw%d", os.Getpid()%1000000)
	background(s.t, s.phone, "wireguard-go", "--foreground", s.link)
	socket := filepath.Join("/var/run/wireguard", s.link+".sock")
	labtest.Eventually(s.t, 10*time.Second, "wireguard-go", func() error { _, err := os.Stat(socket); return err })
	s.t.Cleanup(func() { _ = os.Remove(socket) })
	value := func(key string) string {
		m := regexp.MustCompile(`(?m)^` + key + ` = (.*)$`).FindStringSubmatch(config)
		if m == nil {
			s.t.Fatalf("no %s in the configuration", key)
		}
		return m[1]
	}
	path := filepath.Join(s.t.TempDir(), "wg.conf")
	if err := os.WriteFile(path, []byte(regexp.MustCompile(`(?m)^(Address|DNS|MTU) = .*\n`).ReplaceAllString(config, "")), 0o600); err != nil {
		s.t.Fatal(err)
	}
	run(s.t, s.phone, "wg", "setconf", s.link, path)
	run(s.t, s.phone, "ip", "addr", "add", value("Address"), "dev", s.link)
	run(s.t, s.phone, "ip", "link", "set", s.link, "mtu", value("MTU"), "up")
	for _, r := range strings.Split(value("AllowedIPs"), ", ") {
		run(s.t, s.phone, "ip", "route", "add", r, "dev", s.link)
	}
	for _, pod := range s.pods {
		s.reaches(s.phone, s.address(), pod+":8081", 20*time.Second)
	}
	s.connected("device/phone", 10*time.Second)
}

// address is the phone's.
func (s *scene) address() string {
	s.t.Helper()
	a := s.Kubectl("-n", namespace, "get", "device", "phone", "-o", "jsonpath={.status.addresses[0]}")
	return netip.MustParseAddr(a).String()
}

// identity is what must outlive every pod.
func (s *scene) identity() string {
	s.t.Helper()
	return s.Kubectl("-n", namespace, "get", "vpngateway/edge", "-o", "jsonpath={.status.publicKey}") + " " + s.address()
}

// pod names the gateway pod, its node and its UID.
func (s *scene) pod() (name, node, uid string) {
	s.t.Helper()
	f := strings.Fields(s.Kubectl("-n", namespace, "get", "pods", "-l", "culvert.dev/gateway=edge", "-o", "jsonpath={.items[0].metadata.name} {.items[0].spec.nodeName} {.items[0].metadata.uid}"))
	if len(f) != 3 {
		s.t.Fatalf("the gateway's pod: %v", f)
	}
	return f[0], f[1], f[2]
}

// culvertKilled: the IKE daemon is another container, and firewall and routes stay.
func (s *scene) culvertKilled() {
	t := s.t
	before := s.identity()
	_, node, uid := s.pod()
	up := clustertest.Watch(t, s.site, siteInner, s.pods[0]+":8081", 10*time.Millisecond)
	up2 := clustertest.Watch(t, s.site, siteInner, s.pods[1]+":8081", 10*time.Millisecond)
	phone := clustertest.Watch(t, s.phone, s.address(), s.pods[0]+":8081", 50*time.Millisecond)
	time.Sleep(time.Second)
	event := time.Now()
	for i, n := range s.Nodes {
		if n.Name != node {
			continue
		}
		if out, err := s.Nodes[i].Run(t.Context(), "pkill", "-KILL", "-f", "^culvert gateway --namespace"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	labtest.Eventually(t, 20*time.Second, "the container was restarted and is ready", func() error {
		got := s.Kubectl("-n", namespace, "get", "pods", "-l", "culvert.dev/gateway=edge", "-o",
			`jsonpath={.items[0].metadata.uid} {.items[0].status.containerStatuses[?(@.name=="culvert")].restartCount} {.items[0].status.containerStatuses[?(@.name=="culvert")].ready}`)
		if got != uid+" 1 true" {
			return fmt.Errorf("pod, restarts, ready: %s", got)
		}
		return nil
	})
	t.Logf("the phone is back %s after the kill", phone.AwaitBack(event, 15*time.Second).Round(10*time.Millisecond))
	time.Sleep(time.Second)
	up.Unharmed()
	up2.Unharmed()
	if after := s.identity(); after != before {
		t.Errorf("key and address are %s, were %s", after, before)
	}
}

// podDeleted: peers are not touched, and find another pod with the same key.
func (s *scene) podDeleted() {
	t := s.t
	before := s.identity()
	name, _, _ := s.pod()
	site := clustertest.Watch(t, s.site, siteInner, s.pods[1]+":8081", 50*time.Millisecond)
	phone := clustertest.Watch(t, s.phone, s.address(), s.pods[0]+":8081", 50*time.Millisecond)
	time.Sleep(time.Second)
	event := time.Now()
	s.Kubectl("-n", namespace, "delete", "pod", name, "--wait=false")
	wg := phone.AwaitBack(event, 60*time.Second)
	ipsec := site.AwaitBack(event, 60*time.Second)
	t.Logf("the phone is back %s after the deletion, the site %s", wg.Round(10*time.Millisecond), ipsec.Round(10*time.Millisecond))
	// The node port hides where the phone is, so it must find out by itself: after 15 s.
	if wg > 20*time.Second || ipsec > 15*time.Second {
		t.Errorf("WireGuard back after %s, want ≤20 s; IPsec after %s, want ≤15 s", wg, ipsec)
	}
	if after := s.identity(); after != before {
		t.Errorf("key and address are %s, were %s", after, before)
	}
}

// serverAway: tunnels live without an API server.
func (s *scene) serverAway() {
	t := s.t
	s.connected("site/berlin", 30*time.Second)
	site := clustertest.Watch(t, s.site, siteInner, s.pods[0]+":8081", 20*time.Millisecond)
	address := s.address()
	phone := clustertest.Watch(t, s.phone, address, s.pods[1]+":8081", 20*time.Millisecond)
	if err := s.StopProgram("control", "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(8 * time.Second) // four times what the site's dead peer detection waits
	phone.Unharmed()
	s.restartAlone(address)
	if err := s.StartProgram("control", "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 2*time.Minute, "the API server answers", func() error {
		_, err := s.TryKubectl("get", "--raw", "/readyz")
		return err
	})
	start := time.Now()
	s.Apply("apiVersion: culvert.dev/v1alpha1\nkind: Device\nmetadata: {name: late, namespace: vpn}\nspec: {gatewayRef: {name: edge}}\n")
	s.ready("device/late", 90*time.Second) // the operator has lost its Lease meanwhile
	t.Logf("a new device is Ready %s after it was added", time.Since(start).Round(10*time.Millisecond))
	site.Unharmed()
	s.lookAgain()
}

// restartAlone kills culvert while there is no API server: its successor has what it needs, and
// leaves the services as they are.
func (s *scene) restartAlone(address string) {
	t := s.t
	phone := clustertest.Watch(t, s.phone, address, s.pods[1]+":8081", 20*time.Millisecond)
	time.Sleep(500 * time.Millisecond)
	event := time.Now()
	killed := 0
	for _, n := range s.Nodes {
		if _, err := n.Run(t.Context(), "pkill", "-KILL", "-f", "^culvert gateway --namespace"); err == nil {
			killed++
		}
	}
	if killed != 1 {
		t.Fatalf("killed %d gateways", killed)
	}
	t.Logf("the phone is back %s after culvert was killed", phone.AwaitBack(event, 60*time.Second).Round(10*time.Millisecond))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if out, err := s.phone.Output(ctx, s.TestServer(), "lookup", "kubernetes.default.svc.cluster.local", "10.96.0.10"); err != nil {
		t.Errorf("the cluster's DNS, through the tunnel: %v: %s", err, out)
	}
}
