package jobs_test

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

// foreign is a Site in a namespace that the gateway does not allow, and one with a range
// that another gateway does not allow.
const foreign = `---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: narrow, namespace: vpn}
spec:
  expose: {type: None}
  allowedSites:
  - namespaces: [vpn]
    cidrs: [10.60.0.0/16]
---
apiVersion: v1
kind: Secret
metadata: {name: berlin, namespace: strangers}
stringData: {psk: "of no use"}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: intruder, namespace: strangers}
spec:
  gatewayRef: {name: hq, namespace: vpn}
  cidrs: [10.66.0.0/24]
  ipsec: {remoteID: intruder.example.com, auth: {presharedKeySecretRef: {name: berlin, key: psk}}}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: wide, namespace: vpn}
spec:
  gatewayRef: {name: narrow}
  cidrs: [10.67.0.0/24]
  wireguard: {publicKey: 5xLIKXt5YmxCH1DssNwiktyAkiMZoCiQfTRY8KSUaRU=}
`

// foreignNamespaces: what a gateway's allowedSites do not allow is refused with a reason, and
// nothing of it is in effect anywhere; nobody else notices.
func (s *site) foreignNamespaces() {
	s.Namespace("strangers")
	site, phone := s.watch(s.other())
	s.Apply(foreign)
	for _, x := range [][3]string{{"strangers", "intruder", "NotAllowed"}, {"vpn", "wide", "NotAllowed"}} {
		labtest.Eventually(s.t, 20*time.Second, "Site "+x[1]+" is refused", func() error {
			out, err := s.TryKubectl("-n", x[0], "get", "site", x[1], "-o",
				`jsonpath={.status.conditions[?(@.type=="Accepted")].status} {.status.conditions[?(@.type=="Accepted")].reason} {.status.conditions[?(@.type=="Accepted")].message}`)
			if err == nil && (!strings.HasPrefix(out, "False "+x[2]+" ") || !strings.Contains(out, "allowedSites")) {
				err = fmt.Errorf("Accepted is %s", out)
			}
			return err
		})
	}
	intruder := s.OutsideHost("intruder", "198.18.1.30/15")
	ike := strongswan.New(s.t, intruder, strings.NewReplacer("berlin.example.com", "intruder.example.com", siteCIDR, "10.66.0.0/24", sitePSK, "of no use").
		Replace(fmt.Sprintf(siteConf, s.Kubectl("-n", "vpn", "get", "vpngateway", "hq", "-o", "jsonpath={.status.address}"))))
	if out, err := ike.Swanctl("--initiate", "--child", "net", "--timeout", "3"); err == nil {
		s.t.Errorf("a Site that is refused has a tunnel: %s", out)
	}
	if out, err := ike.Swanctl("--list-sas"); err != nil || strings.Contains(out, "ESTABLISHED") {
		s.t.Errorf("a Site that is refused has SAs (%v): %s", err, out)
	}
	for i := range s.Nodes {
		s.holdsNot("node "+s.Nodes[i].Name, func(args ...string) (string, error) { return s.Nodes[i].Run(s.t.Context(), args[0], args[1:]...) })
	}
	s.holdsNot("gateway", func(args ...string) (string, error) { return s.Exec("vpn", "culvert-hq-0", args...) })
	if out, err := s.TryKubectl("-n", "strangers", "get", "roles,rolebindings", "-o", "name"); err != nil || out != "" {
		s.t.Errorf("rights were given for a Site that is refused: %s (%v)", out, err)
	}
	if out, err := s.TryKubectl("auth", "can-i", "get", "secret/berlin", "-n", "strangers", "--as=system:serviceaccount:vpn:culvert-hq"); err == nil {
		s.t.Errorf("the gateway may read the Secret of a Site that is refused: %s", out)
	}
	site.Unharmed()
	phone.Unharmed()
	s.Kubectl("-n", "vpn", "delete", "site/wide", "vpngateway/narrow")
}

