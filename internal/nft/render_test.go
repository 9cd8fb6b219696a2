package nft

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// render is the whole table for a state, as a first Set writes it.
func render(t *testing.T, f netstate.Firewall, s netstate.Services) string {
	t.Helper()
	fw, err := renderFirewall(f)
	if err != nil {
		t.Fatal(err)
	}
	svc, err := renderServices(s)
	if err != nil {
		t.Fatal(err)
	}
	var ports []netstate.ServicePort
	if s.Mode == netstate.ServicesTranslate {
		ports = s.Ports
	}
	plan := newPorts().plan(ports)
	svc.addPicks(plan.picks)
	out := newScript(newContents())
	out.frame()
	out.part(fw)
	out.part(svc)
	out.ports(plan)
	return out.String()
}

func TestGolden(t *testing.T) {
	proxy := services(servicePorts(0, "pod 1")...)
	proxy.Mode = netstate.ServicesProxy
	masquerade := firewall(netstate.AccessPods | netstate.AccessServices | netstate.AccessNodes | netstate.AccessSites)
	masquerade.Masquerade = true
	masquerade.Clamps = []netstate.Clamp{{Link: "cvtwg0", MSS4: 1380, MSS6: 1360}, {Link: "cvtwg1", MSS4: 1380, MSS6: 1360}}
	for name, c := range map[string]struct {
		f netstate.Firewall
		s netstate.Services
	}{
		"empty":     {},
		"translate": {firewall(netstate.AccessPods | netstate.AccessServices), services(append(servicePorts(10800, "pod 1", "pod 2"), servicePorts(0)...)...)},
		"proxy":     {masquerade, proxy},
		"route":     {firewall(netstate.AccessServices), netstate.Services{Mode: netstate.ServicesRoute, Ranges: services().Ranges, Sources: services().Sources}},
	} {
		t.Run(name, func(t *testing.T) {
			got := render(t, c.f, c.s)
			file := filepath.Join("testdata", name+".nft")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); d != "" {
				t.Errorf("rendered differently (-update accepts it):\n%s", d)
			}
		})
	}
}

// Fault 25: names that people choose do not reach nft(8).
func TestNamesStayOut(t *testing.T) {
	f, s := firewall(netstate.AccessPods), services(servicePorts(0, "pod 1")...)
	plain := render(t, f, s)
	for _, evil := range []string{"a\ndelete table inet foreign", `"`, "} ; flush ruleset", "include \"/etc/passwd\"", "#", "\\", "\x00"} {
		for i := range f.Tunnels {
			f.Tunnels[i].Name = evil
		}
		for i := range s.Ports {
			s.Ports[i].Name = evil
		}
		if got := render(t, f, s); got != plain {
			t.Errorf("name %q changes the table", evil)
		}
		links := firewall(netstate.AccessPods)
		links.Tunnels[0].Link = evil
		if _, err := renderFirewall(links); err == nil {
			t.Errorf("tunnel link %q accepted", evil)
		}
		if _, err := renderFirewall(netstate.Firewall{Clamps: []netstate.Clamp{{Link: evil}}}); err == nil {
			t.Errorf("clamp link %q accepted", evil)
		}
		if _, err := renderFirewall(netstate.Firewall{Pools: []netstate.Pool{{Link: evil}}}); err == nil {
			t.Errorf("pool link %q accepted", evil)
		}
		if _, err := renderServices(netstate.Services{Mode: netstate.ServicesTranslate, Sources: []string{evil}}); err == nil {
			t.Errorf("source link %q accepted", evil)
		}
		if _, err := renderServices(netstate.Services{Mode: netstate.ServicesMode(evil)}); err == nil {
			t.Errorf("mode %q accepted", evil)
		}
		zoned := netstate.ServicePort{Address: netip.MustParseAddr("fe80::1").WithZone(evil), Protocol: netstate.TCP, Port: 1}
		if _, err := renderServices(netstate.Services{Mode: netstate.ServicesTranslate, Ports: []netstate.ServicePort{zoned}}); err == nil {
			t.Errorf("zone %q accepted", evil)
		}
	}
}

func TestPrefixesThatOverlap(t *testing.T) {
	tunnels := func(list ...netstate.Tunnel) netstate.Firewall { return netstate.Firewall{Tunnels: list} }
	nested := tunnels(netstate.Tunnel{Name: "site x/a", Link: "cvtwg0", Prefixes: prefixes("10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32")})
	p, err := renderFirewall(nested)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]string{`"cvtwg0" . 10.0.0.0/8`: "goto fw_to_nothing"}, p.sets["fw_nets4"]); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(map[string]string{`10.0.0.0/8 . "cvtwg0"`: ""}, p.sets["fw_out_nets4"]); d != "" {
		t.Error(d)
	}
}
