package netlab

import (
	"fmt"
	"strings"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
)

// A device dials in of which the gateway does not know where it is; then it moves to
// another network, and traffic follows in both directions.
func TestDeviceDialsInAndRoams(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.run()
	phone, w := n.dialIn(g, "phone", 2)
	for _, network := range []string{"tcp", "udp"} {
		reaches(t, phone.Host, network, at(web1, port), "web-1 10.99.0.2", 5*time.Second)
		reaches(t, phone.Host, network, at(web1v6, port), "web-1 fd00:99::2", 5*time.Second)
		reaches(t, n.web1, network, at("10.99.0.2", port), "phone "+web1, 5*time.Second)
		reaches(t, n.web2, network, at("fd00:99::2", port), "phone "+web2v6, 5*time.Second)
	}
	g.await("the status shows where the device is", 5*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/phone"); p == nil || !p.Connected || p.Endpoint == "" || p.ReceivedBytes == 0 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})

	up := watch(t, phone.Host, at(web1, port), 10*time.Millisecond)
	down := watch(t, n.web2, at("fd00:99::2", port), 10*time.Millisecond)
	time.Sleep(300 * time.Millisecond)
	w.move(n)
	event := time.Now()
	backUp, backDown := up.awaitBack(event, 5*time.Second), down.awaitBack(event, 5*time.Second)
	t.Logf("moved: device → pod back after %d ms (%s), pod → device after %d ms (%s)",
		backUp.Milliseconds(), up.stop(), backDown.Milliseconds(), down.stop())
	g.await("the status shows the new place", 5*time.Second, func(r *culvert.Report) error {
		if p := peer(r, "default/phone"); !strings.HasPrefix(p.Endpoint, w.addr+":") {
			return fmt.Errorf("endpoint %s, want %s", p.Endpoint, w.addr)
		}
		return nil
	})
}

// Behind NAT: the mapping expires, the router restarts with other ports, or gets another
// address (FAULTS 29).
func TestDeviceBehindNAT(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.run()
	nat, inside := n.natted("phone")
	phone := n.deviceOn(g, inside, "phone", 2)
	reaches(t, phone.Host, "udp", at(web1, port), "web-1 10.99.0.2", 5*time.Second)
	// One way only, as most traffic is that a device asks for.
	p := watch(t, phone.Host, at(web1, port), 50*time.Millisecond)
	time.Sleep(200 * time.Millisecond)

	forget := func(low, high int) {
		nat.host.Run("nft", "flush ruleset")
		nat.host.Run("nft", fmt.Sprintf(`table ip nat {
			chain postrouting { type nat hook postrouting priority srcnat; oifname "eth0" ip protocol udp masquerade to :%d-%d; }
		}`, low, high))
		nat.host.Run("conntrack", "-F")
	}
	for _, fault := range []struct {
		name string
		f    func()
	}{
		{"the NAT forgets its mapping and takes another port", func() { forget(20000, 21000) }},
		{"the NAT restarts", func() {
			nat.host.Sysctl("net/ipv6/conf/eth0/keep_addr_on_down", "1")
			nat.host.IP("link", "set", "eth0", "down")
			forget(30000, 31000)
			nat.host.IP("link", "set", "eth0", "up")
			nat.host.IP("route", "replace", "default", "via", nat.their)
		}},
		{"the NAT gets another address", func() { nat.renumber(n); nat.host.Run("conntrack", "-F") }},
	} {
		fault.f()
		t.Logf("%s: back after %d ms", fault.name, p.awaitBack(time.Now(), 5*time.Second).Milliseconds())
		g.await("the gateway follows", 5*time.Second, func(r *culvert.Report) error {
			if e := peer(r, "default/phone").Endpoint; !strings.HasPrefix(e, nat.addr+":") {
				return fmt.Errorf("endpoint %s, want %s", e, nat.addr)
			}
			return nil
		})
	}
	t.Log(p.stop())
	// The gateway can still open connections to the device.
	reaches(t, n.web2, "tcp", at("10.99.0.2", port), "phone "+web2, 5*time.Second)
}
