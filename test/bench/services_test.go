package bench

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// servicesIP is the service that is measured; the others are there to be looked through.
const servicesIP = "10.96.0.80"

// serving is a way from a site, through a tunnel, to a service address and to its pod.
type serving struct {
	*reversal
	node   *labtest.Host    // of the gateway and the pods
	change func(pod string) // leads the service to another pod
	// insist: one change right behind another may be lost, and is made again.
	insist bool
}

func servicePath(brief bool) *suite {
	start := func(name, mode string, services int) contender {
		return contender{name: name, ours: mode != "", start: func(t *testing.T, l *labtest.Lab) candidate {
			return newServing(t, l, name, mode, services, brief)
		}}
	}
	haproxy := func(services int, name string) contender {
		c := start("HAProxy, TCP, "+name+" services", "", services)
		c.absent = needs("haproxy")
		return c
	}
	s := &suite{
		name: "services", title: "Services: site → tunnel → service address → pod", against: "Translate, 10 services",
		metrics: []metric{
			{name: "one stream", unit: "Gbit/s"}, {name: "new connections", unit: "1/s"}, {name: "first byte", unit: "ms", less: true}, {name: "first byte p99", unit: "ms", less: true}, {name: "an endpoint changes", unit: "ms", less: true},
		},
		glances:    25,
		contenders: []contender{start("Translate, 10 services", "Translate", 10), start("Proxy, 10 services", "Proxy", 10), haproxy(10, "10")},
	}
	if brief {
		s.glances = 1
	} else {
		s.contenders = append(s.contenders, start("Route, kube-proxy, 10 services", "Route", 10), start("Translate, 1,000 services", "Translate", 1000), start("Translate, 10,000 services", "Translate", 10000),
			start("Proxy, 1,000 services", "Proxy", 1000), start("Proxy, 10,000 services", "Proxy", 10000), haproxy(1000, "1,000"), haproxy(10000, "10,000"),
			start("Route, kube-proxy, 1,000 services", "Route", 1000), start("Route, kube-proxy, 10,000 services", "Route", 10000))
	}
	return s
}

// Where the pods' side is: the gateway is a pod like the others, and its node stands between.
const (
	nodeIP    = "172.30.0.11"
	gatewayIP = "10.50.1.10"
	secondPod = "10.50.0.2"
)

// newServing builds
//
//	site ─ WireGuard ─ gateway ─ node ─ pod
//
// with the same hops for everybody: who turns the service's address into a pod's, the gateway
// or the node, is what is compared.
func newServing(t *testing.T, l *labtest.Lab, name, mode string, services int, brief bool) *serving {
	t.Helper()
	n := hosts.Add(1)
	pod := l.Host(fmt.Sprintf("pod%d", n))
	s := &serving{reversal: &reversal{name: name, brief: brief}, node: l.Host(fmt.Sprintf("node%d", n))}
	s.pair = &pair{t: t, a: l.Host(fmt.Sprintf("site%d", n)), b: l.Host(fmt.Sprintf("gateway%d", n)), dir: shortDir(t), from: innerA, to: innerB}
	l.Connect(s.a, "eth0", outerA+"/24", s.b, "eth0", outerB+"/24")
	l.Connect(s.b, "pods", gatewayIP+"/24", s.node, "gateway", "10.50.1.1/24")
	l.Connect(s.node, "pods", "10.50.0.254/24", pod, "eth0", targetIP+"/24 "+secondPod+"/24")
	s.b.IP("route", "add", "default", "via", "10.50.1.1")
	pod.IP("route", "add", "default", "via", "10.50.0.254")
	s.node.IP("addr", "add", nodeIP+"/32", "dev", "lo")
	s.node.IP("route", "add", innerA+"/32", "via", gatewayIP)
	s.node.Sysctl("net/ipv4/ip_forward", "1")
	s.b.Sysctl("net/ipv4/ip_forward", "1")

	ends := s.ends()
	for i, e := range ends {
		e.host.IP("addr", "add", e.own+"/32", "dev", "lo")
		site := fmt.Sprintf("  wireguard: {publicKey: %s, endpoint: %q}\n", ends[1-i].key.PublicKey(), e.towards+":51820")
		cluster, cidrs, traffic := "{podCIDRs: [10.200.0.0/16]}", "10.50.0.0/16, 10.96.0.0/12", ""
		if e.name == "b" {
			cluster, cidrs, traffic = "{podCIDRs: [10.50.0.0/16], serviceCIDRs: [10.96.0.0/12]}", e.peer+"/32", clusterTraffic(mode)
			if mode == "" {
				cluster = "{podCIDRs: [10.50.0.0/16], nodeCIDRs: [" + servicesIP + "/32]}"
			}
		}
		s.write(e.name+"/manifests/all.yaml", "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: bench, namespace: default}\nspec:\n  cluster: "+cluster+"\n  expose: {type: None}\n"+traffic+
			"---\napiVersion: culvert.dev/v1alpha1\nkind: Site\nmetadata: {name: peer, namespace: default}\nspec:\n  gatewayRef: {name: bench}\n  cidrs: ["+cidrs+"]\n  access: {to: [Pods, Services, Nodes]}\n"+site)
		s.write(e.name+"/state/wireguard.key", e.key.String()+"\n")
	}
	switch mode {
	case "":
		s.haproxy(services)
	case "Route":
		s.proxied(services)
	default:
		s.translated(services)
	}
	for i, e := range ends {
		s.program(e.host, culvert, "gateway", "--manifests", s.path(e.name+"/manifests"), "--state", s.path(e.name+"/state"), "--http", "127.0.0.1:9586", "--log-level", "warn")
		labtest.Eventually(t, 60*time.Second, "the gateway is ready", func() error { return ready(e.host) })
		if i == 0 {
			e.host.IP("route", "add", "10.96.0.0/12", "dev", "cvtwg0", "src", e.own, "metric", "5000")
		}
	}
	s.connect = func() (net.Conn, error) {
		var c net.Conn
		err := s.a.Host.Do(func() (err error) {
			d := net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(innerA)}}
			c, err = d.Dial("tcp", servicesIP+":80")
			return err
		})
		return c, err
	}
	s.serveAt(pod, targetIP+":7000", 'h')
	s.serveAt(pod, secondPod+":7000", 'i')
	labtest.Eventually(t, 3*time.Minute, "a way to the service by "+name, func() error {
		c, _, err := s.open()
		if err == nil {
			err = c.Close()
		}
		return err
	})
	return s
}

