// Package cilium_test holds Culvert to its promises beside a real Cilium: sites and devices
// reach a cluster and the cluster reaches them, on Cilium's own configuration.
package cilium_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

// The site: a host behind a router that translates addresses. The device: a stock WireGuard
// in user space.
const (
	siteCIDR    = "10.50.0.0/24"
	siteHost    = "10.50.0.1"
	siteOuter   = "198.18.1.10"
	deviceOuter = "198.18.1.20"
	deviceIP    = "10.99.0.7"
	deviceIP6   = "fd00:99::7"
)

const objects = `---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: hq, namespace: vpn}
spec:
  deviceCIDRs: [10.99.0.0/24, "fd00:99::/64"]
  expose: {type: LoadBalancer}
  ipsec: {localID: vpn.example.com}
  clusterTraffic: {nodeLink: Encapsulated}
---
apiVersion: v1
kind: Secret
metadata: {name: berlin, namespace: vpn}
stringData: {psk: a pre-shared key of berlin}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: berlin, namespace: vpn}
spec:
  gatewayRef: {name: hq}
  cidrs: [` + siteCIDR + `]
  access: {to: [Pods, Services, Nodes]}
  ipsec:
    remoteID: berlin.example.com
    auth: {presharedKeySecretRef: {name: berlin, key: psk}}
---
apiVersion: culvert.dev/v1alpha1
kind: Device
metadata: {name: phone, namespace: vpn}
spec:
  gatewayRef: {name: hq}
  publicKey: %s
  addresses: [` + deviceIP + `, "` + deviceIP6 + `"]
  persistentKeepaliveSeconds: 5
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: apps}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: echo, port: 8081, protocol: UDP}
`

const webPod = `---
apiVersion: v1
kind: Pod
metadata: {name: web-%[1]s, namespace: apps, labels: {app: web, on: %[1]s}}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: server, image: "%[2]s", imagePullPolicy: Never, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
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
        remote_ts = 10.244.0.0/16,10.96.0.0/16,172.30.0.0/24
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
    secret = "a pre-shared key of berlin"
  }
}
`

// world is a cluster with a gateway, a site and a device.
type world struct {
	*clustertest.Cluster
	t            *testing.T
	lab          *labtest.Lab
	site, device *labtest.Host
	ike          *strongswan.Daemon
	pods         map[string][]string // node → addresses of its web pod
	web          string              // the service's address
}

func newWorld(t *testing.T, values []string, install ...string) *world {
	t.Helper()
	labtest.Require(t, "wg", "wireguard-go", "curl", "dig", "nft", "tcpdump")
	w := &world{Cluster: clustertest.Start(t, cluster.Options{CNI: cluster.Cilium, CiliumValues: values}), t: t}
	w.Namespace("apps")
	w.Namespace("vpn")
	for _, n := range w.Nodes {
		w.Apply(fmt.Sprintf(webPod, n.Name, cluster.TestImage))
	}
	w.Install(append([]string{"--set", "agent.podRanges={10.244.0.0/16,fd00:244::/32}"}, install...)...)
	private := piped(t, "", "wg", "genkey")
	w.Apply(fmt.Sprintf(objects, piped(t, private, "wg", "pubkey")))
	w.Wait("apps", "--all")
	w.look()
	labtest.Eventually(t, 60*time.Second, "the operator makes the gateway's Service", func() error {
		_, err := w.TryKubectl("-n", "vpn", "get", "service", "culvert-hq")
		return err
	})
	b := w.Balance("vpn", "culvert-hq", cluster.BalanceOptions{Patience: time.Minute})
	w.Kubectl("-n", "vpn", "wait", "vpngateway/hq", "--for=condition=Ready", "--timeout=60s")
	outer := b.Addresses[0].String()
	w.lab = labtest.New(t)
	w.site = w.behindNAT("berlin", siteOuter, "192.168.77")
	w.site.IP("addr", "add", siteHost+"/32", "dev", "lo")
	w.site.Background(w.TestServer())
	w.ike = strongswan.New(t, w.site.Host, fmt.Sprintf(siteConf, outer))
	w.device = w.behindNAT("phone", deviceOuter, "192.168.88")
	w.connect(private, outer)
	return w
}

