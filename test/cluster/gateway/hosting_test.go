package gateway_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// hosting is the hosting cluster's part of the reversed tunnel over WireGuard
// (docs/reversed-wireguard.md): two gateways, each with a pool. The numbers are 1 and 2.
const hosting = `---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: hosting-%[1]d, namespace: vpn}
spec:
  deviceCIDRs: [%[2]s]
  expose: {type: NodePort, address: 198.18.0.11} # of node-1, outside
`

// hosted is a remote cluster, as a gateway of the hosting one knows it: a Device.
const hosted = `---
apiVersion: culvert.dev/v1alpha1
kind: Device
metadata: {name: %[1]s-%[2]d, namespace: vpn}
spec: {gatewayRef: {name: hosting-%[2]d}, publicKey: "%[3]s", access: {to: [Pods]}}
`

// pools are those of the two gateways; the first address is the gateway's own.
var pools = [2]netip.Prefix{netip.MustParsePrefix("192.168.128.0/22"), netip.MustParsePrefix("192.168.132.0/22")}

// dialsIn is the manifests of a remote cluster: a gateway that dials both, prefers one by its
// address, and offers its pod at each address that it was given.
const dialsIn = `
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: remote, namespace: default}
spec:
  cluster: {podCIDRs: [10.60.0.0/16], serviceCIDRs: [192.168.128.0/21]}
  clusterTraffic: {services: Translate, source: Masquerade}
  expose: {type: None}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: hosting, namespace: default}
spec:
  gatewayRef: {name: remote}
  cidrs: [10.244.0.0/16]
  access: {to: [Services]}
  wireguard:
    prefer: EvenOdd
    publicKey: %[1]s
    endpoint: %[2]s
    persistentKeepaliveSeconds: 5
    probe: {address: %[3]s, localAddress: %[4]s}
    alternatives:
    - publicKey: %[5]s
      endpoint: %[6]s
      probe: {address: %[7]s, localAddress: %[8]s}
`

// offered is a Service at one of the addresses.
const offered = `---
apiVersion: v1
kind: Service
metadata: {name: web-%[1]d, namespace: default}
spec:
  clusterIP: %[2]s
  clusterIPs: [%[2]s]
  ports: [{name: http, protocol: TCP, port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-%[1]d-1, namespace: default, labels: {kubernetes.io/service-name: web-%[1]d}}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 8080}]
endpoints: [{addresses: [10.60.1.10], conditions: {ready: true}}]
`

// shoot is a remote cluster behind a NAT, with the very ranges of the other one.
type shoot struct {
	name      string
	host      *labtest.Host // its gateway's
	key       wgtypes.Key
	endpoints [2]string // of the hosting gateways
	addresses [2]string // what it was given, by either
	log       string
}

// reversed: two remote clusters that only dial out, with a tunnel to each of two gateways, are
// reached by the addresses that they were given, and reach the hosting cluster through the
// gateway that their address says, or the other one as soon as probes through that fail.
func (s *scene) reversed() {
	t := s.t
	text := ""
	for i, pool := range pools {
		text += fmt.Sprintf(hosting, i+1, pool)
	}
	s.Apply(text)
	l := labtest.New(t)
	shoots := []*shoot{s.shoot(l, "shoot-a", "198.18.7.11"), s.shoot(l, "shoot-b", "198.18.7.12")}
	for i := range pools { // a kubelet that has lost the API server twice in two minutes looks for pods a minute later
		s.ready(fmt.Sprintf("vpngateway/hosting-%d", i+1), 3*time.Minute)
	}
	for _, x := range shoots {
		s.join(x)
	}
	if a, b := shoots[0].addresses, shoots[1].addresses; a == b {
		t.Errorf("both remote clusters have the addresses %s", a)
	}
	for _, x := range shoots {
		for _, address := range x.addresses {
			labtest.Eventually(t, 20*time.Second, x.name+" is reached by "+address, func() error {
				out, err := s.Exec(namespace, "on-"+s.Nodes[1].Name, "/server", "get", "http://"+address+"/")
				if err == nil && !strings.Contains(out, "pod="+x.name+" ") {
					err = fmt.Errorf("%s", out)
				}
				return err
			})
		}
		s.through(x, x.preferred(), 20*time.Second)
	}
	s.failsOver(shoots[0])
}

// shoot makes a remote cluster: a machine behind a NAT that is its gateway, and a pod.
func (s *scene) shoot(l *labtest.Lab, name, public string) *shoot {
	s.t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		s.t.Fatal(err)
	}
	x := &shoot{name: name, key: key, host: s.Behind(name, public, "192.168.77")}
	x.host.Sysctl("net/ipv4/ip_forward", "1")
	pod := l.Host(name)
	l.Connect(x.host, "pods", "10.60.1.1/24", pod, "eth0", "10.60.1.10/24")
	pod.IP("route", "add", "default", "via", "10.60.1.1")
	pod.Background("env", "POD_NAME="+name, s.TestServer())
	for i := range pools {
		s.Apply(fmt.Sprintf(hosted, name, i+1, key.PublicKey()))
	}
	return x
}