// clusterTraffic is a gateway's way to reach services; empty: it does not serve them.
func clusterTraffic(mode string) string {
	switch mode {
	case "":
		return ""
	case "Route": // answers would not come back through the node otherwise
		return "  clusterTraffic: {services: Route, source: Masquerade}\n"
	}
	return "  clusterTraffic: {services: " + mode + "}\n"
}

// haproxy has the gateway's host answer for the services.
func (s *serving) haproxy(services int) {
	var others strings.Builder
	for i := range services - 1 {
		fmt.Fprintf(&others, "listen other-%d\n  bind %s:80\n  server pod %s:7000\n", i, otherService(i), targetIP)
	}
	conf := func(pod string) {
		s.write("haproxy.cfg", "global\n  maxconn 4000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\nlisten web\n  bind "+servicesIP+":80\n  server pod "+pod+":7000\n"+others.String())
	}
	conf(targetIP)
	s.b.IP("route", "add", "local", "10.96.0.0/12", "dev", "lo") // all of them can be bound to
	cmd, _ := s.b.Background("haproxy", "-W", "-db", "-f", s.path("haproxy.cfg"))
	s.pids = append(s.pids, cmd.Process.Pid)
	s.insist = true
	s.change = func(pod string) {
		conf(pod)
		s.b.Run("kill", "-USR2", fmt.Sprint(cmd.Process.Pid))
	}
}

// translated gives the gateway the services.
func (s *serving) translated(services int) {
	text := func(objects ...any) string {
		var b strings.Builder
		for _, o := range objects {
			y, err := yaml.Marshal(o)
			if err != nil {
				s.t.Fatal(err)
			}
			b.WriteString("---\n" + string(y))
		}
		return b.String()
	}
	var all strings.Builder
	for i := range services - 1 {
		name := fmt.Sprintf("other-%d", i)
		all.WriteString(text(clusterService(name, otherService(i)), endpointSlice(name, targetIP, 1)))
	}
	s.write("b/manifests/others.yaml", all.String())
	s.write("b/manifests/service.yaml", text(clusterService("web", servicesIP)))
	s.change = func(pod string) { s.replace("b/manifests/endpoints.yaml", text(endpointSlice("web", pod, 1))) }
	s.change(targetIP)
}

// open is reversal's, and says which pod answered.
func (s *serving) open() (net.Conn, byte, error) {
	c, err := s.connect()
	if err != nil {
		return nil, 0, err
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	var b [1]byte
	if _, err := c.Read(b[:]); err != nil {
		_ = c.Close()
		return nil, 0, err
	}
	return c, b[0], nil
}

func (s *serving) glance(t *testing.T) figures { return s.connections(t, 20) }

func (s *serving) measure(t *testing.T) figures {
	t.Helper()
	out := figures{}
	n, size := 500, int64(256<<20)
	if s.brief {
		n, size = 20, 16<<20
	}
	out["first byte p99"] = quantile(s.latencies(t, n), 0.99)
	seconds, err := s.download(1, size)
	if err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
	out["one stream"] = float64(size) * 8 / seconds / 1e9
	var changes []float64
	for begin := time.Now(); len(changes) == 0 || !s.brief && len(changes) < 3 && time.Since(begin) < 4*time.Second; {
		if !s.brief {
			time.Sleep(1100 * time.Millisecond) // kube-proxy lets a second pass between two changes
		}
		changes = append(changes, s.moves(t)) // some take seconds
	}
	out["an endpoint changes"] = median(changes)
	return out
}

// moves is how long after a change the first connection reaches the other pod.
func (s *serving) moves(t *testing.T) float64 {
	t.Helper()
	begin := time.Now()
	s.change(secondPod)
	for {
		c, who, err := s.open()
		if err == nil {
			_ = c.Close()
			if who == 'i' {
				break
			}
		}
		if time.Since(begin) > 2*time.Minute { // kube-proxy among 10,000 services
			t.Fatalf("%s: two minutes after the change %q answers, %v", s.name, who, err)
		}
		time.Sleep(time.Millisecond)
	}
	took := time.Since(begin).Seconds() * 1e3
	s.change(targetIP)
	changed := time.Now()
	labtest.Eventually(t, 2*time.Minute, "the first pod answers again", func() error {
		c, err := s.reversal.open()
		if err == nil {
			return c.Close()
		}
		if s.insist && time.Since(changed) > 2*time.Second {
			s.change(targetIP)
			changed = time.Now()
		}
		return err
	})
	return took
}
