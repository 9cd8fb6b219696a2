package netlab

import (
	"fmt"
	"strings"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
)

// A bad edit of a running gateway's manifests: the last good version stays in effect and
// loses no packet, the status says what is wrong and where, and putting it right works.
func TestBadEdits(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	good := gatewayYAML()
	g.write("gateway.yaml", good)
	g.write("web.yaml", webYAML())
	g.run()
	phone, _ := n.dialIn(g, "phone", 2)
	w := n.dialler("oslo")
	oslo := newDevice(t, w.host)
	psk := newKey(t).String()
	site := siteYAML("oslo", "10.20.0.0/16", "wireguard: {publicKey: "+oslo.key()+", presharedKeySecretRef: {name: oslo, key: psk}}")
	g.write("oslo.yaml", site+secretYAML("oslo", "psk", psk))
	g.await("the gateway knows oslo", 5*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/oslo"); p == nil || p.Reason == "NotConfigured" {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	oslo.up(g.public, public+":51820", []string{"10.20.0.5"}, "PresharedKey = "+psk)
	reaches(t, phone.Host, "udp", at(web1, port), "web-1", 8*time.Second)
	reaches(t, oslo.Host, "udp", at(web1, port), "web-1", 8*time.Second)
	reaches(t, phone.Host, "udp", at(webService, 80), "web-", 5*time.Second)
	probes := []*probe{
		watch(t, phone.Host, at(web1, port), 10*time.Millisecond),
		watch(t, oslo.Host, at(web1, port), 10*time.Millisecond),
		watch(t, n.web2, at("10.20.0.5", port), 10*time.Millisecond),
		watch(t, phone.Host, at(webService, 80), 10*time.Millisecond),
	}
	device := deviceYAML("phone", phone.key(), `addresses: [10.99.0.2, "fd00:99::2"]`)
	for _, e := range []struct {
		what, file, text string
		object, field    string // of the problem; object empty: any
		message          string
	}{
		{"unknown field", "device-phone.yaml", device + "  acces: {to: [Pods]}\n", "Device default/phone", "spec.acces", ""},
		{"wrong type", "device-phone.yaml", strings.Replace(device, "addresses: [", "suspend: perhaps\n  addresses: [", 1), "Device default/phone", "spec.suspend", ""},
		{"bad key", "device-phone.yaml", strings.Replace(device, phone.key(), "not-a-key", 1), "Device default/phone", "spec.publicKey", "wg pubkey"},
		{"unknown gateway", "device-phone.yaml", strings.Replace(device, "name: edge", "name: egde", 1), "Device default/phone", "spec.gatewayRef", "egde"},
		{"broken YAML", "device-phone.yaml", device + "  access: {to: [Pods\n", "", "", ""},
		{"half a file", "device-phone.yaml", device[:len(device)/2], "", "", ""},
		{"not YAML at all", "device-phone.yaml", "\x00\x01\x02 {{{", "", "", ""},
		{"bad range", "oslo.yaml", strings.Replace(site, "10.20.0.0/16", "10.20.0.0/33", 1) + secretYAML("oslo", "psk", psk), "Site default/oslo", "spec.cidrs[0]", "10.20.0.0/33"},
		{"bad secret", "oslo.yaml", site + secretYAML("oslo", "psk", "too short to be one"), "Site default/oslo", "spec.wireguard.presharedKeySecretRef", ""},
		{"secret without the key", "oslo.yaml", site + secretYAML("oslo", "other", psk), "Site default/oslo", "spec.wireguard.presharedKeySecretRef", "psk"},
		{"secret gone", "oslo.yaml", site, "Site default/oslo", "spec.wireguard.presharedKeySecretRef", "oslo"},
		{"both kinds", "oslo.yaml", site + "  ipsec: {address: 192.0.2.1}\n" + secretYAML("oslo", "psk", psk), "Site default/oslo", "spec", ""},
		{"bad pod range", "gateway.yaml", strings.Replace(good, "10.244.0.0/16", "10.244.0.0/", 1), "VPNGateway default/edge", "spec.cluster.podCIDRs[0]", ""},
		{"impossible combination", "gateway.yaml", good + "  clusterTraffic: {services: Route, source: Preserve}\n", "VPNGateway default/edge", "spec.clusterTraffic", ""},
		{"bad service", "web.yaml", strings.Replace(webYAML(), "port: 80,", "port: 80000,", 1), "Service default/web", "spec.ports[0].port", ""},
		{"bad endpoint", "web.yaml", strings.Replace(webYAML(), `"`+web1+`"`, `"10.244.1.300"`, 1), "EndpointSlice default/web-ipv4", "endpoints[0]", ""},
	} {
		back := map[string]string{
			"device-phone.yaml": device, "oslo.yaml": site + secretYAML("oslo", "psk", psk), "gateway.yaml": good, "web.yaml": webYAML(),
		}[e.file]
		g.write(e.file, e.text)
		said := ""
		took := g.await("the status says: "+e.what, 5*time.Second, func(r *culvert.Report) error {
			for _, p := range r.Problems {
				if e.object != "" && p.Object != e.object || !strings.HasPrefix(p.Field, e.field) || !strings.Contains(p.Message, e.message) || !p.Kept {
					continue
				}
				if !strings.HasPrefix(p.Origin, e.file) {
					return fmt.Errorf("origin %q, want %s", p.Origin, e.file)
				}
				said = p.Field + ": " + p.Message
				return nil
			}
			return fmt.Errorf("problems %+v", r.Problems)
		})
		t.Logf("%s: after %d ms: %s", e.what, took.Milliseconds(), said)
		if strings.ContainsAny(said, "\n\r\x00") {
			t.Errorf("%s: the message is not one line: %q", e.what, said)
		}
		time.Sleep(50 * time.Millisecond)
		g.write(e.file, back)
		g.awaitNoProblems()
	}
	for _, p := range probes {
		p.unharmed()
	}
	// A good edit takes effect.
	g.write("device-phone.yaml", deviceYAML("phone", phone.key(), `addresses: [10.99.0.2, "fd00:99::2"]`, "access: {to: [Nodes]}"))
	reaches(t, phone.Host, "tcp", at(nodeIP, port), "node 10.99.0.2", 5*time.Second)
	blocked(t, phone.Host, "tcp", at(web1, port))
}
