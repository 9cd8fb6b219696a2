package netlab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
)

const nodeYAML = `---
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: a}}
spec: {podCIDRs: [10.244.1.0/24], podCIDR: 10.244.1.0/24}
`

// dualStack makes the services of the tests acceptable to an API server.
func dualStack(yaml string) string {
	return strings.ReplaceAll(yaml, "\n  ports:\n    - {name: tcp", "\n  ipFamilyPolicy: RequireDualStack\n  ports:\n    - {name: tcp")
}

// A gateway with the objects of a real API server and the rights that chart and operator
// give it: its key is made once; a device and an IPsec site come up from objects; what is
// missing is told in conditions; services follow their EndpointSlices. It is killed, the
// API server is killed, and no tunnel minds.
func TestGatewayOfAnAPIServer(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	a := newAPIServer(t, n)
	g := newGateway(t, n.gateway)
	g.inCluster(a)
	// The agents of an encapsulated link are another test's matter.
	a.apply(gatewayYAML("clusterTraffic: {nodeLink: Direct}") + dualStack(webYAML()) + nodeYAML)
	g.run()
	a.awaitCondition("vgw", "edge", "Ready", "True", 10*time.Second)
	a.keyIsMadeOnce(g)
	a.endpointIsTold()

	phone := a.deviceComesUp(n, g)
	s := a.siteComesUp(n)
	a.servicesFollow(phone)
	a.culvertIsKilled(n, g, s)
	a.serverIsKilled(n, s, phone)
	a.refusals(g)
	a.brokenKeyIsKept(g)
}

func (a *apiServer) keyIsMadeOnce(g *gateway) {
	a.t.Helper()
	key, err := wgtypes.ParseKey(a.field("vgw", "edge", ".status.publicKey"))
	if err != nil {
		a.t.Fatal(err)
	}
	g.public = key
	if got := a.field("secret", "culvert-edge-key", ".immutable") + " " + a.field("secret", "culvert-edge-key", ".metadata.ownerReferences[0].kind"); got != "true VPNGateway" {
		a.t.Errorf("immutable and owner of the key's Secret: %s", got)
	}
}

func (a *apiServer) endpointIsTold() {
	a.t.Helper()
	got := a.field("vgw", "edge", ".status.endpoints")
	want := fmt.Sprintf(`[{"active":true,"hostIPs":["%s"],"node":"node-1","pod":"edge-0","podIPs":["%s","fd00:10:244::10"]}]`, nodeIP, fabricIP)
	if got != want {
		a.t.Errorf("status.endpoints is\n%s, want\n%s", got, want)
	}
}

// deviceComesUp: the operator's part, address and acceptance, is the test's.
func (a *apiServer) deviceComesUp(n *network, g *gateway) *device {
	a.t.Helper()
	w := n.dialler("phone")
	d := newDevice(a.t, w.host)
	a.apply(deviceYAML("phone", d.key()))
	a.awaitCondition("device", "phone", "Programmed", "False Waiting: no key or no address yet", 5*time.Second)
	a.status("device", "phone", `{"addresses":["10.99.0.2","fd00:99::2"]}`)
	a.awaitCondition("device", "phone", "Ready", "True", 5*time.Second)
	if got := a.condition("device", "phone", "Connected"); !strings.HasPrefix(got, "False NoHandshake") {
		a.t.Errorf("before the device dials in, Connected is %q", got)
	}
	d.up(g.public, public+":51820", []string{"10.99.0.2", "fd00:99::2"})
	reaches(a.t, d.Host, "tcp", at(webService, 80), "web-", 10*time.Second)
	reaches(a.t, n.web1, "tcp", at("10.99.0.2", port), "phone", 10*time.Second)
	a.t.Logf("Connected %s after the first packet arrived", a.awaitCondition("device", "phone", "Connected", "True Connected: handshake at 20", 5*time.Second).Round(time.Millisecond))

	// An address out of the gateway's ranges, or of another device, is nobody's.
	a.apply(deviceYAML("thief", newKey(a.t).PublicKey().String()))
	a.status("device", "thief", `{"addresses":["10.99.0.2","10.244.1.10"]}`)
	a.awaitCondition("device", "thief", "Programmed", "False Duplicate: status.addresses: 10.99.0.2 is that of Device default/phone already", 5*time.Second)
	if out := n.gateway.Run("nft", "list", "table", "inet", "culvert"); strings.Contains(out, "default/thief") {
		a.t.Errorf("a device with another's address is in the firewall:\n%s", out)
	}
	a.kubectl("delete", "device", "thief")
	return d
}

