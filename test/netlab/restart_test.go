package netlab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
)

// ours lists what the gateway has on its host: links, table, routes, rules, daemons.
func (g *gateway) ours() []string {
	g.t.Helper()
	var found []string
	add := func(what, out string, keep func(string) bool) {
		for _, l := range strings.Split(out, "\n") {
			if l = strings.TrimSpace(l); l != "" && (keep == nil || keep(l)) {
				found = append(found, what+" "+l)
			}
		}
	}
	h := g.host
	add("link", h.Run("ip", "-o", "link", "show"), func(l string) bool { return strings.Contains(l, ": cvt") || strings.Contains(l, ": ipsec0") })
	add("nft", h.Run("nft", "list", "tables"), func(l string) bool { return strings.Contains(l, "culvert") })
	for _, f := range []string{"-4", "-6"} {
		add("route", h.Run("ip", f, "route", "show", "table", "all", "proto", "196"), nil)
		add("rule", h.Run("ip", f, "rule", "show"), func(l string) bool { return strings.HasPrefix(l, "1960") || strings.HasPrefix(l, "32768") })
	}
	pids := h.Run("ip", "netns", "pids", h.Namespace)
	for _, pid := range strings.Fields(pids) {
		b, _ := os.ReadFile("/proc/" + pid + "/comm")
		add("process", string(b), func(l string) bool { return strings.HasPrefix(l, "charon") || strings.HasPrefix(l, "culvert") })
	}
	return found
}

// awaitSaved waits until the gateway has written down where so many peers are.
func (g *gateway) awaitSaved(peers int) {
	g.t.Helper()
	eventually(g.t, 8*time.Second, "the peers' endpoints are kept", func() error {
		b, err := os.ReadFile(filepath.Join(g.state, "endpoints.json"))
		if err != nil {
			return err
		}
		var m map[string]string
		if err := json.Unmarshal(b, &m); err != nil || len(m) != peers {
			return fmt.Errorf("%d endpoints, want %d (%w)", len(m), peers, err)
		}
		return nil
	})
}

// The gateway is killed and started again by its supervisor: stock devices that dial in,
// and would themselves try again only after 15 s, have traffic back within 5 s; nothing is
// ever sent in clear; addresses and keys stay. SIGTERM then takes everything down.
func TestKilledAndRestarted(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.run()
	phone, _ := n.dialIn(g, "phone", 2)
	laptop, _ := n.dialIn(g, "laptop", 3)
	// This one's address is the gateway's choice.
	auto := newDevice(t, n.dialler("auto").host)
	g.write("device-auto.yaml", deviceYAML("auto", auto.key()))
	for _, d := range []*device{phone, laptop} {
		reaches(t, d.Host, "udp", at(web1, port), "web-1", 5*time.Second)
	}
	g.awaitSaved(2)
	before, err := g.report()
	if err != nil {
		t.Fatal(err)
	}
	l := n.watchLeaks("gateway", "phone", "laptop")
	probes := []*probe{
		watch(t, phone.Host, at(web1, port), 20*time.Millisecond),
		watch(t, laptop.Host, at(web2v6, port), 20*time.Millisecond),
		watch(t, n.web1, at("10.99.0.2", port), 20*time.Millisecond),
		watch(t, n.web2, at("fd00:99::2", port), 20*time.Millisecond), // nobody speaks to the laptop
		watch(t, phone.Host, at(webService, 80), 20*time.Millisecond),
	}
	time.Sleep(500 * time.Millisecond)
	for i, delay := range []time.Duration{100 * time.Millisecond, 1500 * time.Millisecond} {
		event := time.Now()
		g.kill()
		time.Sleep(delay) // the supervisor
		g.start()
		for _, p := range probes {
			back := p.awaitBack(event, delay+5*time.Second)
			t.Logf("kill %d, restarted after %d ms: %s back after %d ms", i+1, delay.Milliseconds(), p.what, back.Milliseconds())
			if back > 5*time.Second {
				t.Errorf("%s: back %s after the kill, want ≤5 s", p.what, back)
			}
		}
	}
	for _, p := range probes {
		o := p.stop()
		t.Logf("%s: %s", p.what, o)
		if o.lost == 0 {
			t.Errorf("%s lost nothing: was the gateway killed?", p.what)
		}
	}
	g.await("the same addresses and keys", 5*time.Second, func(r *culvert.Report) error {
		if r.Key != before.Key || len(r.Devices) != len(before.Devices) {
			return errors.New("another key, or other devices")
		}
		for i, d := range r.Devices {
			if b := before.Devices[i]; d.Name != b.Name || d.Key != b.Key || fmt.Sprint(d.Addresses) != fmt.Sprint(b.Addresses) || len(d.Addresses) != 2 {
				return fmt.Errorf("%+v, before %+v", d, b)
			}
		}
		return nil
	})
	l.none()

	if got := g.ours(); len(got) < 10 {
		t.Errorf("while it runs, only this is found of the gateway: %v", got)
	}
	g.stop()
	if got := g.ours(); len(got) > 0 {
		t.Errorf("left behind after SIGTERM:\n%s", strings.Join(got, "\n"))
	}
}

