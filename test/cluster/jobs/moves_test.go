package jobs_test

import (
	"fmt"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// every is the time between two packets of a watch.
const every = 100 * time.Millisecond

// watch sends ten packets a second from the site and from the device to a pod.
func (s *site) watch(node string) (site, phone *clustertest.Probe) {
	s.t.Helper()
	to := s.pods[node] + ":8081"
	site = clustertest.Watch(s.t, s.host.Host, siteHost, to, every)
	phone = clustertest.Watch(s.t, s.phone.Host.Host, s.phone.Address, to, every)
	time.Sleep(time.Second)
	return site, phone
}

// identity is what no peer may have to learn anew.
func (s *site) identity() string {
	s.t.Helper()
	return s.Kubectl("-n", "vpn", "get", "vpngateway", "hq", "-o", "jsonpath={.status.publicKey} {.status.address} ") +
		s.Kubectl("-n", "vpn", "get", "device", "phone", "-o", "jsonpath={.status.addresses}")
}

// back waits until the traffic of both flows again after an event, and says how long that took.
func (s *site) back(site, phone *clustertest.Probe, event time.Time) (forSite, forPhone time.Duration) {
	s.t.Helper()
	forPhone, forSite = phone.AwaitBack(event, time.Minute), site.AwaitBack(event, time.Minute)
	s.t.Logf("the device is back after %s, the site after %s", forPhone.Round(every), forSite.Round(every))
	return forSite, forPhone
}

// podDeleted: the load balancer leaves addresses alone, so that the gateway's next pod knows
// where the device was last seen and calls it. The best of three deletions counts: a neighbour on the
// machine may spoil one.
func (s *site) podDeleted() {
	const limitSite, limitPhone = 15 * time.Second, 10 * time.Second
	before := s.identity()
	var forSite, forPhone time.Duration
	for range 3 {
		site, phone := s.watch(s.other())
		event := time.Now()
		s.Kubectl("-n", "vpn", "delete", "pod", "culvert-hq-0", "--wait=false")
		forSite, forPhone = s.back(site, phone, event)
		s.awaitGateway()
		if forSite <= limitSite && forPhone <= limitPhone {
			break
		}
		s.settle(site, phone)
	}
	if forSite > limitSite || forPhone > limitPhone {
		s.t.Errorf("the site is back after %s, want at most %s; the device after %s, want at most %s",
			forSite.Round(every), limitSite, forPhone.Round(every), limitPhone)
	}
	if after := s.identity(); after != before {
		s.t.Errorf("key and addresses were %s and are %s", before, after)
	}
}

// drained evicts everything from the gateway's node, as kubectl does it: the disruption
// budgets are asked.
func (s *site) drained() {
	before, node, other := s.identity(), s.node(), s.other()
	site, phone := s.watch(other)
	defer func() { _, _ = s.TryKubectl("uncordon", node) }()
	event := time.Now()
	out := s.Kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s")
	s.t.Logf("%s was drained in %s", node, time.Since(event).Round(every))
	if !strings.Contains(out, "evicting pod vpn/culvert-hq-0") {
		s.t.Errorf("the gateway's pod was not among what was evicted: %s", out)
	}
	if forSite, forPhone := s.back(site, phone, event); max(forSite, forPhone) > 30*time.Second {
		s.t.Errorf("the site is back after %s and the device after %s, want at most 30 s", forSite.Round(every), forPhone.Round(every))
	}
	s.awaitGateway()
	if now := s.node(); now != other {
		s.t.Errorf("the gateway is on %s, want %s", now, other)
	}
	s.Kubectl("uncordon", node)
	s.Apply(webPod(node))
	s.Wait("jobs", "--all")
	s.refresh()
	s.reachesPods(siteHost, 10*time.Second)
	s.podsReachSite()
	if after := s.identity(); after != before {
		s.t.Errorf("key and addresses were %s and are %s", before, after)
	}
}

// pods are the UIDs and images of the pods of a part of Culvert.
func (s *site) podsOf(namespace, selector string) string {
	s.t.Helper()
	return s.Kubectl("-n", namespace, "get", "pods", "-l", selector, "-o",
		`jsonpath={range .items[*]}{.metadata.uid} {.spec.containers[0].image}{"\n"}{end}`)
}

// operatorUpgraded: a change of the operator alone is nothing to any tunnel.
func (s *site) operatorUpgraded() {
	gateways, agents, operators := "culvert.dev/gateway=hq", "app.kubernetes.io/component=agent", "app.kubernetes.io/component=operator"
	before := s.podsOf("vpn", gateways) + s.podsOf(clustertest.System, agents)
	operator := s.podsOf(clustertest.System, operators)
	site, phone := s.watch(s.other())
	s.Upgrade("--set", "operator.logLevel=debug,operator.podAnnotations.why=test")
	labtest.Eventually(s.t, 30*time.Second, "the operator that came with the upgrade leads", func() error {
		holder, err := s.TryKubectl("-n", clustertest.System, "get", "lease", "culvert-operator", "-o", "jsonpath={.spec.holderIdentity}")
		if err != nil {
			return err
		}
		name, _, _ := strings.Cut(holder, "_")
		out, err := s.TryKubectl("-n", clustertest.System, "get", "pod", name, "-o", "jsonpath={.metadata.annotations.why}")
		if err == nil && out != "test" {
			err = fmt.Errorf("%s leads", holder)
		}
		return err
	})
	time.Sleep(2 * time.Second) // what its first round changes is to be seen
	site.Unharmed()
	phone.Unharmed()
	if after := s.podsOf(clustertest.System, operators); after == operator {
		s.t.Error("the operator's pods are the same as before")
	}
	if after := s.podsOf("vpn", gateways) + s.podsOf(clustertest.System, agents); after != before {
		s.t.Errorf("gateways and agents were\n%sand are\n%s", before, after)
	}
}

// allUpgraded: with another image everything is replaced: the gateway's pod, and the agent of its
// node, which the pod waits for when both are new.
func (s *site) allUpgraded() {
	const image = "culvert.dev/culvert:next"
	for i := range s.Nodes {
		out, err := s.Nodes[i].Run(s.t.Context(), "ctr", "--namespace", "k8s.io", "images", "tag", "--force", "culvert.dev/culvert:dev", image)
		if err != nil {
			s.t.Fatalf("%v: %s", err, out)
		}
	}
	before := s.identity()
	site, phone := s.watch(s.other())
	s.Upgrade("--set", "image.tag=next")
	labtest.Eventually(s.t, 60*time.Second, "the gateway's pod has the new image and is ready", func() error {
		out, err := s.TryKubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o",
			`jsonpath={.spec.containers[0].image} {.spec.containers[1].image} {.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != image+" "+image+" True" {
			err = fmt.Errorf("images and readiness: %s", out)
		}
		return err
	})
	s.settle(site, phone)
	s.away("site", site, 30*time.Second)
	s.away("device", phone, 30*time.Second)
	if after := s.identity(); after != before {
		s.t.Errorf("key and addresses were %s and are %s", before, after)
	}
}

// away ends a watch and says what was lost; a gap longer than limit is an error.
func (s *site) away(what string, p *clustertest.Probe, limit time.Duration) {
	s.t.Helper()
	sent, lost, gap := p.Outcome()
	s.t.Logf("%s: %d of %d packets lost, %s without an answer", what, lost, sent, gap.Round(every))
	if gap > limit {
		s.t.Errorf("the %s was away for %s, want at most %s", what, gap.Round(every), limit)
	}
}

// settle waits until answers come for two seconds without a gap.
func (s *site) settle(probes ...*clustertest.Probe) {
	s.t.Helper()
	for _, p := range probes {
		p.AwaitSteady(2*time.Second, 30*time.Second)
	}
}
