package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

const (
	berlinCIDRs = `10.10.0.0/24, "fd00:10:10::/64"`
	berlinTS    = "10.10.0.0/24,fd00:10:10::/64"
	berlin4     = "10.10.0.5"
	berlin6     = "fd00:10:10::5"
)

// inside gives a host the site's own addresses and answers there.
func inside(t *testing.T, h *labtest.Host, addrs ...string) {
	t.Helper()
	for _, a := range addrs {
		if strings.Contains(a, ":") {
			h.IP("addr", "add", a+"/128", "dev", "lo", "nodad")
		} else {
			h.IP("addr", "add", a+"/32", "dev", "lo")
		}
	}
	answer(t, h, addrs...)
}

// reachesFrom is reaches with a source address of the host's choice.
func reachesFrom(t *testing.T, h *labtest.Host, network, source, to, want string, timeout time.Duration) time.Duration {
	t.Helper()
	return eventually(t, timeout, fmt.Sprintf("%s (%s) reaches %s over %s", h.Name, source, to, network), func() error {
		got, err := whoFrom(h, network, source, to, time.Second)
		if err == nil && !strings.HasPrefix(got, want) {
			err = fmt.Errorf("answered %q, want %q", got, want)
		}
		return err
	})
}

// bothWays sees that a site with the addresses of Berlin and the pods reach each other
// and see each other's real addresses.
func bothWays(t *testing.T, n *network, h *labtest.Host, six bool, timeout time.Duration) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		reachesFrom(t, h, network, berlin4, at(web1, port), "web-1 "+berlin4, timeout)
		reachesFrom(t, h, network, berlin4, at(webService, 80), "web-", timeout)
		reaches(t, n.web2, network, at(berlin4, port), h.Name+" "+web2, timeout)
		if six {
			reachesFrom(t, h, network, berlin6, at(web1v6, port), "web-1 "+berlin6, timeout)
			reaches(t, n.web2, network, at(berlin6, port), h.Name+" "+web2v6, timeout)
		}
	}
}