const apiPSK = "a pre-shared key out of a Secret"

// siteComesUp: the right to read its Secret comes late, and so does the Secret.
func (a *apiServer) siteComesUp(n *network) *ikeDaemon {
	a.t.Helper()
	site, secret, _ := strings.Cut(pskSiteYAML("berlin", "10.10.0.0/24", apiPSK), "---\napiVersion: v1\nkind: Secret")
	a.apply(site)
	a.awaitCondition("site", "berlin", "Programmed", "False SecretNotFound: spec.ipsec.auth.presharedKeySecretRef: Secret default/berlin may not be read by this gateway", 10*time.Second)
	a.apply(grant(a.t, "berlin"))
	a.awaitCondition("site", "berlin", "Programmed", "False SecretNotFound: spec.ipsec.auth.presharedKeySecretRef: there is no Secret default/berlin: create it", 10*time.Second)
	if got := a.condition("site", "berlin", "Ready"); !strings.HasPrefix(got, "False SecretNotFound") {
		a.t.Errorf("Ready is %q", got)
	}
	a.apply("apiVersion: v1\nkind: Secret" + secret)
	took := a.awaitCondition("site", "berlin", "Ready", "True", 10*time.Second)
	a.t.Logf("Ready %s after the Secret came", took.Round(time.Millisecond))
	_, h := n.natted("berlin")
	inside(a.t, h, berlin4, berlin6)
	s := newStrongSwan(a.t, h, pskConf("berlin", "10.10.0.0/24", apiPSK))
	bothWays(a.t, n, h, false, 20*time.Second)
	a.awaitCondition("site", "berlin", "Connected", "True", 5*time.Second)
	eventually(a.t, 5*time.Second, "path and event", func() error {
		path := a.kubectl("get", "site", "berlin", "-o", "jsonpath={.status.paths[0].replica} {.status.paths[0].state}")
		events, err := a.try("get", "events", "-o", "jsonpath={range .items[*]}{.involvedObject.name} {.reason};{end}")
		if path != "edge-0 Up" || !strings.Contains(events, "berlin Connected;") {
			return fmt.Errorf("path %q, events %q (%w)", path, events, err)
		}
		return nil
	})
	return s
}

func (a *apiServer) servicesFollow(phone *device) {
	a.t.Helper()
	a.apply(sliceYAML("web", "IPv4", web2))
	took := eventually(a.t, 5*time.Second, "the service follows its EndpointSlice", func() error {
		for range 8 {
			if got, err := who(phone.Host, "udp", at(webService, 80)); err != nil || !strings.HasPrefix(got, "web-2") {
				return fmt.Errorf("%q %w", got, err)
			}
		}
		return nil
	})
	a.t.Logf("the service follows within %s", took.Round(time.Millisecond))
	a.apply(sliceYAML("web", "IPv4", web1, web2))
}

// culvertIsKilled: the IKE daemon is another process, and keeps its SAs.
func (a *apiServer) culvertIsKilled(n *network, g *gateway, s *ikeDaemon) {
	a.t.Helper()
	up, down := watchFrom(a.t, s.host, berlin4, at(web1, port), 10*time.Millisecond), watch(a.t, n.web2, at(berlin4, port), 10*time.Millisecond)
	time.Sleep(200 * time.Millisecond)
	g.kill()
	time.Sleep(500 * time.Millisecond)
	g.start()
	g.await("the successor sees the site", 20*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/berlin"); p == nil || !p.Connected || len(r.Errors) > 0 || r.Key != g.public.String() {
			return fmt.Errorf("%+v, errors %v, key %s", p, r.Errors, r.Key)
		}
		return nil
	})
	time.Sleep(500 * time.Millisecond)
	up.unharmed()
	down.unharmed()
}