// look notes the addresses of the pods and of the service.
func (w *world) look() {
	w.t.Helper()
	w.pods = map[string][]string{}
	for _, n := range w.Nodes {
		w.pods[n.Name] = strings.Fields(w.Kubectl("-n", "apps", "get", "pod", "web-"+n.Name, "-o", "jsonpath={.status.podIPs[*].ip}"))
	}
	w.web = w.Kubectl("-n", "apps", "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
}

// behindNAT makes a host outside, behind a router with an address there.
func (w *world) behindNAT(name, outer, net string) *labtest.Host {
	w.t.Helper()
	router := w.OutsideHost(name+"r", outer+"/15")
	h := w.lab.Host(name)
	if err := w.lab.Lab.Connect(router, "lan", net+".1/24", h.Host, "eth0", net+".2/24"); err != nil {
		w.t.Fatal(err)
	}
	h.IP("route", "add", "default", "via", net+".1")
	if err := router.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if out, err := router.Output(ctx, "nft", "table ip nat { chain post { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }"); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	return h
}

// connect brings the device's tunnel up, and a server behind it.
func (w *world) connect(private, outer string) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(private), 0o600); err != nil {
		w.t.Fatal(err)
	}
	status := strings.Fields(w.Kubectl("-n", "vpn", "get", "vgw", "hq", "-o", "jsonpath={.status.publicKey} {.status.wireguardPort}"))
	port := "51820"
	if len(status) > 1 {
		port = status[1]
	}
	w.device.Background("wireguard-go", "-f", "wg0")
	labtest.Eventually(w.t, 5*time.Second, "the device's tunnel is there", func() error { return w.device.Host.IP("link", "show", "wg0") })
	ranges := []string{"10.244.0.0/16", "10.96.0.0/16", "172.30.0.0/24", "fd00:244::/32", "fd00:96::/112"}
	w.device.Run("wg", "set", "wg0", "private-key", file, "peer", status[0], "persistent-keepalive", "1",
		"endpoint", outer+":"+port, "allowed-ips", strings.Join(ranges, ","))
	if err := w.device.Up("wg0", deviceIP+"/32 "+deviceIP6+"/128"); err != nil {
		w.t.Fatal(err)
	}
	w.device.IP("link", "set", "wg0", "mtu", "1420")
	for _, r := range ranges {
		w.device.IP("route", "add", r, "dev", "wg0")
	}
	w.device.Background(w.TestServer())
}

func piped(t *testing.T, input, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return strings.TrimSpace(string(out))
}

func url(ip string) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return "http://" + ip + ":8080/"
}

// flow is one way that traffic takes, and the answer that it must get.
type flow struct {
	name string
	do   func() (string, error)
	want string // the answer begins with it
}

// get is a flow that asks one of the test's servers who it sees.
func (w *world) get(name string, from *labtest.Host, source, target, want string) flow {
	return flow{name, func() (string, error) {
		return from.Try("curl", "-s", "-S", "-m", "2", "--interface", source, target)
	}, "client=" + want}
}

