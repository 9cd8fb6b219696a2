package jobs_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

// Addresses of the site: its host behind a NAT router outside.
const (
	siteCIDR    = "10.50.0.0/24"
	siteHost    = "10.50.0.1"
	sitePSK     = "a pre-shared key of berlin"
	routerOuter = "198.18.1.10"
)

const workloads = `---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: jobs}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: echo, port: 8081, protocol: UDP}
`

func webPod(node string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: web-%[1]s, namespace: jobs, labels: {app: web}}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    image: %[2]s
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
`, node, cluster.TestImage)
}

const gateway = `---
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: hq, namespace: vpn}
spec:
  expose: {type: HostPort}
  ipsec: {localID: vpn.example.com}
  clusterTraffic: {source: %s}
---
apiVersion: v1
kind: Secret
metadata: {name: berlin, namespace: vpn}
stringData: {psk: %q}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: berlin, namespace: vpn}
spec:
  gatewayRef: {name: hq}
  cidrs: [%s]
  ipsec:
    remoteID: berlin.example.com
    auth: %s
`

const (
	withPSK         = "{presharedKeySecretRef: {name: berlin, key: psk}}"
	withCertificate = "{certificate: {certificateSecretRef: {name: hq-tls}, caSecretRef: {name: sites, key: ca.crt}}}"
)

const siteConf = `connections {
  culvert {
    version = 2
    remote_addrs = %s
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    dpd_delay = 2s
    keyingtries = 0
    local {
      auth = psk
      id = berlin.example.com
    }
    remote {
      auth = psk
      id = vpn.example.com
    }
    children {
      net {
        local_ts = ` + siteCIDR + `
        remote_ts = 10.244.0.0/16,10.96.0.0/16
        esp_proposals = aes256gcm16-x25519
        start_action = start
        close_action = start
        dpd_action = restart
      }
    }
  }
}
secrets {
  ike-gw {
    id-1 = vpn.example.com
    id-2 = berlin.example.com
    secret = "` + sitePSK + `"
  }
}
`

// site is a network on premises with one host, whose router translates addresses.
type site struct {
	t    *testing.T
	c    *clustertest.Cluster
	host *labtest.Host
	ike  *strongswan.Daemon
	pods map[string]string // node → address of its web pod
	web  string            // the service's address
}

// TestSite is jobs J1 and J2: an unmodified strongSwan behind NAT and a cluster reach each
// other.
func TestSite(t *testing.T) {
	s := startSite(t, cluster.Options{})
	t.Run("pods on both nodes see the site's own address", func(t *testing.T) { s.reachesPods(t, siteHost, 30*time.Second) })
	t.Run("service over TCP and UDP", s.reachesService)
	t.Run("name server, API server and ping", s.reachesReal)
	t.Run("pods reach the site", s.podsReachSite)
	t.Run("100 MB both ways", s.bulk)
	t.Run("culvert is killed", s.culvertKilled)
	t.Run("gateway pod is deleted", s.podDeleted)
	t.Run("certificates", s.certificates)
	t.Run("masquerade", s.masquerade)
	s.nothingSpoofed(t)
}

// TestSiteOverSmallPackets is the same where every link carries no more than 1280 bytes.
func TestSiteOverSmallPackets(t *testing.T) {
	s := startSite(t, cluster.Options{MTU: 1280})
	t.Run("pods", func(t *testing.T) { s.reachesPods(t, siteHost, 30*time.Second) })
	t.Run("pods reach the site", s.podsReachSite)
	t.Run("100 MB both ways", s.bulk)
	s.nothingSpoofed(t)
}

func startSite(t *testing.T, o cluster.Options) *site {
	t.Helper()
	c := clustertest.Start(t, o)
	c.Install()
	c.Namespace("jobs")
	c.Namespace("vpn")
	manifests := workloads
	for _, n := range c.Nodes {
		manifests += webPod(n.Name)
	}
	c.Apply(manifests)
	c.Apply(fmt.Sprintf(gateway, "Preserve", sitePSK, siteCIDR, withPSK))
	c.Wait("jobs", "--all")
	s := newSite(t, c)
	s.awaitGateway()
	s.ike = strongswan.New(t, s.host.Host, fmt.Sprintf(siteConf, s.public()))
	return s
}

// nothingSpoofed: the cluster's network saw none but the nodes' and pods' own addresses.
func (s *site) nothingSpoofed(t *testing.T) {
	for _, n := range s.c.Nodes {
		if got, err := s.c.Spoofed(context.Background(), n.Name); err != nil || got > 0 {
			t.Errorf("%d packets with foreign sources left %s onto the fabric (%v)", got, n.Name, err)
		}
	}
}

// newSite builds the site's network and the server on its host.
func newSite(t *testing.T, c *clustertest.Cluster) *site {
	t.Helper()
	s := &site{t: t, c: c, pods: map[string]string{}}
	router := c.OutsideHost("router1", routerOuter+"/15")
	l := labtest.New(t, "nft", "curl", "dig", "ping")
	s.host = l.Host("berlin")
	if err := l.Lab.Connect(router, "lan", "192.168.77.1/24", s.host.Host, "eth0", "192.168.77.2/24"); err != nil {
		t.Fatal(err)
	}
	s.host.IP("route", "add", "default", "via", "192.168.77.1")
	s.host.IP("addr", "add", siteHost+"/32", "dev", "lo")
	if err := router.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if out, err := router.Output(ctx, "nft", "table ip nat { chain post { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.host.Background(c.TestServer())
	for _, n := range c.Nodes {
		s.pods[n.Name] = c.Kubectl("-n", "jobs", "get", "pod", "web-"+n.Name, "-o", "jsonpath={.status.podIP}")
	}
	s.web = c.Kubectl("-n", "jobs", "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
	return s
}

func (s *site) awaitGateway() {
	s.t.Helper()
	s.c.Kubectl("-n", "vpn", "wait", "vpngateway/hq", "--for=condition=Ready", "--timeout=60s")
}

// public is the address outside of the node that the gateway's pod is on.
func (s *site) public() string {
	s.t.Helper()
	node := s.c.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.spec.nodeName}")
	for _, n := range s.c.Nodes {
		if n.Name == node {
			return n.ExternalIPs()[0].String()
		}
	}
	s.t.Fatalf("the gateway's pod is on the unknown node %q", node)
	return ""
}

// get fetches a URL from the site's inner address.
func (s *site) get(url string, more ...string) (string, error) {
	return s.host.Try("curl", append([]string{"-s", "-S", "-m", "2", "--interface", siteHost, url}, more...)...)
}

// reachesPods wants every pod to see the site under an address.
func (s *site) reachesPods(t *testing.T, as string, timeout time.Duration) {
	for node, ip := range s.pods {
		labtest.Eventually(t, timeout, "the site reaches the pod on "+node, func() error {
			out, err := s.get("http://" + ip + ":8080/")
			if want := "client=" + as + " pod=web-" + node; err == nil && !strings.HasPrefix(out, want) {
				err = fmt.Errorf("answer %q, want %q", out, want)
			}
			return err
		})
	}
}

func (s *site) reachesService(t *testing.T) {
	seen := map[string]bool{}
	for range 40 {
		out, err := s.get("http://" + s.web + "/")
		if err != nil || !strings.HasPrefix(out, "client="+siteHost+" ") {
			t.Fatalf("answer %q (%v)", out, err)
		}
		seen[out] = true
	}
	if len(seen) != len(s.c.Nodes) {
		t.Errorf("the service led to %d of %d pods: %v", len(seen), len(s.c.Nodes), seen)
	}
	out, err := s.host.Try(s.c.TestServer(), "echo", "udp", s.web+":8081", "hello")
	if err != nil || !strings.Contains(out, "client="+siteHost+" hello") {
		t.Errorf("over UDP: answer %q (%v)", out, err)
	}
}

// reachesReal is what an administrator tries first: names, the API server, a ping.
func (s *site) reachesReal(t *testing.T) {
	labtest.Eventually(t, 10*time.Second, "a DNS query over UDP to CoreDNS's service address", func() error {
		out, err := s.host.Try("dig", "-b", siteHost, "+time=2", "+tries=1", "+short", "@"+cluster.DNS[0].String(), "web.jobs.svc.cluster.local")
		if err == nil && strings.TrimSpace(out) != s.web {
			err = fmt.Errorf("answer %q, want %s", out, s.web)
		}
		return err
	})
	out, err := s.get("https://10.96.0.1/healthz", "-k")
	if err != nil || out != "ok" {
		t.Errorf("the API server's service: %q (%v)", out, err)
	}
	for node, ip := range s.pods {
		if out, err := s.host.Try("ping", "-c", "3", "-i", "0.2", "-W", "2", "-I", siteHost, ip); err != nil {
			t.Errorf("ping of the pod on %s: %v: %s", node, err, out)
		}
	}
}

func (s *site) podsReachSite(t *testing.T) {
	for node, ip := range s.pods {
		labtest.Eventually(t, 10*time.Second, "the pod on "+node+" reaches the site", func() error {
			out, err := s.c.Exec("jobs", "web-"+node, "/server", "get", "http://"+siteHost+":8080/")
			if want := "client=" + ip + " "; err == nil && !strings.HasPrefix(out, want) {
				err = fmt.Errorf("answer %q, want %q", out, want)
			}
			return err
		})
	}
}

func (s *site) bulk(t *testing.T) {
	const size = 100 << 20
	for node, ip := range s.pods {
		began := time.Now()
		local, err := s.host.Try("sh", "-c", fmt.Sprintf("curl -sS -m 120 --interface %s 'http://%s:8080/bytes?n=%d' | sha256sum", siteHost, ip, size))
		if err != nil {
			t.Fatalf("100 MB from the pod on %s: %v", node, err)
		}
		down := time.Since(began)
		sum, _, _ := strings.Cut(local, " ")
		out, err := s.host.Try(s.c.TestServer(), "send", "http://"+ip+":8080/sink", strconv.Itoa(size))
		if want := fmt.Sprintf("bytes=%d sha256=%s", size, sum); err != nil || strings.TrimSpace(out) != want {
			t.Errorf("100 MB to the pod on %s: %q (%v), want %q", node, out, err, want)
		}
		t.Logf("100 MB from and to the pod on %s: %s, %s", node, down.Round(time.Millisecond), (time.Since(began) - down).Round(time.Millisecond))
	}
}

// watch asks a pod for an answer every 100 ms while f runs and afterwards, until answers
// come again; it returns how many came late or never and the longest time without one.
func (s *site) watch(t *testing.T, settle time.Duration, f func()) (lost int, gap time.Duration) {
	t.Helper()
	address := netip.MustParseAddr(s.pods[s.c.Nodes[0].Name])
	stop, done := make(chan struct{}), make(chan struct{})
	last := time.Now()
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			_, err := s.host.Try("ping", "-c", "1", "-W", "1", "-I", siteHost, address.String())
			if err != nil {
				lost++
			} else {
				gap, last = max(gap, time.Since(last)), time.Now()
			}
			time.Sleep(100 * time.Millisecond)
		}
	}()
	time.Sleep(time.Second)
	f()
	time.Sleep(settle)
	close(stop)
	<-done
	return lost, max(gap, time.Since(last))
}

// culvertKilled: the SAs are charon's, which is in a container of its own.
func (s *site) culvertKilled(t *testing.T) {
	lost, gap := s.watch(t, 12*time.Second, func() {
		uid := s.c.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.metadata.uid}")
		before := s.restarts()
		if err := s.killProcess(uid, "culvert"); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, 10*time.Second, "kubelet restarts the container", func() error {
			if s.restarts() == before {
				return errors.New("not yet")
			}
			return nil
		})
	})
	if lost > 0 {
		t.Errorf("%d pings lost, %s without an answer", lost, gap)
	}
}

func (s *site) restarts() string {
	out, _ := s.c.TryKubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", `jsonpath={.status.containerStatuses[?(@.name=="culvert")].restartCount}`)
	return out
}

func (s *site) podDeleted(t *testing.T) {
	key := s.c.Kubectl("-n", "vpn", "get", "vpngateway", "hq", "-o", "jsonpath={.status.publicKey}")
	node := s.public()
	lost, gap := s.watch(t, 25*time.Second, func() {
		s.c.Kubectl("-n", "vpn", "delete", "pod", "culvert-hq-0", "--wait=false")
	})
	s.awaitGateway()
	t.Logf("%d pings lost, %s without an answer; on another node: %t", lost, gap.Round(100*time.Millisecond), s.public() != node)
	if s.public() == node && gap > 15*time.Second {
		t.Errorf("%s without an answer, want at most 15 s", gap)
	}
	if got := s.c.Kubectl("-n", "vpn", "get", "vpngateway", "hq", "-o", "jsonpath={.status.publicKey}"); got != key {
		t.Errorf("the key changed from %s to %s", key, got)
	}
	s.ike.Conf = fmt.Sprintf(siteConf, s.public())
	s.ike.Load()
	s.reachesPods(t, siteHost, 20*time.Second)
}

// certificates: both sides change from the pre-shared key to certificates of one CA.
func (s *site) certificates(t *testing.T) {
	ca := strongswan.NewAuthority(t)
	day := 24 * time.Hour
	cert, key := ca.Issue(2, "vpn.example.com", -time.Hour, day)
	s.c.Apply(fmt.Sprintf("apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {name: hq-tls, namespace: vpn}\nstringData: {tls.crt: %q, tls.key: %q}\n", cert, key) +
		fmt.Sprintf("---\napiVersion: v1\nkind: Secret\nmetadata: {name: sites, namespace: vpn}\nstringData: {ca.crt: %q}\n", ca.PEM))
	s.c.Apply(fmt.Sprintf(gateway, "Preserve", sitePSK, siteCIDR, withCertificate))
	cert, key = ca.Issue(3, "berlin.example.com", -time.Hour, day)
	s.ike.Certify(cert, key, ca.PEM)
	// strongSwan does not try again by itself when it is refused, as it may be until the
	// gateway has its certificate too.
	labtest.Eventually(t, 30*time.Second, "the site's tunnel is up", func() error {
		_, err := s.ike.Swanctl("--initiate", "--child", "net", "--timeout", "3")
		return err
	})
	s.reachesPods(t, siteHost, 10*time.Second)
	out, err := s.ike.Swanctl("--list-sas")
	if err != nil || !strings.Contains(out, "ESTABLISHED") || s.ike.Conf == "" || strings.Contains(s.ike.Conf, "psk") {
		t.Errorf("the site's SAs (%v):\n%s", err, out)
	}
}

// masquerade: pods see the gateway's pod.
func (s *site) masquerade(t *testing.T) {
	s.c.Apply(fmt.Sprintf(gateway, "Masquerade", sitePSK, siteCIDR, withCertificate))
	labtest.Eventually(t, 20*time.Second, "pods see the gateway", func() error {
		pod := s.c.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.status.podIP}")
		for node, ip := range s.pods {
			out, err := s.get("http://" + ip + ":8080/")
			if err != nil {
				return err
			}
			if want := "client=" + pod + " pod=web-" + node; !strings.HasPrefix(out, want) {
				return fmt.Errorf("answer %q, want %q", out, want)
			}
		}
		return nil
	})
}
