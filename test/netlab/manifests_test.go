package netlab

import (
	"fmt"
	"strings"
)

// gatewayYAML is the VPNGateway of all tests; extra are further lines of its spec.
func gatewayYAML(extra ...string) string {
	return `apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: default}
spec:
  cluster:
    podCIDRs: [10.244.0.0/16, "fd00:10:244::/48"]
    serviceCIDRs: [10.96.0.0/16, "fd00:10:96::/112"]
    nodeCIDRs: [172.20.0.0/24]
  deviceCIDRs: [10.99.0.0/20, "fd00:99::/64"]
  expose: {address: ` + public + `}
` + spec(extra)
}

// object is the beginning of a manifest of ours.
func object(kind, name string) string {
	return fmt.Sprintf("---\napiVersion: culvert.dev/v1alpha1\nkind: %s\nmetadata: {name: %s, namespace: default}\nspec:\n  gatewayRef: {name: edge}\n", kind, name)
}

func spec(lines []string) string {
	var b strings.Builder
	for _, l := range lines {
		b.WriteString("  " + l + "\n")
	}
	return b.String()
}

// deviceYAML is a Device; extra are further lines of its spec.
func deviceYAML(name, publicKey string, extra ...string) string {
	return object("Device", name) + spec(append([]string{"publicKey: " + publicKey}, extra...))
}

// siteYAML is a Site; extra are further lines of its spec.
func siteYAML(name, cidrs string, extra ...string) string {
	return object("Site", name) + spec(append([]string{"cidrs: [" + cidrs + "]"}, extra...))
}

// pskSiteYAML is an IPsec site that dials in, with its Secret.
func pskSiteYAML(name, cidrs, psk string, extra ...string) string {
	return siteYAML(name, cidrs, append(extra, fmt.Sprintf("ipsec: {localID: vpn.example.com, remoteID: %s.example.com, dpdDelaySeconds: 2, auth: {presharedKeySecretRef: {name: %s, key: psk}}}", name, name))...) +
		secretYAML(name, "psk", psk)
}

func secretYAML(name, key, value string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: default}\nstringData: {%s: %q}\n", name, key, value)
}

// serviceYAML is a Service "name" on port 80, TCP and UDP, with one address per family.
func serviceYAML(name string, addresses []string, extra ...string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: default}
spec:
  clusterIP: %q
  clusterIPs: ["%s"]
  ports:
    - {name: tcp, protocol: TCP, port: 80, targetPort: %d}
    - {name: udp, protocol: UDP, port: 80, targetPort: %d}
`, name, addresses[0], strings.Join(addresses, `", "`), port, port) + spec(extra)
}

// sliceYAML is an EndpointSlice of a service.
func sliceYAML(service, family string, addresses ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: %s-%s
  namespace: default
  labels: {kubernetes.io/service-name: %s}
addressType: %s
ports:
  - {name: tcp, protocol: TCP, port: %d}
  - {name: udp, protocol: UDP, port: %d}
`, service, strings.ToLower(family), service, family, port, port)
	if len(addresses) == 0 {
		return b.String() + "endpoints: []\n"
	}
	b.WriteString("endpoints:\n")
	for _, a := range addresses {
		fmt.Fprintf(&b, "  - {addresses: [%q], conditions: {ready: true}}\n", a)
	}
	return b.String()
}

const (
	webService   = "10.96.0.80"
	webServiceV6 = "fd00:10:96::80"
)

// webYAML is the service "web" with both pods behind it, in both families.
func webYAML() string {
	return serviceYAML("web", []string{webService, webServiceV6}) + sliceYAML("web", "IPv4", web1, web2) + sliceYAML("web", "IPv6", web1v6, web2v6)
}
