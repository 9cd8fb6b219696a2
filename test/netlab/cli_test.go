package netlab

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"rsc.io/qr"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// get asks the gateway's own server: its TCP address for "/metrics" and the like, its
// Unix socket for "/v1/…".
func (g *gateway) get(resource string) (status int, body string, err error) {
	dial := func(context.Context, string, string) (c net.Conn, err error) {
		err = g.host.Host.Do(func() error {
			if strings.HasPrefix(resource, "/v1/") {
				c, err = net.Dial("unix", filepath.Join(g.state, "run", "culvert.sock"))
			} else {
				c, err = net.Dial("tcp", "127.0.0.1:9586")
			}
			return err
		})
		return c, err
	}
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: dial}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://gateway" + resource)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func (g *gateway) mustGet(resource string) string {
	g.t.Helper()
	code, body, err := g.get(resource)
	if err != nil || code != http.StatusOK {
		g.t.Fatalf("GET %s: %d, %v", resource, code, err)
	}
	return body
}

// A device's life with the commands that people type, and what a dry run says of it.
func TestDeviceCommands(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.run()
	where := []string{"--manifests", g.manifests, "--state", g.state}
	device := func(args ...string) string {
		t.Helper()
		out, errs, code := g.culvert(slices.Concat([]string{"device"}, args, where)...)
		if code != 0 {
			t.Fatalf("culvert device %v: exit code %d: %s", args, code, errs)
		}
		return out
	}
	if out := device("add", "tablet", "--access", "Pods,Services"); !strings.Contains(out, "10.99.0.2") || !strings.Contains(out, "fd00:99::2") {
		t.Errorf("device add says: %s", out)
	}
	if _, _, code := g.culvert(append([]string{"device", "add", "tablet"}, where...)...); code != 1 {
		t.Errorf("adding it twice: exit code %d, want 1", code)
	}
	var list []map[string]any
	if err := json.Unmarshal([]byte(device("list", "-o", "json")), &list); err != nil || len(list) != 1 || list[0]["name"] != "default/tablet" || list[0]["state"] != "active" {
		t.Errorf("device list: %v, %v", list, err)
	}
	g.await("the gateway knows it", 5*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/tablet"); p == nil || p.Reason != "NoHandshake" {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})

	config := device("config", "tablet")
	if got := readQR(t, device("config", "tablet", "--qr")); got != encodeQR(t, config) {
		t.Error("the QR code is not that of the configuration")
	}
	// Verbatim into wg-quick, which starts a stock wireguard-go.
	w := n.dialler("tablet")
	link := fmt.Sprintf("nl%d-%d", os.Getpid()%1000000, stockLinks.Add(1))
	file := filepath.Join(t.TempDir(), link+".conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove("/var/run/wireguard/" + link + ".sock") })
	w.host.Run("wg-quick", "up", file)
	if out := w.host.Run("ip", "link", "show", link); !strings.Contains(out, "mtu 1420") {
		t.Errorf("the link that wg-quick made: %s", out)
	}
	reaches(t, w.host, "tcp", at(web1, port), "web-1 10.99.0.2", 8*time.Second)
	reaches(t, w.host, "udp", at(webServiceV6, 80), "web-", 5*time.Second)

	// A name server goes into the configuration; wg-quick strips it for wg(8).
	g.write("gateway.yaml", gatewayYAML("dns: [10.96.0.10]"))
	withDNS := device("config", "tablet")
	if err := os.WriteFile(file, []byte(withDNS), 0o600); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(withDNS, "\nDNS = 10.96.0.10\n") || strings.Contains(w.host.Run("wg-quick", "strip", file), "DNS") {
		t.Errorf("the configuration has no DNS line, or wg-quick does not know it")
	}

	// A dry run says exactly what happens then.
	extra := filepath.Join(t.TempDir(), "new.yaml")
	manifest := deviceYAML("guest", newKey(t).PublicKey().String(), "access: {to: [Nodes]}") +
		siteYAML("rome", "10.20.0.0/17", "wireguard: {publicKey: "+newKey(t).PublicKey().String()+"}")
	if err := os.WriteFile(extra, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	applied := func() (lines []string) {
		t.Helper()
		if err := json.Unmarshal([]byte(g.mustGet("/v1/plan")), &lines); err != nil {
			t.Fatal(err)
		}
		return lines
	}
	plan := func(files ...string) ([]string, int) {
		t.Helper()
		args := []string{"plan", "gateway", "--diff", "--state", g.state}
		for _, f := range files {
			args = append(args, "-f", f)
		}
		out, errs, code := g.culvert(args...)
		if code > 1 {
			t.Fatalf("culvert plan: %d: %s", code, errs)
		}
		return strings.Split(strings.TrimSpace(out), "\n"), code
	}
	time.Sleep(200 * time.Millisecond)
	if lines, code := plan(g.manifests); code != 0 || len(lines) != 1 || lines[0] != "" {
		t.Errorf("a dry run of what is in effect: exit code %d:\n%s", code, strings.Join(lines, "\n"))
	}
	before := applied()
	promised, code := plan(g.manifests, extra)
	if code != 1 || len(promised) < 4 {
		t.Errorf("a dry run of a new device and site: exit code %d:\n%s", code, strings.Join(promised, "\n"))
	}
	g.write("new.yaml", manifest)
	eventually(t, 5*time.Second, "what was promised happens", func() error {
		if got := netstate.DiffLines(before, applied()); !slices.Equal(got, promised) {
			return fmt.Errorf("happened:\n%s\npromised:\n%s", strings.Join(got, "\n"), strings.Join(promised, "\n"))
		}
		return nil
	})

	p := watch(t, w.host, at(web1, port), 10*time.Millisecond)
	time.Sleep(200 * time.Millisecond)
	device("rm", "tablet")
	event := time.Now()
	time.Sleep(2 * time.Second)
	silent := p.lastAnswer().Sub(event)
	t.Logf("device rm: last answer %d ms after the command", silent.Milliseconds())
	if silent > time.Second || p.stop().lost == 0 {
		t.Errorf("device rm: last answer %s after the command", silent)
	}
	if _, _, code := g.culvert(append([]string{"device", "config", "tablet"}, where...)...); code != 1 {
		t.Errorf("the configuration of a removed device: exit code %d, want 1", code)
	}
	if keys, _ := filepath.Glob(filepath.Join(g.state, "devices", "*tablet*")); len(keys) > 0 {
		t.Errorf("its key is still there: %v", keys)
	}
}

var escape = regexp.MustCompile("\x1b\\[[0-9;]*m")

// readQR turns what a terminal shows into rows of modules, without the quiet zone.
func readQR(t *testing.T, text string) string {
	t.Helper()
	var rows []string
	for _, line := range strings.Split(escape.ReplaceAllString(text, ""), "\n") {
		var top, bottom strings.Builder
		for _, r := range line {
			switch r {
			case '█':
				top.WriteByte('#')
				bottom.WriteByte('#')
			case '▀':
				top.WriteByte('#')
				bottom.WriteByte(' ')
			case '▄':
				top.WriteByte(' ')
				bottom.WriteByte('#')
			default:
				top.WriteByte(' ')
				bottom.WriteByte(' ')
			}
		}
		for _, row := range []string{top.String(), bottom.String()} {
			if row = strings.TrimRight(row, " "); row != "" {
				rows = append(rows, row)
			}
		}
	}
	if len(rows) == 0 {
		t.Fatal("there is no QR code")
	}
	indent := len(rows[0]) - len(strings.TrimLeft(rows[0], " "))
	for i := range rows {
		rows[i] = rows[i][min(indent, len(rows[i])):]
	}
	return strings.Join(rows, "\n")
}

func encodeQR(t *testing.T, text string) string {
	t.Helper()
	code, err := qr.Encode(text, qr.L)
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for y := range code.Size {
		var b strings.Builder
		for x := range code.Size {
			if code.Black(x, y) {
				b.WriteByte('#')
			} else {
				b.WriteByte(' ')
			}
		}
		rows = append(rows, strings.TrimRight(b.String(), " "))
	}
	return strings.Join(rows, "\n")
}

// metric reads one sample; labels are parts that its line must have.
func metric(text, name string, labels ...string) (float64, bool) {
	for _, line := range strings.Split(text, "\n") {
		head, value, _ := strings.Cut(line, "} ")
		if rest, ok := strings.CutPrefix(line, name+" "); ok && len(labels) == 0 {
			v, err := strconv.ParseFloat(rest, 64)
			return v, err == nil
		}
		if !strings.HasPrefix(head, name+"{") || slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(head, l) }) {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		return v, err == nil
	}
	return 0, false
}

// Health and metrics follow what happens.
func TestHealthAndMetrics(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.start()
	eventually(t, 5*time.Second, "alive and not ready without a VPNGateway", func() error {
		alive, _, err := g.get("/healthz")
		ready, why, _ := g.get("/readyz")
		if err != nil || alive != http.StatusOK || ready != http.StatusServiceUnavailable || !strings.Contains(why, "VPNGateway") {
			return fmt.Errorf("healthz %d, readyz %d %q, %w", alive, ready, why, err)
		}
		return nil
	})
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", "10.10.0.0/24", "a pre-shared key of berlin"))
	eventually(t, 5*time.Second, "ready", func() error {
		if ready, why, err := g.get("/readyz"); err != nil || ready != http.StatusOK {
			return fmt.Errorf("readyz %d %q, %w", ready, why, err)
		}
		return nil
	})
	phone, _ := n.dialIn(g, "phone", 2)
	g.write("device-absent.yaml", deviceYAML("absent", newKey(t).PublicKey().String()))
	reaches(t, phone.Host, "udp", at(web1, port), "web-1", 8*time.Second)
	host := n.dialler("berlin").host
	inside(t, host, berlin4)
	s := newStrongSwan(t, host, pskConf("berlin", "10.10.0.0/24", "a pre-shared key of berlin"))
	reachesFrom(t, host, "tcp", berlin4, at(web1, port), "web-1", 10*time.Second)

	handshake := float64(time.Now().Unix())
	var before string
	expect := func(what, name string, ok func(float64) bool, labels ...string) {
		t.Helper()
		eventually(t, 5*time.Second, what, func() error {
			before = g.mustGet("/metrics")
			if v, found := metric(before, name, labels...); !found || !ok(v) {
				return fmt.Errorf("%s %v is %v (found: %t)", name, labels, v, found)
			}
			return nil
		})
	}
	is := func(want float64) func(float64) bool { return func(v float64) bool { return v == want } }
	above := func(least float64) func(float64) bool { return func(v float64) bool { return v > least } }
	expect("the device is up", "culvert_peer_up", is(1), `name="default/phone"`, `kind="device"`, `type="wireguard"`)
	expect("the site is up", "culvert_peer_up", is(1), `name="default/berlin"`, `kind="site"`, `type="ipsec"`)
	expect("the absent device is down", "culvert_peer_up", is(0), `name="default/absent"`)
	expect("a handshake", "wireguard_latest_handshake_seconds", above(handshake-60), `friendly_name="device default/phone"`, `public_key="`+phone.key()+`"`, `allowed_ips="10.99.0.2/32,fd00:99::2/128"`, `interface="cvtwg0"`)
	expect("no handshake", "wireguard_latest_handshake_seconds", is(0), `friendly_name="device default/absent"`)
	expect("the SA's age", "culvert_peer_established_seconds", above(handshake-60), `name="default/berlin"`)
	expect("no problems", "culvert_problems", is(0))
	expect("service ports", "culvert_service_ports", is(4), `mode="Translate"`)

	names := []string{"wireguard_sent_bytes_total", "wireguard_received_bytes_total"}
	old := map[string]float64{}
	for _, name := range names {
		old[name], _ = metric(before, name, `friendly_name="device default/phone"`)
	}
	ipsecOld, _ := metric(before, "culvert_peer_received_bytes_total", `name="default/berlin"`)
	if _, _, err := transfer(phone.Host, "", at(web1, port), 1<<20, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if _, _, err := transfer(host, berlin4, at(web1, port), 1<<20, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		expect("a MiB more", name, above(old[name]+1<<20), `friendly_name="device default/phone"`)
	}
	expect("a MiB more over IPsec", "culvert_peer_received_bytes_total", above(ipsecOld+1<<20), `name="default/berlin"`)

	// What must not pass is counted.
	_, _ = whoFrom(phone.Host, "udp", "", at(nodeIP, port), 300*time.Millisecond)
	expect("denied packets", "culvert_dropped_packets_total", above(0), `reason=`)
	g.write("device-bad.yaml", deviceYAML("bad", "no-key"))
	expect("a problem", "culvert_problems", is(1))
	s.Kill()
	g.remove("device-phone.yaml")
	eventually(t, 5*time.Second, "a removed device has no metrics", func() error {
		if _, found := metric(g.mustGet("/metrics"), "culvert_peer_up", `name="default/phone"`); found {
			return fmt.Errorf("still there")
		}
		return nil
	})
	expect("the dead site is down", "culvert_peer_up", func(v float64) bool { return v == 0 || v == 1 }, `name="default/berlin"`)
}
