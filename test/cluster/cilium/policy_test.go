package cilium_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// policies name ranges of sites and devices, and must see them as they are.
var policies = []struct {
	name, kind, spec string
	ingress          bool   // whom it is about: who comes in, or where pods go
	allowed, denied  string // "site", "device"
}{
	{"ipBlock of the site, in", "NetworkPolicy", `policyTypes: [Ingress], ingress: [{from: [{ipBlock: {cidr: 10.50.0.0/24}}]}]`, true, "site", "device"},
	{"ipBlock of the devices, in", "NetworkPolicy", `policyTypes: [Ingress], ingress: [{from: [{ipBlock: {cidr: 10.99.0.0/24}}]}]`, true, "device", "site"},
	{"ipBlock of the site, out", "NetworkPolicy", `policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.50.0.0/24}}]}]`, false, "site", "device"},
	{"ipBlock except the site, out", "NetworkPolicy", `policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.50.0.0/24]}}]}]`, false, "device", "site"},
	{"fromCIDR of the site", "CiliumNetworkPolicy", `ingress: [{fromCIDR: [10.50.0.0/24]}]`, true, "site", "device"},
	{"fromCIDR denied", "CiliumNetworkPolicy", `ingress: [{fromEntities: [all]}], ingressDeny: [{fromCIDR: [10.99.0.0/24]}]`, true, "site", "device"},
	{"toCIDR of the devices", "CiliumNetworkPolicy", `egress: [{toCIDR: [10.99.0.0/24]}]`, false, "device", "site"},
	{"toCIDR denied", "CiliumNetworkPolicy", `egress: [{toEntities: [all]}], egressDeny: [{toCIDR: [10.50.0.0/24]}]`, false, "device", "site"},
}

// policiesSee: both kinds of policies match sites and devices by their ranges, in both
// directions, allow and deny, on the gateway's node and the other. One about who comes in and
// one about where pods go are there at a time: neither has a say in the other's direction.
func (w *world) policiesSee(t *testing.T) {
	var group sync.WaitGroup
	for name, ingress := range map[string]bool{"in": true, "out": false} {
		group.Go(func() { w.policiesOf(t, "sites-"+name, ingress) })
	}
	group.Wait()
	works(t, 30*time.Second, w.flows())
}

// policiesOf applies those of one direction, one after the other.
func (w *world) policiesOf(t *testing.T, name string, ingress bool) {
	for _, p := range policies {
		if p.ingress != ingress {
			continue
		}
		t.Run(p.name, func(t *testing.T) {
			api, selector := "networking.k8s.io/v1", "podSelector: {matchLabels: {app: web}}"
			if p.kind == "CiliumNetworkPolicy" {
				api, selector = "cilium.io/v2", "endpointSelector: {matchLabels: {app: web}}"
			}
			w.In(t).Apply(fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: %s, namespace: apps}\nspec: {%s, %s}\n", api, p.kind, name, selector, p.spec))
			defer w.In(t).Kubectl("-n", "apps", "delete", p.kind, name)
			labtest.Eventually(t, 40*time.Second, "it holds", func() error {
				if err := each(w.of(p.denied, p.ingress), flow.never); err != nil {
					return err
				}
				return each(w.of(p.allowed, p.ingress), flow.try)
			})
		})
	}
}

// of are the flows between both pods and the site or the device.
func (w *world) of(who string, ingress bool) []flow {
	var out []flow
	for _, n := range w.Nodes {
		pod, ip := "web-"+n.Name, w.pods[n.Name][0]
		switch {
		case ingress && who == "site":
			out = append(out, w.get("site → "+pod, w.site, siteHost, url(ip), siteHost+" "))
		case ingress:
			out = append(out, w.get("device → "+pod, w.device, deviceIP, url(ip), deviceIP+" "))
		case who == "site":
			out = append(out, w.fromPod(pod, siteHost, ip))
		default:
			out = append(out, w.fromPod(pod, deviceIP, ip))
		}
	}
	return out
}
