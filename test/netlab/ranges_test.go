package netlab

import (
	"fmt"
	"strings"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
)

// wgSite adds a site that dials in with a stock WireGuard; its host has one address in
// each of the ranges.
func (n *network) wgSite(g *gateway, name string, cidrs, addrs []string, extra ...string) *device {
	n.t.Helper()
	d := newDevice(n.t, n.dialler(name).host)
	quoted := `"` + strings.Join(cidrs, `", "`) + `"`
	g.write("site-"+name+".yaml", siteYAML(name, quoted, append(extra, "wireguard: {publicKey: "+d.key()+"}")...))
	g.await("the gateway knows the site "+name, 5*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/"+name); p == nil || p.Reason == "NotConfigured" || p.Reason == "Waiting" {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	d.up(g.public, public+":51820", addrs)
	return d
}

// routes are all routes on the gateway's host but those of link-local addresses.
func (g *gateway) routes() string {
	g.t.Helper()
	var out strings.Builder
	for line := range strings.Lines(g.host.Run("ip", "route", "show", "table", "all") + g.host.Run("ip", "-6", "route", "show", "table", "all")) {
		if !strings.Contains(line, "fe80:") { // links' own, which come when nobody else was found to have them
			out.WriteString(line)
		}
	}
	return out.String()
}

// A range that overlaps another's is refused with both named, and the one who had it
// loses no packet (FAULTS 12); what is reserved is refused (FAULTS 13).
func TestRangesAreRefused(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.run()
	oslo := n.wgSite(g, "oslo", []string{"10.20.0.0/16", "fd00:20::/48"}, []string{"10.20.0.5", "fd00:20::5"})
	phone, _ := n.dialIn(g, "phone", 2)
	reaches(t, oslo.Host, "udp", at(web1, port), "web-1 10.20.0.5", 8*time.Second)
	reaches(t, phone.Host, "udp", at(web1, port), "web-1 10.99.0.2", 8*time.Second)
	reaches(t, n.web1, "udp", at("fd00:20::5", port), "oslo", 5*time.Second)
	routes := g.routes()

	newcomers := map[string]struct{ cidr, named string }{
		"equal":          {"10.20.0.0/16", "default/oslo"},
		"subset":         {"10.20.7.0/24", "default/oslo"},
		"superset":       {"10.16.0.0/12", "default/oslo"},
		"host":           {"10.20.0.5/32", "default/oslo"},
		"equal6":         {"fd00:20::/48", "default/oslo"},
		"subset6":        {"fd00:20::5/128", "default/oslo"},
		"superset6":      {"fd00::/16", ""},
		"devices":        {"10.99.0.0/20", "default/edge"},
		"device":         {"10.99.0.2/32", "default/edge"},
		"devices-all":    {"10.99.0.0/16", "default/edge"},
		"devices6":       {"fd00:99::/64", "default/edge"},
		"pods":           {"10.244.0.0/16", "default/edge"},
		"pod":            {web1 + "/32", "default/edge"},
		"pods-all":       {"10.192.0.0/10", "default/edge"},
		"pods6":          {"fd00:10:244:1::/64", "default/edge"},
		"services":       {"10.96.0.0/16", "default/edge"},
		"service":        {"10.96.0.80/32", "default/edge"},
		"services6":      {"fd00:10:96::/112", "default/edge"},
		"nodes":          {"172.20.0.0/24", "default/edge"},
		"node":           {nodeIP + "/32", "default/edge"},
		"all":            {"0.0.0.0/0", "all addresses"},
		"all6":           {"::/0", "all addresses"},
		"half":           {"0.0.0.0/1", "all addresses"},
		"other-half":     {"128.0.0.0/1", "all addresses"},
		"half6":          {"::/1", "all addresses"},
		"other-half6":    {"8000::/1", "all addresses"},
		"loopback":       {"127.0.0.0/8", "loopback"},
		"loopback1":      {"127.0.0.53/32", "loopback"},
		"loopback6":      {"::1/128", "loopback"},
		"link-local":     {"169.254.0.0/16", "link-local"},
		"metadata":       {"169.254.169.254/32", "link-local"},
		"link-local6":    {"fe80::/10", "link-local"},
		"multicast":      {"224.0.0.0/4", "multicast"},
		"multicast6":     {"ff00::/8", "multicast"},
		"broadcast":      {"255.255.255.255/32", "broadcast"},
		"this-network":   {"0.0.0.0/8", "this network"},
		"mapped":         {"::ffff:10.0.0.0/104", "IPv4"},
		"wide-reserved":  {"96.0.0.0/3", "loopback"},
		"wide-multicast": {"192.0.0.0/2", "multicast"},
	}
	probes := []*probe{
		watch(t, oslo.Host, at(web1, port), 10*time.Millisecond), watch(t, n.web2, at("fd00:20::5", port), 10*time.Millisecond),
		watch(t, phone.Host, at(web2v6, port), 10*time.Millisecond), watch(t, n.web1, at("10.99.0.2", port), 10*time.Millisecond),
	}
	time.Sleep(200 * time.Millisecond)
	for name, x := range newcomers {
		g.write("new-"+name+".yaml", siteYAML("new-"+name, fmt.Sprintf("%q", x.cidr), "wireguard: {publicKey: "+newKey(t).PublicKey().String()+"}"))
	}
	// Addresses of devices that are another's, or the gateway's.
	for name, x := range map[string]string{"thief": "10.99.0.2", "usurper": "10.99.0.1"} {
		g.write("new-"+name+".yaml", deviceYAML("new-"+name, newKey(t).PublicKey().String(), "addresses: ["+x+"]"))
	}
	g.await("all are refused, with both named", 10*time.Second, func(r *culvert.Report) error {
		for name, x := range newcomers {
			p := problem(r, "Site default/new-"+name)
			if p == nil {
				return fmt.Errorf("%s (%s) is not refused", name, x.cidr)
			}
			if !strings.HasPrefix(p.Field, "spec.cidrs[0]") || !strings.Contains(p.Message, x.named) || !strings.Contains(p.Message, x.cidr) {
				return fmt.Errorf("%s: %q does not name spec.cidrs[0], %q and %q", name, p.Field+": "+p.Message, x.cidr, x.named)
			}
			if !strings.HasPrefix(p.Origin, "new-"+name+".yaml:") {
				return fmt.Errorf("%s: origin %q", name, p.Origin)
			}
		}
		for _, name := range []string{"thief", "usurper"} {
			if problem(r, "Device default/new-"+name) == nil {
				return fmt.Errorf("%s is not refused", name)
			}
		}
		return nil
	})
	time.Sleep(300 * time.Millisecond)
	if got := g.routes(); got != routes {
		t.Errorf("routes changed:\n%s\nbefore:\n%s", got, routes)
	}
	for _, p := range probes {
		p.unharmed()
	}
	// A restart does not turn newcomers into incumbents.
	g.kill()
	g.start()
	g.await("the same after a restart", 10*time.Second, func(r *culvert.Report) error {
		for _, refused := range []string{"Site default/new-equal", "Device default/new-thief"} {
			if problem(r, refused) == nil {
				return fmt.Errorf("%s is not refused", refused)
			}
		}
		if p := problem(r, "Site default/oslo"); p != nil {
			return fmt.Errorf("the incumbent is refused: %+v", p)
		}
		return nil
	})
	// Another's public key.
	g.write("new-key.yaml", deviceYAML("new-key", phone.key()))
	g.awaitProblem("Device default/new-key", func(p *culvert.ProblemReport) error {
		if !strings.Contains(p.Message, "phone") {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
}