// With --keep-on-stop the gateway leaves its table and routes to a successor, and what
// is for the tunnels goes nowhere meanwhile.
func TestKeepOnStop(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", "10.10.0.0/16", "a pre-shared key of berlin"))
	g.run("--keep-on-stop")
	phone, _ := n.dialIn(g, "phone", 2)
	reaches(t, phone.Host, "udp", at(web1, port), "web-1", 5*time.Second)
	g.awaitSaved(1)
	l := n.watchLeaks("gateway", "phone")
	p := watch(t, n.web1, at("10.99.0.2", port), 10*time.Millisecond)
	g.stop()
	left := strings.Join(g.ours(), "\n")
	for _, want := range []string{"table inet culvert", "route unreachable 10.99.0.0/20", "route unreachable 10.10.0.0/16", "rule 19602:", "process charon"} {
		if !strings.Contains(left, want) {
			t.Errorf("after --keep-on-stop there is no %q in:\n%s", want, left)
		}
	}
	time.Sleep(300 * time.Millisecond)
	g.start("--keep-on-stop")
	event := time.Now()
	t.Logf("successor: traffic back after %d ms", p.awaitBack(event, 5*time.Second).Milliseconds())
	p.stop()
	l.none()
	g.stop()
	g.run() // without the option: takes it all over, and down
	g.stop()
	if got := g.ours(); len(got) > 0 {
		t.Errorf("left behind after SIGTERM:\n%s", strings.Join(got, "\n"))
	}
}

// What is in effect is not touched again: not by the resync, not when files are written
// anew with the same content, not by a restart.
func TestSecondApplyIsEmpty(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", "10.10.0.0/16", "a pre-shared key of berlin"))
	g.run()
	phone, _ := n.dialIn(g, "phone", 2)
	reaches(t, phone.Host, "tcp", at(webService, 80), "web-", 5*time.Second)
	kernel := func() string {
		return n.gateway.Run("nft", "-s", "list", "table", "inet", "culvert") + n.gateway.Run("ip", "route", "show", "table", "all", "proto", "196") +
			n.gateway.Run("ip", "-6", "route", "show", "table", "all", "proto", "196") + n.gateway.Run("ip", "rule") + n.gateway.Run("ip", "-6", "rule")
	}
	before := kernel()
	logged := func() int {
		b, _ := os.ReadFile(g.log)
		return strings.Count(string(b), "msg=applied")
	}
	applied := logged()
	_, netlink := n.gateway.Background("ip", "monitor", "link", "address", "route", "rule")
	_, nft := n.gateway.Background("nft", "monitor")
	time.Sleep(300 * time.Millisecond)
	for _, f := range []string{"gateway.yaml", "web.yaml", "berlin.yaml"} {
		b, err := os.ReadFile(filepath.Join(g.manifests, f))
		if err != nil {
			t.Fatal(err)
		}
		g.write(f, string(b))
		time.Sleep(100 * time.Millisecond)
	}
	time.Sleep(10500 * time.Millisecond) // a resync
	for _, log := range []string{netlink, nft} {
		if got := changes(log); len(got) > 0 {
			t.Errorf("changes in steady state:\n%s", strings.Join(got, "\n"))
		}
	}
	if got := logged(); got != applied {
		t.Errorf("%d changes logged in steady state:\n%s", got-applied, tail(g.log, got-applied))
	}
	// Control: the monitors see a change.
	g.write("device-late.yaml", deviceYAML("late", newKey(t).PublicKey().String()))
	g.write("site-late.yaml", siteYAML("late", "10.20.0.0/16", "wireguard: {publicKey: "+newKey(t).PublicKey().String()+"}"))
	eventually(t, 5*time.Second, "the monitors see a new device", func() error {
		for _, log := range []string{netlink, nft} {
			if len(changes(log)) == 0 {
				return fmt.Errorf("%s is empty", log)
			}
		}
		return nil
	})
	g.remove("device-late.yaml")
	g.remove("site-late.yaml")
	eventually(t, 5*time.Second, "the device is gone again", func() error {
		if strings.Contains(kernel(), "10.20.0.0/16") {
			return errors.New("still there")
		}
		return nil
	})
	before2 := kernel()
	if normal(before2) != normal(before) {
		t.Errorf("after a device and a site came and went:\n%s\nbefore:\n%s", before2, before)
	}
	g.kill()
	truncated, _ := os.Stat(nft)
	g.run()
	reaches(t, phone.Host, "tcp", at(webService, 80), "web-", 20*time.Second)
	if after := kernel(); normal(after) != normal(before2) {
		t.Errorf("after a restart:\n%s\nbefore:\n%s", after, before2)
	}
	if now, _ := os.Stat(nft); now.Size() != truncated.Size() {
		t.Logf("a restart changed in nftables:\n%s", tail(nft, 20))
	}
}

// changes reads what a monitor saw, but for the kernel's own link-local addresses, which
// take a while.
func changes(log string) []string {
	b, _ := os.ReadFile(log)
	return slices.DeleteFunc(strings.Split(strings.TrimSpace(string(b)), "\n"), func(l string) bool {
		return strings.TrimSpace(l) == "" || strings.Contains(l, "fe80:") || strings.Contains(l, "valid_lft")
	})
}

// normal drops what may differ without a change: the order of elements.
func normal(s string) string { return strings.Join(strings.Fields(s), " ") }
