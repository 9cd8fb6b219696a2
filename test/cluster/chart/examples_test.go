package chart_test

import (
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

// What the values files leave to whoever installs them.
const (
	examplePSK   = "0123456789abcdef0123456789abcdef"
	exampleHost  = "10.1.0.5"      // of the office's networks
	exampleHost2 = "10.2.0.5"      // of its other one
	officeOuter  = "198.18.1.60"   // vpn.office.example.com
	nodesOuter   = "198.18.0.11"   // nodes.example.com: the first node
	exampleSpace = "examples-work" // where the workloads are
)

// office is the far side's swanctl.conf: %[1]s is who is dialled, %[2]s the networks.
const office = `connections {
  cluster {
    version = 2
    %[1]s
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    dpd_delay = 2s
    keyingtries = 0
    local {
      auth = psk
      id = %[3]s
    }
    remote {
      auth = psk
    }
    children {
      net {
        local_ts = %[2]s
        remote_ts = 10.244.0.0/16,10.96.0.0/16
        esp_proposals = aes256gcm16-x25519
        %[4]s
      }
    }
  }
}
secrets {
  ike-gw {
    secret = "` + examplePSK + `"
  }
}
`

// example is one values file, installed.
type example struct {
	*clustertest.Cluster
	t    *testing.T
	pods map[string]string // node → address of its server
	web  string            // the servers' service
}

// testExamples installs each values file of examples/ as it is: everything that it makes
// becomes Ready, and the traffic flows that its head promises.
func testExamples(t *testing.T, c *clustertest.Cluster) {
	traffic := map[string]func(*example){
		"both-ways.yaml": (*example).bothWays, "nat-and-proxy.yaml": (*example).natAndProxy, "devices-nodeport.yaml": (*example).devices,
	}
	files, err := filepath.Glob("../../../examples/*.yaml")
	if err != nil || len(files) != len(traffic) {
		t.Fatalf("examples: %v, %v, and traffic for %v", files, err, slices.Collect(maps.Keys(traffic)))
	}
	pods, web := servers(c)
	officeName(c)
	for i, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			x := &example{Cluster: c.In(t), t: t, pods: pods, web: web}
			if i == len(files)-1 {
				x.Cluster = c.Last(t)
			}
			x.install(file)
			traffic[filepath.Base(file)](x)
		})
	}
}