// holdsNot wants no trace of the refused ranges in routes, rules and tables.
func (s *site) holdsNot(where string, run func(args ...string) (string, error)) {
	s.t.Helper()
	for _, command := range [][]string{{"ip", "route", "show", "table", "all"}, {"nft", "list", "ruleset"}} {
		out, err := run(command...)
		if err != nil {
			s.t.Errorf("%s: %v", where, err)
		}
		for _, cidr := range []string{"10.66.0.", "10.67.0."} {
			if strings.Contains(out, cidr) {
				s.t.Errorf("%s: %s is in %q", where, cidr, command)
			}
		}
		if !strings.Contains(out, "10.50.0.") {
			s.t.Errorf("%s: %q does not even have the site that is allowed", where, command)
		}
	}
}

// modes are the ways of services and sources beside Translate and Preserve, which all the
// other tests have.
func (s *site) modes() {
	for _, m := range []struct {
		services, source string
		podsSee, webSees string // site or gateway
	}{
		{"Proxy", "Preserve", "site", "gateway"},
		{"Proxy", "Masquerade", "gateway", "gateway"},
		{"Route", "Masquerade", "gateway", "gateway"},
		{"Translate", "Masquerade", "gateway", "gateway"},
	} {
		began := time.Now()
		s.Kubectl("-n", "vpn", "patch", "vpngateway", "hq", "--type=merge", "-p",
			fmt.Sprintf(`{"spec":{"clusterTraffic":{"services":%q,"source":%q}}}`, m.services, m.source))
		seen := map[string]string{"site": siteHost, "gateway": s.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.status.podIP}")}
		what := m.services + " and " + m.source
		labtest.Eventually(s.t, 20*time.Second, what+": the service is reached", func() error { return s.serviceSees(seen[m.webSees]) })
		s.reachesPods(seen[m.podsSee], 10*time.Second)
		s.reachesService(seen[m.webSees])
		s.reachesName()
		s.movesMegabytes()
		if m.services != "Route" {
			s.refusesNothing()
		}
		s.t.Logf("%s: %s", what, time.Since(began).Round(every))
	}
}

func (s *site) serviceSees(address string) error {
	out, err := s.get("http://" + s.web + "/")
	if err == nil && !strings.HasPrefix(out, "client="+address+" ") {
		err = fmt.Errorf("answer %q, want client=%s", out, address)
	}
	return err
}

// reachesName asks the cluster's DNS over UDP and TCP.
func (s *site) reachesName() {
	s.t.Helper()
	for _, how := range []string{"+notcp", "+tcp"} {
		out, err := s.host.Try("dig", "-b", siteHost, "+time=2", "+tries=3", "+short", how, "@"+cluster.DNS[0].String(), "web.jobs.svc.cluster.local")
		if err != nil || strings.TrimSpace(out) != s.web {
			s.t.Errorf("a DNS query %s: answer %q (%v), want %s", how, out, err, s.web)
		}
	}
}

// movesMegabytes gets 10 MB from the service and sends as many, and wants them counted and hashed right.
func (s *site) movesMegabytes() {
	s.t.Helper()
	const size = 10 << 20
	sum, err := s.host.Try(s.TestServer(), "hash", fmt.Sprintf("http://%s/bytes?n=%d", s.web, size))
	if err != nil {
		s.t.Fatalf("10 MB from the service: %v", err)
	}
	if out, err := s.host.Try(s.TestServer(), "send", "http://"+s.web+"/sink", fmt.Sprint(size)); err != nil || out != sum {
		s.t.Errorf("10 MB to the service: %q (%v), want %q", out, err, sum)
	}
}

// refusesNothing: a service address without a service is refused at once.
func (s *site) refusesNothing() {
	s.t.Helper()
	began := time.Now()
	if out, err := s.get("http://10.96.200.200/"); err == nil {
		s.t.Errorf("a service address that nobody has answers %q", out)
	} else if took := time.Since(began); took > 1500*time.Millisecond {
		s.t.Errorf("a service address that nobody has is refused after %s, want at once: %v", took.Round(every), errors.Unwrap(err))
	}
}