// flows are all that must work: from the site and the device to pods, services, names and
// the API server, and from pods and nodes back, each seen under its own address.
func (w *world) flows() []flow {
	w.t.Helper()
	out := []flow{
		w.get("site → service", w.site, siteHost, "http://"+w.web+"/", siteHost+" "),
		w.get("device → service", w.device, deviceIP, "http://"+w.web+"/", deviceIP+" "),
		{"site → service, UDP", func() (string, error) { return w.site.Try(w.TestServer(), "echo", "udp", w.web+":8081", "hello") }, "client=" + siteHost + " hello"},
		{"device → service, UDP", func() (string, error) { return w.device.Try(w.TestServer(), "echo", "udp", w.web+":8081", "hello") }, "client=" + deviceIP + " hello"},
		{"site → DNS", func() (string, error) {
			return w.site.Try("dig", "-b", siteHost, "+time=2", "+tries=1", "+short", "@"+cluster.DNS[0].String(), "web.apps.svc.cluster.local")
		}, w.web},
		{"site → API server", func() (string, error) {
			return w.site.Try("curl", "-s", "-S", "-k", "-m", "2", "--interface", siteHost, "https://10.96.0.1/healthz")
		}, "ok"},
	}
	for _, n := range w.Nodes {
		pod, node := "web-"+n.Name, n
		ips := w.pods[n.Name]
		out = append(out,
			w.get("site → pod on "+n.Name, w.site, siteHost, url(ips[0]), siteHost+" pod="+pod),
			w.get("device → pod on "+n.Name, w.device, deviceIP, url(ips[0]), deviceIP+" pod="+pod),
			w.fromPod(pod, siteHost, ips[0]),
			w.fromPod(pod, deviceIP, ips[0]),
			flow{"node " + n.Name + " → site", func() (string, error) {
				ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
				defer cancel()
				return node.Output(ctx, w.TestServer(), "get", url(siteHost))
			}, "client=" + n.IPs()[0].String() + " "})
		if len(ips) > 1 {
			out = append(out,
				w.get("device → pod on "+n.Name+", IPv6", w.device, deviceIP6, url(ips[1]), deviceIP6+" pod="+pod),
				w.fromPod(pod, deviceIP6, ips[1]))
		}
	}
	return out
}

func (w *world) fromPod(pod, target, want string) flow {
	return flow{pod + " → " + target, func() (string, error) { return w.Exec("apps", pod, "/server", "get", url(target)) }, "client=" + want + " "}
}

// try makes a flow once.
func (f flow) try() error {
	out, err := f.do()
	if err == nil && !strings.HasPrefix(out, f.want) {
		err = fmt.Errorf("answer %q, want %q", strings.TrimSpace(out), f.want)
	}
	return err
}

// works waits until each flow has worked, some at a time, and names those that did not.
func works(t *testing.T, limit time.Duration, flows []flow) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		outcome := make([]error, len(flows))
		turn := make(chan int)
		var group sync.WaitGroup
		for range 4 {
			group.Go(func() {
				for i := range turn {
					outcome[i] = flows[i].try()
				}
			})
		}
		for i := range flows {
			turn <- i
		}
		close(turn)
		group.Wait()
		var failed []flow
		var errs []error
		for i, err := range outcome {
			if err != nil {
				failed, errs = append(failed, flows[i]), append(errs, err)
			}
		}
		if flows = failed; len(failed) == 0 {
			return
		}
		if time.Now().After(deadline) {
			for i, f := range failed {
				t.Errorf("%s: %v", f.name, errs[i])
			}
			return
		}
	}
}

// never wants a flow not to get through. See that others do: a network that carries nothing denies
// nothing.
func (f flow) never() error {
	if out, err := f.do(); err == nil {
		return fmt.Errorf("answered %q, want nothing", out)
	}
	return nil
}

// each does something with flows, all at once, and names those that it failed with.
func each(flows []flow, do func(flow) error) error {
	errs := make([]error, len(flows))
	var group sync.WaitGroup
	for i, f := range flows {
		group.Go(func() {
			if err := do(f); err != nil {
				errs[i] = fmt.Errorf("%s: %w", f.name, err)
			}
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

// nothingSpoofed: the cluster's network saw none but the nodes' and pods' own addresses.
func (w *world) nothingSpoofed(t *testing.T, before map[string]uint64) {
	t.Helper()
	for name, now := range w.spoofed() {
		if now != before[name] {
			t.Errorf("%d packets with foreign sources left %s onto the fabric", now-before[name], name)
		}
	}
}

func (w *world) spoofed() map[string]uint64 {
	w.t.Helper()
	out := map[string]uint64{}
	for _, n := range w.Nodes {
		got, err := w.Spoofed(context.Background(), n.Name)
		if err != nil {
			w.t.Fatal(err)
		}
		out[n.Name] = got
	}
	return out
}

// set changes Cilium's values.
func (w *world) set(t *testing.T, values ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := w.SetCilium(ctx, values...); err != nil {
		t.Fatal(err)
	}
}
