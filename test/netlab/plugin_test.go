package netlab

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// A person with a kubeconfig: "kubectl culvert" adds a device, takes its configuration to
// it, sees it connected, and removes it. Operator, gateway and API server are the real
// ones.
func TestKubectlCulvert(t *testing.T) {
	n := newNetwork(t)
	a := newAPIServer(t, n)
	g := newGateway(t, n.gateway)
	g.inCluster(a)
	a.apply(gatewayYAML("clusterTraffic: {nodeLink: Direct}") + dualStack(webYAML()) + nodeYAML)
	a.operator()
	g.run()
	ok := func(args ...string) string {
		t.Helper()
		out, errs, code := a.kubectlCulvert(args...)
		if code != 0 {
			t.Fatalf("kubectl culvert %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errs)
		}
		return out
	}
	if out := ok("device", "--help"); !strings.Contains(out, "kubectl culvert device add phone") || strings.Contains(out, "  culvert device") {
		t.Errorf("help of the plug-in:\n%s", out)
	}

	if out := ok("device", "add", "phone"); !strings.Contains(out, "device default/phone: 10.99.0.2, fd00:99::2\nnext: kubectl culvert device config phone --namespace default --qr") {
		t.Errorf("device add says\n%s", out)
	}
	if _, errs, code := a.kubectlCulvert("device", "add", "phone"); code != 1 || !strings.Contains(errs, "exists already") {
		t.Errorf("twice: exit code %d, %s", code, errs)
	}
	var config string
	eventually(t, 15*time.Second, "the device's configuration", func() error {
		out, errs, code := a.kubectlCulvert("device", "config", "phone")
		if code != 0 {
			return fmt.Errorf("exit code %d: %s", code, errs)
		}
		config = out
		return nil
	})
	if out := ok("device", "config", "phone", "--qr"); strings.Count(out, "\n") < 20 || !strings.Contains(out, "█") {
		t.Errorf("a QR code of %d lines", strings.Count(out, "\n"))
	}
	file := filepath.Join(t.TempDir(), "phone.conf")
	ok("device", "config", "phone", "--file", file)
	if b, err := os.ReadFile(file); err != nil || string(b) != config {
		t.Errorf("the file differs from the output (%v)", err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the file: %v, %v", st.Mode(), err)
	}

	d := n.stock(t, "phone", config)
	reaches(t, d.Host, "tcp", at(webService, 80), "web-", 15*time.Second)
	a.awaitCondition("device", "phone", "Connected", "True", 5*time.Second)
	if out := ok("device", "list"); !regexp.MustCompile(`default/phone +connected +10\.99\.0\.2,fd00:99::2 +pods,services`).MatchString(out) {
		t.Errorf("device list says\n%s", out)
	}

	// All is well; then one object is refused.
	s := parseStatus(t, ok("status", "-o", "json"))
	if len(s.Gateways) != 1 || s.Gateways[0].Ready != "True" || len(s.Devices) != 1 || s.Devices[0].Connected != "True" {
		t.Errorf("status: %+v", s)
	}
	a.apply(siteYAML("bad", "10.244.7.0/24", "wireguard: {publicKey: "+newKey(t).PublicKey().String()+"}"))
	a.awaitCondition("site", "bad", "Ready", "False Overlap", 10*time.Second)
	out, _, code := a.kubectlCulvert("status")
	for _, want := range []string{"default/edge", "default/phone", "problem: Site default/bad: Accepted: Overlap: ", "10.244.7.0/24 overlaps"} {
		if !strings.Contains(out, want) {
			t.Errorf("status does not say %q:\n%s", want, out)
		}
	}
	if code != 1 {
		t.Errorf("status with a refused site: exit code %d, want 1", code)
	}
	out, _, code = a.kubectlCulvert("doctor")
	for _, want := range []string{"FAIL  operator", "ok    VPNGateway default/edge", "FAIL  Site default/bad", "ok    devices"} {
		if !strings.Contains(out, want) {
			t.Errorf("doctor does not say %q:\n%s", want, out)
		}
	}
	if code != 1 {
		t.Errorf("doctor: exit code %d, want 1", code)
	}

	// The plan, from the cluster's own facts, names the device as the gateway has it.
	planned, _, code := a.kubectlCulvert("plan", "gateway")
	if code != 0 || !strings.Contains(planned, "device default/phone") || !strings.Contains(planned, "10.99.0.2/32") {
		t.Errorf("plan gateway: exit code %d\n%s", code, planned)
	}

	// A device with a key of its own gets a configuration without it.
	ok("device", "add", "laptop", "--public-key", newKey(t).PublicKey().String(), "--access", "Pods")
	if out := ok("device", "config", "laptop"); !strings.Contains(out, "# PrivateKey = ") || !strings.Contains(out, "Endpoint = "+public+":51820") {
		t.Errorf("configuration of a device with a key of its own:\n%s", out)
	}

	ok("device", "rm", "phone")
	start := time.Now()
	eventually(t, 5*time.Second, "the device is cut off", func() error {
		if got, err := whoFrom(d.Host, "udp", "", at(web1, port), 200*time.Millisecond); err == nil {
			return fmt.Errorf("%s answers", got)
		}
		return nil
	})
	t.Logf("cut off %s after its removal", time.Since(start).Round(time.Millisecond))
	if _, errs, code := a.kubectlCulvert("device", "rm", "phone"); code != 1 || !strings.Contains(errs, "there is no device default/phone") {
		t.Errorf("removed twice: exit code %d, %s", code, errs)
	}
}

// stock configures a stock device as wg-quick(8) would.
func (n *network) stock(t *testing.T, name, config string) *device {
	t.Helper()
	d := newDevice(t, n.dialler(name).host)
	value := func(key string) string {
		t.Helper()
		m := regexp.MustCompile(`(?m)^` + key + ` = (.*)$`).FindStringSubmatch(config)
		if m == nil {
			t.Fatalf("no %s in\n%s", key, config)
		}
		return m[1]
	}
	wg := regexp.MustCompile(`(?m)^(Address|DNS|MTU) = .*\n`).ReplaceAllString(config, "")
	d.conf(wg)
	d.IP("link", "set", d.link, "mtu", value("MTU"))
	var addrs []string
	for _, a := range strings.Split(value("Address"), ", ") {
		addr, _, _ := strings.Cut(a, "/")
		d.address(addr)
		addrs = append(addrs, addr)
	}
	d.IP("link", "set", d.link, "up")
	for _, r := range strings.Split(value("AllowedIPs"), ", ") {
		d.IP("route", "replace", r, "dev", d.link)
	}
	answer(t, d.Host, addrs...)
	return d
}

type clusterStatus struct {
	Gateways []struct{ Name, Ready string }
	Sites    []struct {
		Name, Ready, Connected string
		Problems               []struct{ Type, Reason, Message string }
	}
	Devices []struct{ Name, Ready, Connected string }
}

func parseStatus(t *testing.T, text string) clusterStatus {
	t.Helper()
	var s clusterStatus
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return s
}