// join gives a remote cluster's gateway what a person would write, and starts it.
func (s *scene) join(x *shoot) {
	t := s.t
	t.Helper()
	var keys [2]string
	services := ""
	for i, pool := range pools {
		gateway, device := fmt.Sprintf("vpngateway/hosting-%d", i+1), fmt.Sprintf("device/%s-%d", x.name, i+1)
		s.ready(device, 20*time.Second)
		keys[i] = s.Kubectl("-n", namespace, "get", gateway, "-o", "jsonpath={.status.publicKey}")
		x.endpoints[i] = s.Kubectl("-n", namespace, "get", gateway, "-o", "jsonpath={.status.address}:{.status.wireguardPort}")
		address, err := netip.ParsePrefix(s.Kubectl("-n", namespace, "get", device, "-o", "jsonpath={.status.addresses[0]}") + "/32")
		if err != nil || !pool.Contains(address.Addr()) || address.Addr() == gatewayOf(pool) {
			t.Fatalf("%s: address %s (%v), want one of %s", device, address, err, pool)
		}
		x.addresses[i] = address.Addr().String()
		services += fmt.Sprintf(offered, i+1, x.addresses[i])
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"manifests/remote.yaml": fmt.Sprintf(dialsIn, keys[0], x.endpoints[0], gatewayOf(pools[0]), x.addresses[0],
			keys[1], x.endpoints[1], gatewayOf(pools[1]), x.addresses[1]) + services,
		"state/wireguard.key": x.key.String() + "\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, x.log = x.host.Background(s.CulvertProgram(), "gateway", "--manifests", filepath.Join(dir, "manifests"), "--state", filepath.Join(dir, "state"))
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(x.log)
			t.Logf("gateway of %s:\n%s", x.name, b)
		}
	})
}

// gatewayOf is a gateway's own address in its pool.
func gatewayOf(pool netip.Prefix) netip.Addr { return pool.Addr().Next() }

// preferred is the gateway that a remote cluster's address says.
func (x *shoot) preferred() int {
	return int(netip.MustParseAddr(x.addresses[0]).As4()[3] % 2)
}

// asks opens something new to a pod of the hosting cluster, and says by which gateway's pool
// it came: the pod sees the address that the remote cluster was given there.
func (s *scene) asks(x *shoot, patience time.Duration) (by int, err error) {
	var answer string
	err = x.host.Host.Do(func() error {
		c, err := net.DialTimeout("udp", s.pods[0]+":8081", patience)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write([]byte("?")); err != nil {
			return err
		}
		b := make([]byte, 200)
		n, err := c.Read(b)
		answer = string(b[:n])
		return err
	})
	if err != nil {
		return 0, err
	}
	for i, a := range x.addresses {
		if strings.HasPrefix(answer, "client="+a+" ") {
			return i, nil
		}
	}
	return 0, fmt.Errorf("the pod says %q", answer)
}

// through waits until what a remote cluster opens goes through a gateway, and says how long
// that took.
func (s *scene) through(x *shoot, want int, timeout time.Duration) time.Duration {
	s.t.Helper()
	began := time.Now()
	labtest.Eventually(s.t, timeout, fmt.Sprintf("%s goes through gateway %d", x.name, want+1), func() error {
		by, err := s.asks(x, 200*time.Millisecond)
		if err == nil && by != want {
			err = fmt.Errorf("it goes through the other one")
		}
		return err
	})
	return time.Since(began)
}

// failsOver takes the way to the gateway in use, without a word, and measures until the other
// one carries what is opened anew; then the same back. The best round counts, as in hangs.
func (s *scene) failsOver(x *shoot) {
	t := s.t
	var rounds []float64
	used := x.preferred()
	for range 4 {
		s.cut(x, used)
		took := s.through(x, 1-used, 30*time.Second)
		t.Logf("%s: gateway %d is not reached any more: the other one carries after %s", x.name, used+1, took.Round(10*time.Millisecond))
		rounds = append(rounds, took.Seconds())
		if took <= takeover && os.Getenv("CULVERT_GOALS") == "" {
			break
		}
		s.cut(x, -1)
		// It must answer probes again before the other one is taken away.
		time.Sleep(2 * time.Second)
		used = 1 - used
	}
	if took := labtest.Decisive(rounds, func(a, b float64) bool { return a < b }); took > takeover.Seconds() {
		t.Errorf("the other gateway carried after %.2f s, want %s (rounds %.2f)", took, takeover, rounds)
	}
	// The pods of the hosting cluster go on by the address of the gateway that is reached.
	other := x.addresses[1-used]
	if out, err := s.Exec(namespace, "on-"+s.Nodes[1].Name, "/server", "get", "http://"+other+"/"); err != nil || !strings.Contains(out, "pod="+x.name+" ") {
		t.Errorf("%s by %s: %v: %s", x.name, other, err, out)
	}
	s.cut(x, -1)
}

// cut drops what goes between a remote cluster and one of the gateways, and only that;
// negative: nothing any more.
func (s *scene) cut(x *shoot, gateway int) {
	s.t.Helper()
	rules := "table ip cut\ndelete table ip cut\n"
	if gateway >= 0 {
		_, port, _ := strings.Cut(x.endpoints[gateway], ":")
		rules += fmt.Sprintf(`table ip cut {
	chain out { type filter hook output priority 0; udp dport %[1]s drop; }
	chain in { type filter hook input priority 0; udp sport %[1]s drop; }
}
`, port)
	}
	x.host.Run("nft", rules)
}
