package jobs_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

const deviceGateway = `---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: hq, namespace: vpn}
spec:
  deviceCIDRs: [10.99.0.0/24]
  expose: {type: NodePort, address: 198.18.0.11}
`

// TestDevice is job J5: a stock WireGuard that knows nothing but what "kubectl culvert
// device config" printed reaches services through a node port, and pods reach it. Its
// gateway may be on another node than the one that it dials.
func TestDevice(t *testing.T) {
	c := clustertest.Start(t, cluster.Options{})
	labtest.Require(t, "wg-quick", "wireguard-go", "curl")
	c.Install()
	c.Namespace("jobs")
	c.Namespace("vpn")
	manifests := workloads
	for _, n := range c.Nodes {
		manifests += webPod(n.Name)
	}
	c.Apply(manifests + deviceGateway)
	c.Wait("jobs", "--all")
	c.Kubectl("-n", "vpn", "wait", "vpngateway/hq", "--for=condition=Ready", "--timeout=60s")
	plugin(t, c, "device", "add", "phone", "-n", "vpn", "--gateway", "hq")
	d := newDevice(t, c, plugin(t, c, "device", "config", "phone", "-n", "vpn"))

	web := c.Kubectl("-n", "jobs", "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
	d.reaches(t, web, 10*time.Second)
	for _, n := range c.Nodes {
		labtest.Eventually(t, 10*time.Second, "the pod on "+n.Name+" reaches the device", func() error {
			out, err := c.Exec("jobs", "web-"+n.Name, "/server", "get", "http://"+d.address+":8080/")
			if err == nil && !strings.HasPrefix(out, "client="+podIP(c, n.Name)+" ") {
				err = fmt.Errorf("answer %q", out)
			}
			return err
		})
	}

	// The node port hides the device's address from the gateway, so that it is the device
	// that must notice: a stock one does after 15 s.
	c.Kubectl("-n", "vpn", "delete", "pod", "culvert-hq-0", "--wait=false")
	gone := time.Now()
	time.Sleep(2 * time.Second)
	d.reaches(t, web, 20*time.Second)
	t.Logf("the gateway's pod was deleted: back after %s", time.Since(gone).Round(100*time.Millisecond))

	plugin(t, c, "device", "rm", "phone", "-n", "vpn")
	labtest.Eventually(t, 5*time.Second, "a removed device is silent", func() error {
		if out, err := d.get(web); err == nil {
			return fmt.Errorf("answer %q", out)
		}
		return nil
	})
}

func podIP(c *clustertest.Cluster, node string) string {
	return c.Kubectl("-n", "jobs", "get", "pod", "web-"+node, "-o", "jsonpath={.status.podIP}")
}

// plugin runs "kubectl culvert", with culvert installed as kubectl's plug-in.
func plugin(t *testing.T, c *clustertest.Cluster, args ...string) string {
	t.Helper()
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(bin, "kubectl-culvert"), "../../../cmd/culvert")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Program("kubectl"), append([]string{"culvert"}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "KUBECONFIG="+c.Kubeconfig())
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("kubectl culvert %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// device is a machine outside with a stock WireGuard in user space.
type device struct {
	*labtest.Host
	address string
}

func newDevice(t *testing.T, c *clustertest.Cluster, config string) *device {
	t.Helper()
	router := c.OutsideHost("phonenet", "198.18.1.20/15")
	l := labtest.New(t)
	d := &device{Host: l.Host("phone")}
	if err := l.Lab.Connect(router, "lan", "192.168.88.1/24", d.Host.Host, "eth0", "192.168.88.2/24"); err != nil {
		t.Fatal(err)
	}
	d.IP("route", "add", "default", "via", "192.168.88.1")
	if err := router.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := router.Output(t.Context(), "nft", "table ip nat { chain post { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }"); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(config) {
		if v, ok := strings.CutPrefix(line, "Address = "); ok {
			d.address, _, _ = strings.Cut(strings.TrimSpace(v), "/")
		}
	}
	file := filepath.Join(t.TempDir(), fmt.Sprintf("cvj%d.conf", os.Getpid()%1000000))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("WG_QUICK_USERSPACE_IMPLEMENTATION", "wireguard-go")
	d.Run("wg-quick", "up", file)
	t.Cleanup(func() { _, _ = d.Try("wg-quick", "down", file) })
	d.Background(c.TestServer())
	return d
}

func (d *device) get(address string) (string, error) {
	return d.Try("curl", "-s", "-S", "-m", "1", "http://"+address+"/")
}

// reaches wants answers of the service to the device's own address.
func (d *device) reaches(t *testing.T, address string, timeout time.Duration) {
	t.Helper()
	labtest.Eventually(t, timeout, "the device reaches the service", func() error {
		out, err := d.get(address)
		if err == nil && !strings.HasPrefix(out, "client="+d.address+" ") {
			err = fmt.Errorf("answer %q, want client=%s", out, d.address)
		}
		return err
	})
}
