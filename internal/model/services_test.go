package model

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

const serviceGateway = `
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: gw}
spec: {cluster: {podCIDRs: [10.244.0.0/16, "fd00:10:244::/48"], serviceCIDRs: [10.96.0.0/12, "fd00:10:96::/112"]}}
`

// TestServices checks which endpoints are chosen.
func TestServices(t *testing.T) {
	const web = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
	slice := func(name, body string) string {
		return "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: " + name +
			", labels: {kubernetes.io/service-name: web}}\n" + body + "\n"
	}
	v4 := func(endpoints string) string {
		return slice("web-1", "addressType: IPv4\nports: [{name: '', port: 8080}]\nendpoints: ["+endpoints+"]")
	}
	const plain = web + "spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}\n"
	for _, c := range []struct {
		name, manifests, want string
	}{
		{"no slice: no endpoint", plain, "default/web 10.96.0.10:80/tcp"},
		{"ready, sorted, once", plain + v4(`{addresses: [10.244.0.3]}, {addresses: [10.244.0.2], conditions: {ready: true}}, {addresses: [10.244.0.3]}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080 10.244.0.3:8080"},
		{"not ready is left out", plain + v4(`{addresses: [10.244.0.3], conditions: {ready: false}}, {addresses: [10.244.0.2]}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080"},
		{"serving and terminating, when none is ready", plain + v4(`{addresses: [10.244.0.3], conditions: {ready: false, serving: true, terminating: true}}, {addresses: [10.244.0.2], conditions: {ready: false, serving: false, terminating: true}}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.3:8080"},
		{"terminating is not used while one is ready", plain + v4(`{addresses: [10.244.0.3], conditions: {ready: false, serving: true, terminating: true}}, {addresses: [10.244.0.2]}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080"},
		{"publishNotReadyAddresses", web + "spec: {clusterIP: 10.96.0.10, publishNotReadyAddresses: true, ports: [{port: 80}]}\n" + v4(`{addresses: [10.244.0.3], conditions: {ready: false}}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.3:8080"},
		{"headless, and without an address", web + "spec: {clusterIP: None, ports: [{port: 80}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: other}\nspec: {ports: [{port: 80}]}\n", ""},
		{"external name", web + "spec: {type: ExternalName, externalName: example.com, clusterIP: 10.96.0.10, ports: [{port: 80}]}\n", ""},
		{"both families, protocols, named ports", web + `spec:
  clusterIPs: [10.96.0.10, "fd00:10:96::10"]
  ports: [{name: dns, port: 53, protocol: UDP, targetPort: named}, {name: sig, port: 3868, protocol: SCTP}]
` + slice("a", `addressType: IPv4
ports: [{name: sig, protocol: SCTP, port: 3868}, {name: dns, protocol: UDP, port: 5353}]
endpoints: [{addresses: [10.244.0.2]}]`) + slice("b", `addressType: IPv6
ports: [{name: dns, protocol: UDP, port: 5353}]
endpoints: [{addresses: ["fd00:10:244::2"]}]`),
			"default/web:dns 10.96.0.10:53/udp 10.244.0.2:5353 | default/web:sig 10.96.0.10:3868/sctp 10.244.0.2:3868 | " +
				"default/web:dns [fd00:10:96::10]:53/udp [fd00:10:244::2]:5353 | default/web:sig [fd00:10:96::10]:3868/sctp"},
		{"slices are joined; each has its own number", plain + v4(`{addresses: [10.244.0.2]}`) + slice("web-2", "addressType: IPv4\nports: [{name: '', port: 9090}]\nendpoints: [{addresses: [10.244.0.2]}]"),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080 10.244.0.2:9090"},
		{"internalTrafficPolicy Local", web + "spec: {clusterIP: 10.96.0.10, internalTrafficPolicy: Local, ports: [{port: 80}]}\n" + v4(`{addresses: [10.244.0.2], nodeName: n1}, {addresses: [10.244.0.3], nodeName: n2}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080"},
		{"Local without a local one", web + "spec: {clusterIP: 10.96.0.10, internalTrafficPolicy: Local, ports: [{port: 80}]}\n" + v4(`{addresses: [10.244.0.3], nodeName: n2}`),
			"default/web 10.96.0.10:80/tcp"},
		{"zone hints", plain + v4(`{addresses: [10.244.0.2], hints: {forZones: [{name: z1}]}}, {addresses: [10.244.0.3], hints: {forZones: [{name: z2}]}}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080"},
		{"zone hints that not all have", plain + v4(`{addresses: [10.244.0.2], hints: {forZones: [{name: z1}]}}, {addresses: [10.244.0.3]}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080 10.244.0.3:8080"},
		{"zone hints for others", plain + v4(`{addresses: [10.244.0.2], hints: {forZones: [{name: z3}]}}, {addresses: [10.244.0.3], hints: {forZones: [{name: z2}]}}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080 10.244.0.3:8080"},
		{"node hints before zone hints", plain + v4(`{addresses: [10.244.0.2], hints: {forNodes: [{name: n1}], forZones: [{name: z1}]}}, {addresses: [10.244.0.3], hints: {forNodes: [{name: n2}], forZones: [{name: z1}]}}`),
			"default/web 10.96.0.10:80/tcp 10.244.0.2:8080"},
		{"affinity, default", web + "spec: {clusterIP: 10.96.0.10, sessionAffinity: ClientIP, ports: [{port: 80}]}\n", "default/web 10.96.0.10:80/tcp affinity 10800"},
		{"affinity", web + "spec: {clusterIP: 10.96.0.10, sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}, ports: [{port: 80}]}\n", "default/web 10.96.0.10:80/tcp affinity 60"},
		{"another service's slice", plain + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: x, labels: {kubernetes.io/service-name: other}}\naddressType: IPv4\nports: [{name: '', port: 1}]\nendpoints: [{addresses: [10.244.0.9]}]\n",
			"default/web 10.96.0.10:80/tcp"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := Parse(read(t, serviceGateway+"---\n"+c.manifests), ParseOptions{NodeName: "n1", Zone: "z1"})
			if len(m.Problems) > 0 {
				t.Errorf("problems: %v", m.Problems)
			}
			var got []string
			for _, p := range m.Gateways[0].Ports {
				s := fmt.Sprintf("%s %s/%s", p.Name, addrPort(p), p.Protocol)
				for _, e := range p.Endpoints {
					s += " " + e.String()
				}
				if p.AffinitySeconds != 0 {
					s += fmt.Sprintf(" affinity %d", p.AffinitySeconds)
				}
				got = append(got, s)
			}
			if g := strings.Join(got, " | "); g != c.want {
				t.Errorf("\n got %s\nwant %s", g, c.want)
			}
			if !slices.IsSortedFunc(m.Gateways[0].Ports, netstate.CompareServicePorts) {
				t.Error("ports are not sorted")
			}
		})
	}
}

func addrPort(p netstate.ServicePort) string {
	if p.Address.Is6() {
		return fmt.Sprintf("[%s]:%d", p.Address, p.Port)
	}
	return fmt.Sprintf("%s:%d", p.Address, p.Port)
}

// manyServices are n services with three endpoints each.
func manyServices(n int) Objects {
	var objects Objects
	name, port := "", int32(8080)
	for i := range n {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("svc-%d", i)}}
		svc.Spec.ClusterIP = fmt.Sprintf("10.96.%d.%d", i/250, i%250+1)
		svc.Spec.Ports = []corev1.ServicePort{{Port: 80}}
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: svc.Name + "-x", Labels: map[string]string{discoveryv1.LabelServiceName: svc.Name}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		}
		for e := range 3 {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.244.%d.%d", i/80, i%80*3+e+1)}})
		}
		objects.Add(Decoded{Object: svc})
		objects.Add(Decoded{Object: slice})
	}
	return objects
}

func TestTenThousandServicesAreQuick(t *testing.T) {
	objects := manyServices(10000)
	for _, d := range read(t, serviceGateway).All() {
		objects.Add(d)
	}
	best := time.Hour
	for range 5 {
		start := time.Now()
		m := Parse(objects, ParseOptions{})
		best = min(best, time.Since(start))
		if len(m.Problems) > 0 || len(m.Gateways[0].Ports) != 10000 {
			t.Fatalf("%d ports, problems %v", len(m.Gateways[0].Ports), m.Problems)
		}
	}
	t.Logf("10,000 services with 3 endpoints: %s", best.Round(time.Millisecond))
	if best > 100*time.Millisecond {
		t.Errorf("parse took %s, want at most 100ms", best)
	}
}

func BenchmarkServices10000(b *testing.B) {
	objects := manyServices(10000)
	for b.Loop() {
		Parse(objects, ParseOptions{})
	}
}