// serverIsKilled: what is in effect stays; afterwards changes are followed again.
func (a *apiServer) serverIsKilled(n *network, s *ikeDaemon, phone *device) {
	a.t.Helper()
	reaches(a.t, phone.Host, "udp", at(web1, port), "web-1", 10*time.Second)
	before := n.gateway.Run("ip", "route", "show", "table", "all", "proto", "196")
	probes := []*probe{
		watchFrom(a.t, s.host, berlin4, at(web1, port), 20*time.Millisecond),
		watch(a.t, phone.Host, at(webService, 80), 20*time.Millisecond),
		watch(a.t, n.web2, at("10.99.0.2", port), 20*time.Millisecond),
	}
	a.stop()
	time.Sleep(12 * time.Second) // a resync, and polls of the Secret
	if after := n.gateway.Run("ip", "route", "show", "table", "all", "proto", "196"); after != before {
		a.t.Errorf("while the API server is away the routes are\n%s, were\n%s", after, before)
	}
	a.start()
	a.apply(deviceYAML("late", newKey(a.t).PublicKey().String()))
	a.status("device", "late", `{"addresses":["10.99.0.9"]}`)
	took := a.awaitCondition("device", "late", "Ready", "True", 20*time.Second)
	a.t.Logf("the first change after the API server's return is in effect after %s", took.Round(time.Millisecond))
	// Each kind is watched by itself, and asked for every few seconds.
	a.apply(siteYAML("late", "10.77.0.0/24", "wireguard: {publicKey: "+newKey(a.t).PublicKey().String()+"}"))
	a.awaitCondition("site", "late", "Programmed", "True", 20*time.Second)
	a.kubectl("delete", "site", "late")
	for _, p := range probes {
		p.unharmed()
	}
}

func (a *apiServer) refusals(g *gateway) {
	a.t.Helper()
	// The API server's own address, which only the gateway and the operator know of.
	a.apply(siteYAML("api", "172.21.0.0/24", "wireguard: {publicKey: "+newKey(a.t).PublicKey().String()+"}"))
	a.awaitCondition("site", "api", "Programmed", "False Overlap: spec.cidrs[0]: 172.21.0.0/24 overlaps 172.21.0.1, the API server's address", 5*time.Second)
	// Somebody else's gateway is somebody else's business.
	a.apply(strings.Replace(siteYAML("other", "10.66.0.0/24", "wireguard: {publicKey: "+newKey(a.t).PublicKey().String()+"}"), "{name: edge}", "{name: nowhere}", 1))
	time.Sleep(time.Second)
	if got := a.field("site", "other", ".status"); got != "" {
		a.t.Errorf("the status of another gateway's site is %s", got)
	}
	r, err := g.report()
	if err != nil || problem(r, "Site default/other") != nil || problem(r, "Site default/api") == nil {
		a.t.Errorf("problems: %+v, %v", r.Problems, err)
	}
	a.kubectl("delete", "site", "api", "other")
}

// brokenKeyIsKept: a key that cannot be read is told, and never replaced.
func (a *apiServer) brokenKeyIsKept(g *gateway) {
	a.t.Helper()
	g.stop()
	a.kubectl("delete", "secret", "culvert-edge-key")
	a.kubectl("create", "secret", "generic", "culvert-edge-key", "--from-literal=private-key=nonsense")
	g.start()
	g.await("the broken key is told", 10*time.Second, func(r *culvert.Report) error {
		if msg := r.Errors["plan"]; !strings.Contains(msg, "Secret default/culvert-edge-key") || !strings.Contains(msg, "restore the Secret from a backup") {
			return fmt.Errorf("errors %v", r.Errors)
		}
		return nil
	})
	if got := a.field("secret", "culvert-edge-key", ".data.private-key"); got != "bm9uc2Vuc2U=" {
		a.t.Errorf("the Secret now holds %s", got)
	}
	log, err := os.ReadFile(filepath.Join(g.dir, "gateway.log"))
	if err != nil || strings.Contains(string(log), "nonsense") || strings.Contains(string(log), apiPSK) {
		a.t.Errorf("the log holds a secret (%v)", err)
	}
}