// A site with a pre-shared key, unmodified strongSwan behind NAT: both ways with real
// addresses; then everything that restarts, and what changes on the way.
func TestIPsecSiteWithPresharedKey(t *testing.T) {
	const psk = "correct horse battery staple"
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", "10.10.0.0/24", psk))
	g.run()
	nat, h := n.natted("berlin")
	inside(t, h, berlin4, berlin6)
	s := newStrongSwan(t, h, pskConf("berlin", "10.10.0.0/24", psk))
	bothWays(t, n, h, false, 10*time.Second)
	g.await("the status shows the site", 5*time.Second, func(r *culvert.Report) error {
		p := peer(r, "default/berlin")
		if p == nil || !p.Connected || !strings.HasPrefix(p.Endpoint, nat.addr+":") || p.ReceivedBytes == 0 || p.SentBytes == 0 || p.Since.IsZero() {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	l := n.watchLeaks("gateway") // what the stock peer sends while it is dead is its own matter

	// charon lives on when culvert is killed: nothing is lost.
	up, down := watchFrom(t, h, berlin4, at(web1, port), 10*time.Millisecond), watch(t, n.web2, at(berlin4, port), 10*time.Millisecond)
	time.Sleep(200 * time.Millisecond)
	pid := g.charon()
	g.kill()
	time.Sleep(500 * time.Millisecond)
	g.start()
	g.await("the successor sees the site", 10*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/berlin"); p == nil || !p.Connected {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	time.Sleep(500 * time.Millisecond)
	up.unharmed()
	down.unharmed()
	if now := g.charon(); now != pid {
		t.Errorf("the IKE daemon is process %d, was %d before culvert was killed", now, pid)
	}

	probe := watchFrom(t, h, berlin4, at(web1, port), 50*time.Millisecond)
	back := watch(t, n.web2, at(berlin4, port), 50*time.Millisecond)
	type fault struct {
		name  string
		bound time.Duration
		f     func()
	}
	try := func(x fault) {
		x.f()
		event := time.Now()
		a, b := probe.awaitBack(event, 30*time.Second), back.awaitBack(event, 30*time.Second)
		t.Logf("%s: site → pod back after %d ms, pod → site after %d ms", x.name, a.Milliseconds(), b.Milliseconds())
		if max(a, b) > x.bound {
			t.Errorf("%s: back after %s, want ≤%s", x.name, max(a, b), x.bound)
		}
		time.Sleep(200 * time.Millisecond)
	}
	for _, x := range []fault{
		{"the peer's strongSwan is killed and restarted", 10 * time.Second, func() { s.Kill(); s.Start() }},
		{"the peer's strongSwan is restarted", 10 * time.Second, func() {
			s.Stop()
			s.Start()
		}},
		// Nobody can tell the site, which alone knows where the other is: it finds out by its
		// own dead peer detection, after 2 s, and gives up 12.8 s later.
		{"our charon is killed", 20 * time.Second, func() { _ = syscall.Kill(g.charon(), syscall.SIGKILL) }},
		// SIGTERM takes the protection down with everything else: --keep-on-stop is for
		// restarts that must not leak, see TestKeepOnStop.
		{"the gateway is restarted, charon too", 10 * time.Second, func() { l.none(); g.stop(); g.start() }},
	} {
		try(x)
	}
	for _, x := range []fault{
		{"the NAT forgets its mapping and takes another port", 10 * time.Second, func() {
			nat.host.Run("nft", "flush ruleset")
			nat.host.Run("nft", `table ip nat {
				chain postrouting { type nat hook postrouting priority srcnat; oifname "eth0" ip protocol udp masquerade to :20000-21000; }
			}`)
			nat.host.Run("conntrack", "-F")
		}},
		{"the NAT gets another address", 10 * time.Second, func() { nat.renumber(n); nat.host.Run("conntrack", "-F") }},
	} {
		// strongSwan compares its mapping from one DPD exchange to the next, and has none while
		// there is traffic.
		probe.stop()
		back.stop()
		time.Sleep(4500 * time.Millisecond)
		probe = watchFrom(t, h, berlin4, at(web1, port), 50*time.Millisecond)
		back = watch(t, n.web2, at(berlin4, port), 50*time.Millisecond)
		try(x)
	}
	probe.stop()
	back.stop()
	g.stop()
	if got := g.ours(); len(got) > 0 {
		t.Errorf("left behind after SIGTERM:\n%s", strings.Join(got, "\n"))
	}
}

// charon is the process of the gateway's IKE daemon.
func (g *gateway) charon() int {
	g.t.Helper()
	for _, pid := range strings.Fields(g.host.Run("ip", "netns", "pids", g.host.Namespace)) {
		if b, _ := os.ReadFile("/proc/" + pid + "/comm"); strings.HasPrefix(string(b), "charon") {
			var n int
			_, _ = fmt.Sscan(pid, &n)
			return n
		}
	}
	g.t.Fatal("the gateway has no IKE daemon")
	return 0
}

// certificateSite is a Site with certificates, and its Secrets.
func certificateSite(name, cidrs, cert, key, ca, crl string) string {
	crlRef, crlSecret := "", ""
	if crl != "" {
		crlRef = ", crlSecretRef: {name: " + name + "-ca, key: crl.pem}"
		crlSecret = ", \"crl.pem\": " + fmt.Sprintf("%q", crl)
	}
	return siteYAML(name, cidrs, fmt.Sprintf("ipsec: {localID: vpn.example.com, remoteID: %s.example.com, auth: {certificate: {certificateSecretRef: {name: %s-tls}, caSecretRef: {name: %s-ca, key: ca.crt}%s}}}", name, name, name, crlRef)) +
		fmt.Sprintf("---\napiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {name: %s-tls, namespace: default}\nstringData: {\"tls.crt\": %q, \"tls.key\": %q}\n", name, cert, key) +
		fmt.Sprintf("---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s-ca, namespace: default}\nstringData: {\"ca.crt\": %q%s}\n", name, ca, crlSecret)
}

// Every way to fail says within 15 s which it was, with no SA; and a site with a good
// certificate beside them works both ways (FAULTS 7, 8).
func TestIPsecFailuresAreExplained(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	ca := strongswan.NewAuthority(t)
	ours, oursKey := ca.Issue(2, "vpn.example.com", -time.Hour, 24*time.Hour)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	day := 24 * time.Hour
	type failing struct {
		name     string
		from, to time.Duration // of a certificate; zero: a pre-shared key
		edits    []string
		reason   string
		saying   string
	}
	list := []failing{
		{"wrong-psk", 0, 0, []string{"a good pre-shared key", "another key"}, "AuthenticationFailed", "another pre-shared key"},
		{"wrong-id", 0, 0, []string{"wrong-id.example.com", "mallory.example.com"}, "PeerIdentityMismatch", "mallory.example.com"},
		{"weak-3des", 0, 0, []string{"aes256gcm16-prfsha384-x25519", "3des-sha256-modp2048"}, "NoProposalChosen", "3DES"},
		{"weak-sha1", 0, 0, []string{"aes256gcm16-prfsha384-x25519", "aes256-sha1-modp2048"}, "NoProposalChosen", "SHA1"},
		{"weak-modp", 0, 0, []string{"aes256gcm16-prfsha384-x25519", "aes256-sha256-modp1024"}, "NoProposalChosen", "MODP_1024"},
		{"expired", -2 * day, -time.Hour, nil, "CertificateExpired", "renew"},
		{"too-early", time.Hour, 2 * day, nil, "CertificateNotYetValid", "clocks"},
		{"revoked", -time.Hour, day, nil, "CertificateRevoked", "revoked"},
	}
	hosts := map[string]*labtest.Host{}
	for i, f := range list {
		cidr := fmt.Sprintf("10.10.%d.0/24", i+1)
		w := n.dialler(f.name)
		hosts[f.name] = w.host
		if f.from == 0 && f.to == 0 {
			// What is wrong with proposals comes before the identity: the address tells which
			// site it is.
			yaml := pskSiteYAML(f.name, cidr, "a good pre-shared key")
			if f.reason == "NoProposalChosen" {
				yaml = strings.Replace(yaml, "ipsec: {", "ipsec: {address: "+w.addr+", initiate: Never, ", 1)
			}
			g.write(f.name+".yaml", yaml)
			continue
		}
		crl := ""
		if f.name == "revoked" {
			crl = ca.Revoke(66)
		}
		g.write(f.name+".yaml", certificateSite(f.name, cidr, ours, oursKey, ca.PEM, crl))
	}
	g.write("berlin.yaml", certificateSite("berlin", berlinCIDRs, ours, oursKey, ca.PEM, ""))
	g.run()

	host := n.dialler("berlin").host
	inside(t, host, berlin4, berlin6)
	good := newStrongSwan(t, host, strings.ReplaceAll(pskConf("berlin", berlinTS, ""), "start_action = start", ""))
	cert, key := ca.Issue(3, "berlin.example.com", -time.Hour, day)
	good.Conf = pskConf("berlin", berlinTS, "")
	good.Certify(cert, key, ca.PEM)
	bothWays(t, n, host, true, 10*time.Second)

	since := map[string]time.Time{}
	for i, f := range list {
		h := hosts[f.name]
		conf := pskConf(f.name, fmt.Sprintf("10.10.%d.0/24", i+1), "a good pre-shared key", f.edits...)
		if f.from != 0 || f.to != 0 {
			s := newStrongSwan(t, h, "connections {\n}\n")
			serial := int64(100 + i)
			if f.name == "revoked" {
				serial = 66
			}
			cert, key := ca.Issue(serial, f.name+".example.com", f.from, f.to)
			s.Conf = conf
			s.Certify(cert, key, ca.PEM)
		} else {
			newStrongSwan(t, h, conf)
		}
		since[f.name] = time.Now()
	}
	for _, f := range list {
		g.await("the status explains "+f.name, time.Until(since[f.name].Add(15*time.Second)), func(r *culvert.Report) error {
			p := peer(r, "default/"+f.name)
			if p == nil || p.Connected {
				t.Fatalf("%s: %+v", f.name, p)
			}
			if p.Reason != f.reason || !strings.Contains(p.Message, f.saying) {
				return fmt.Errorf("%s: %s", p.Reason, p.Message)
			}
			if strings.Contains(p.Message, "pre-shared key is") || strings.ContainsAny(p.Message, "\n\r") {
				return errors.New(p.Message)
			}
			t.Logf("%s: at most %d ms after it dialled: %s", f.name, time.Since(since[f.name]).Milliseconds(), p.Message)
			return nil
		})
	}
	// Nothing weak or wrong has an SA: the daemon knows one only.
	out, err := g.swanctl("--list-sas")
	if err != nil || strings.Count(out, "ESTABLISHED") != 1 {
		t.Errorf("SAs: %v\n%s", err, out)
	}
	bothWays(t, n, host, true, 5*time.Second)
}

// swanctl asks the gateway's IKE daemon.
func (g *gateway) swanctl(args ...string) (string, error) {
	dir := filepath.Join(g.state, "run", "ipsec")
	return g.host.Try("env", append([]string{"STRONGSWAN_CONF=" + filepath.Join(dir, "strongswan.conf"), "swanctl"}, append(args, "--uri", "unix://"+filepath.Join(dir, "charon.vici"))...)...)
}
