package netlab

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// With WireGuard and ESP of the kernel: a device and a site with an xfrm interface reach
// pods and are reached; while culvert is killed and started again not one packet is lost,
// and none is ever seen in clear; an underlay that loses and reorders packets slows
// transfers and breaks none; the device roams; SIGTERM leaves nothing.
func TestKernelDatapathNeverStops(t *testing.T) {
	if os.Getenv("CULVERT_KERNEL") != "1" {
		t.Skip("SKIP: runs inside the virtual machine: make test-kernel")
	}
	const psk = "correct horse battery staple"
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", berlinCIDRs, psk))
	g.run()
	phone, wire := n.dialIn(g, "phone", 2)
	nat, h := n.natted("berlin")
	inside(t, h, berlin4, berlin6)
	newStrongSwan(t, h, pskConf("berlin", berlinTS, psk))
	bothWays(t, n, h, true, 20*time.Second)
	reaches(t, phone.Host, "tcp", at(web1, port), "web-1 10.99.0.2", 10*time.Second)
	reaches(t, n.web2, "udp", at("fd00:99::2", port), "phone "+web2v6, 10*time.Second)
	for _, kind := range []string{"wireguard", "xfrm"} {
		if out := n.gateway.Run("ip", "-o", "link", "show", "type", kind); strings.Count(out, ": cvt") != 1 {
			t.Fatalf("the gateway's links of type %s: %q", kind, out)
		}
	}

	l := n.watchLeaks("gateway", "phone", "berlin-nat")
	pid := g.charon()
	probes := []*probe{
		watch(t, phone.Host, at(web1, port), 50*time.Millisecond),
		watch(t, n.web2, at("fd00:99::2", port), 50*time.Millisecond),
		watchFrom(t, h, berlin4, at(web1, port), 50*time.Millisecond),
		watch(t, n.web2, at(berlin6, port), 50*time.Millisecond),
		watch(t, phone.Host, at(webService, 80), 50*time.Millisecond),
	}
	time.Sleep(300 * time.Millisecond)
	g.kill()
	time.Sleep(2 * time.Second)
	g.run()
	g.await("the successor sees device and site", 20*time.Second, func(r *culvert.Report) error {
		for _, name := range []string{"default/phone", "default/berlin"} {
			if p := peer(r, name); p == nil || !p.Connected {
				return fmt.Errorf("%s: %+v", name, p)
			}
		}
		return nil
	})
	for _, p := range probes {
		p.unharmed()
	}
	if now := g.charon(); now != pid {
		t.Errorf("the IKE daemon is process %d, was %d before culvert was killed", now, pid)
	}

	for _, host := range []*labtest.Host{wire.host, nat.host} {
		host.Run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "loss", "5%", "delay", "10ms", "3ms", "reorder", "75%")
	}
	for _, x := range []struct {
		host   *labtest.Host
		source string
	}{{phone.Host, ""}, {h, berlin4}} {
		up, down, err := transfer(x.host, x.source, at(web1, port), 1<<20, 60*time.Second)
		t.Logf("1 MiB from %s over a bad underlay: up %s, down %s, %v", x.host.Name, up, down, err)
		if err != nil {
			t.Error(err)
		}
	}
	l.none() // with controls on the links of now
	wire.move(n)
	reaches(t, phone.Host, "tcp", at(web1, port), "web-1 10.99.0.2", 10*time.Second)
	reaches(t, n.web2, "tcp", at("10.99.0.2", port), "phone "+web2, 10*time.Second)
	g.stop()
	if got := g.ours(); len(got) > 0 {
		t.Errorf("left behind after SIGTERM:\n%s", strings.Join(got, "\n"))
	}
}