// servers makes a server on each node and a service for them.
func servers(c *clustertest.Cluster) (pods map[string]string, web string) {
	c.Namespace(exampleSpace)
	text := `apiVersion: v1
kind: Service
metadata: {name: web, namespace: ` + exampleSpace + `}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: echo, port: 8081, protocol: UDP}]
`
	for _, n := range c.Nodes {
		text += fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: web-%[1]s, namespace: %[2]s, labels: {app: web}}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: server, image: "%[3]s", imagePullPolicy: Never, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
`, n.Name, exampleSpace, cluster.TestImage)
	}
	c.Apply(text)
	c.Wait(exampleSpace, "--all")
	pods = map[string]string{}
	for _, n := range c.Nodes {
		pods[n.Name] = c.Kubectl("-n", exampleSpace, "get", "pod", "web-"+n.Name, "-o", "jsonpath={.status.podIP}")
	}
	return pods, c.Kubectl("-n", exampleSpace, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
}

// officeName puts the office's name into the cluster's DNS.
func officeName(c *clustertest.Cluster) {
	config := c.Kubectl("-n", "kube-system", "get", "configmap", "coredns", "-o", "jsonpath={.data.Corefile}")
	if !strings.Contains(config, "vpn.office.example.com") {
		config = strings.Replace(config, "  ready\n", "  ready\n  hosts {\n    "+officeOuter+" vpn.office.example.com\n    fallthrough\n  }\n", 1)
		c.Apply(fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: kube-system}\ndata: {Corefile: %q}\n", config))
		c.Kubectl("-n", "kube-system", "rollout", "restart", "deployment/coredns")
		c.Kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=90s")
	}
}

// install does what the file's head says, and waits until all that it makes is Ready.
func (x *example) install(file string) {
	t := x.t
	x.Namespace(clustertest.System)
	made := x.Helm("template", clustertest.Release, x.Chart(), "--values", file, "--show-only", "templates/objects.yaml")
	var objects []string
	for d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(made), 4096); ; {
		var o unstructured.Unstructured
		if d.Decode(&o.Object) != nil {
			break
		}
		objects = append(objects, strings.ToLower(o.GetKind())+"/"+o.GetName())
		if name, found, _ := unstructured.NestedString(o.Object, "spec", "ipsec", "auth", "presharedKeySecretRef", "name"); found {
			x.Kubectl("create", "secret", "generic", name, "-n", clustertest.System, "--from-literal=psk="+examplePSK)
		}
	}
	if len(objects) < 2 {
		t.Fatalf("it makes %q only", objects)
	}
	x.Install("--values", file)
	ready(t, x.Cluster, clustertest.System, objects...)
	t.Cleanup(x.explain)
}

// explain shows, after a failure, what the gateways say.
func (x *example) explain() {
	if !x.t.Failed() {
		return
	}
	for _, args := range [][]string{
		{"get", "vpngateways,sites,devices,pods,services", "-o", "yaml"},
		{"logs", "-l", "app.kubernetes.io/component=gateway", "--all-containers", "--tail=30"},
	} {
		out, err := x.TryKubectl(append([]string{"-n", clustertest.System}, args...)...)
		x.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func (x *example) gatewayIP(name string) string {
	x.t.Helper()
	return x.Kubectl("-n", clustertest.System, "get", "pod", "culvert-"+name+"-0", "-o", "jsonpath={.status.podIP}")
}

// reaches fetches a URL until the server says that it is called by a client.
func (x *example) reaches(h *lab.Host, from, url, client string) {
	x.t.Helper()
	labtest.Eventually(x.t, 20*time.Second, from+" reaches "+url, func() error {
		out, err := h.Output(x.t.Context(), "curl", "-sS", "-m", "2", "--interface", from, url)
		if err == nil && !strings.HasPrefix(out, "client="+client+" ") {
			err = fmt.Errorf("answer %q, want client=%s", out, client)
		}
		return err
	})
}

// echoes sends a datagram and wants it back, with the address of the client that was seen.
func (x *example) echoes(h *lab.Host, to, client string) {
	x.t.Helper()
	labtest.Eventually(x.t, 20*time.Second, "a datagram comes back from "+to, func() error {
		out, err := h.Output(x.t.Context(), x.TestServer(), "echo", "udp", to, "hello")
		if err == nil && !strings.Contains(out, "client="+client+" hello") {
			err = fmt.Errorf("answer %q, want client=%s", out, client)
		}
		return err
	})
}

// isReached fetches from every pod what a host's server says, which is who calls.
func (x *example) isReached(address string) {
	x.t.Helper()
	for node, ip := range x.pods {
		labtest.Eventually(x.t, 20*time.Second, "the pod on "+node+" reaches "+address, func() error {
			out, err := x.Exec(exampleSpace, "web-"+node, "/server", "get", "http://"+address+":8080/")
			if err == nil && !strings.HasPrefix(out, "client="+ip+" ") {
				err = fmt.Errorf("answer %q, want client=%s", out, ip)
			}
			return err
		})
	}
}

// natAndProxy: the site dials in through the load balancer from behind a NAT; all that pods
// see is the gateway. There are no agents.
func (x *example) natAndProxy() {
	b := x.Balance(clustertest.System, "culvert-vpn", cluster.BalanceOptions{})
	h := x.Behind("office", officeOuter, "192.168.66")
	h.IP("addr", "add", exampleHost+"/32", "dev", "lo")
	strongswan.New(x.t, h.Host, fmt.Sprintf(office, "remote_addrs = "+b.Addresses[0].String(), "10.1.0.0/16", "office.example.com", "start_action = start\n        close_action = start\n        dpd_action = restart"))
	gateway := x.gatewayIP("vpn")
	for _, ip := range x.pods {
		x.reaches(h.Host, exampleHost, "http://"+ip+":8080/", gateway)
	}
	x.reaches(h.Host, exampleHost, "http://"+x.web+"/", gateway)
	x.echoes(h.Host, x.web+":8081", gateway)
	x.looksUp(h.Host)
	if out := x.Kubectl("get", "daemonsets", "-A", "-o", "name"); strings.Contains(out, "culvert") {
		x.t.Errorf("there are agents: %s", out)
	}
}

// looksUp asks the cluster's DNS from the site.
func (x *example) looksUp(h *lab.Host) {
	x.t.Helper()
	labtest.Eventually(x.t, 20*time.Second, "the cluster's DNS answers the site", func() error {
		out, err := h.Output(x.t.Context(), x.TestServer(), "lookup", "web."+exampleSpace+".svc.cluster.local", cluster.DNS[0].String())
		if err == nil && !strings.Contains(out, x.web) {
			err = fmt.Errorf("answer %q, want %s", out, x.web)
		}
		return err
	})
}

// bothWays: the gateway dials the office by its name; pods and both networks of the office see
// each other's real addresses.
func (x *example) bothWays() {
	h := x.OutsideHost("office", officeOuter+"/15")
	if err := h.Up("lo", exampleHost+"/32 "+exampleHost2+"/32"); err != nil {
		x.t.Fatal(err)
	}
	serve(x.t, h, x.TestServer())
	strongswan.New(x.t, h, fmt.Sprintf(office, "local_addrs = "+officeOuter, "10.1.0.0/16,10.2.0.0/16", "vpn.office.example.com", ""))
	for _, from := range []string{exampleHost, exampleHost2} {
		for _, ip := range x.pods {
			x.reaches(h, from, "http://"+ip+":8080/", from)
		}
		x.reaches(h, from, "http://"+x.web+"/", from)
		x.isReached(from)
	}
	out := x.Kubectl("-n", clustertest.System, "get", "site", "office", "-o", `jsonpath={.status.conditions[?(@.type=="Connected")].status}`)
	if out != "True" {
		x.t.Errorf("the site is Connected=%s", out)
	}
}

// serve runs a program on a host until the test ends.
func serve(t *testing.T, h *lab.Host, program string) {
	t.Helper()
	cmd := h.Command(t.Context(), program)
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	t.Cleanup(func() { <-done }) // the context has ended
}

// devices: a stock WireGuard that knows nothing but what "kubectl culvert device config"
// printed reaches services through a node's port, and pods reach it. The gateway may be on
// another node than the one that is dialled.
func (x *example) devices() {
	config := x.Culvert("device", "config", "sensor-1", "-n", clustertest.System)
	if !strings.Contains(config, "Endpoint = nodes.example.com:") {
		x.t.Fatal("the configuration does not have the endpoint that the values name")
	}
	d := x.Device("sensor", "198.18.1.61", "192.168.67", strings.ReplaceAll(config, "nodes.example.com", nodesOuter))
	if a, err := netip.ParseAddr(d.Address); err != nil || !netip.MustParsePrefix("10.99.0.0/24").Contains(a) {
		x.t.Fatalf("the device has the address %q", d.Address)
	}
	x.reaches(d.Host.Host, d.Address, "http://"+x.web+"/", d.Address)
	x.echoes(d.Host.Host, x.web+":8081", d.Address)
	x.isReached(d.Address)

	x.Culvert("device", "add", "sensor-3", "-n", clustertest.System, "--gateway", "devices")
	ready(x.t, x.Cluster, clustertest.System, "device/sensor-3")

	// Any time, from any pod: the keys and addresses survive.
	p := clustertest.Watch(x.t, d.Host.Host, d.Address, x.web+":8081", 100*time.Millisecond)
	time.Sleep(time.Second)
	event := time.Now()
	x.Kubectl("-n", clustertest.System, "delete", "pod", "culvert-devices-0", "--wait=false")
	back := p.AwaitBack(event, time.Minute)
	x.t.Logf("the gateway's pod was deleted: the device is back after %s", back.Round(100*time.Millisecond))
	if back > 20*time.Second {
		x.t.Errorf("the device is back after %s, want at most 20 s", back)
	}

	x.Culvert("device", "rm", "sensor-1", "-n", clustertest.System)
	labtest.Eventually(x.t, 5*time.Second, "a removed device is silent", func() error {
		if out, err := d.Get("http://" + x.web + "/"); err == nil {
			return fmt.Errorf("answer %q", out)
		}
		return nil
	})
}
