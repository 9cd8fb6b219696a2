package netlab

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// refused sees that a connection is refused at once. Over UDP several are tried: the
// kernel sends one ICMP message per second to a host, after six (icmp_ratelimit).
func refused(t *testing.T, h *labtest.Host, network, to string) {
	t.Helper()
	if network == "udp" {
		eventually(t, 5*time.Second, to+" over UDP refuses", func() error {
			got, err := whoFrom(h, network, "", to, 600*time.Millisecond)
			if err == nil {
				t.Fatalf("%s over UDP: %q answers", to, got)
			}
			if errors.As(err, new(syscall.Errno)) {
				return nil
			}
			return err
		})
		return
	}
	start := time.Now()
	got, err := whoFrom(h, network, "", to, 3*time.Second)
	if took := time.Since(start); took > time.Second || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%s: %q, %v after %s, want a refusal at once", to, got, err, took)
	}
}

// answerers asks a service so many times, each on a connection of its own, and counts who
// answers.
func answerers(t *testing.T, h *labtest.Host, network, to string, times int) map[string]int {
	t.Helper()
	who := map[string]int{}
	for range times {
		got, err := whoFrom(h, network, "", to, 2*time.Second)
		if err != nil {
			t.Errorf("%s over %s: %v", to, network, err)
			continue
		}
		name, _, _ := strings.Cut(got, " ")
		who[name]++
	}
	return who
}

// Services from standard manifests, as Translate and Proxy do it, over TCP and UDP, IPv4
// and IPv6.
func TestServices(t *testing.T) {
	for _, mode := range []string{"Translate", "Proxy"} {
		t.Run(mode, func(t *testing.T) {
			n := newNetwork(t)
			g := newGateway(t, n.gateway)
			g.write("gateway.yaml", gatewayYAML("clusterTraffic: {services: "+mode+"}"))
			g.write("web.yaml", webYAML())
			g.write("sticky.yaml", serviceYAML("sticky", []string{"10.96.0.81", "fd00:10:96::81"}, "sessionAffinity: ClientIP")+
				sliceYAML("sticky", "IPv4", web1, web2)+sliceYAML("sticky", "IPv6", web1v6, web2v6))
			g.write("empty.yaml", serviceYAML("empty", []string{"10.96.0.99", "fd00:10:96::99"}))
			// An endpoint outside the pods: it has no route back to the device.
			g.write("host.yaml", serviceYAML("host", []string{"10.96.0.82"})+sliceYAML("host", "IPv4", nodeIP))
			g.run()
			phone, _ := n.dialIn(g, "phone", 2)
			reaches(t, phone.Host, "udp", at(web1, port), "web-1", 8*time.Second)
			for _, to := range []string{at(webService, 80), at(webServiceV6, 80)} {
				for _, network := range []string{"tcp", "udp"} {
					reaches(t, phone.Host, network, to, "web-", 3*time.Second)
					if who := answerers(t, phone.Host, network, to, 30); who["web-1"] == 0 || who["web-2"] == 0 {
						t.Errorf("%s over %s is answered by %v, want both", to, network, who)
					}
				}
			}
			for _, to := range []string{at("10.96.0.81", 80), at("fd00:10:96::81", 80)} {
				for _, network := range []string{"tcp", "udp"} {
					if who := answerers(t, phone.Host, network, to, 12); len(who) != 1 {
						t.Errorf("%s over %s is answered by %v, want one for the same client", to, network, who)
					}
				}
			}
			reaches(t, phone.Host, "tcp", at("10.96.0.82", 80), "node ", 3*time.Second)
			reaches(t, phone.Host, "udp", at("10.96.0.82", 80), "node ", 3*time.Second)
			for _, to := range []string{at("10.96.0.99", 80), at("fd00:10:96::99", 80), at("10.96.77.7", 80), at(webService, 81)} {
				refused(t, phone.Host, "tcp", to)
				refused(t, phone.Host, "udp", to)
			}
			if up, down, err := transfer(phone.Host, "", at(webService, 80), 4<<20, 20*time.Second); err != nil {
				t.Error(err)
			} else {
				t.Logf("4 MiB to and from a service: %d and %d ms", up.Milliseconds(), down.Milliseconds())
			}
			endpointChanges(t, g, phone.Host)
		})
	}
}

// endpointChanges edits the slice of "web": new connections follow within a second, and
// one that stands is not touched by the removal of another endpoint.
func endpointChanges(t *testing.T, g *gateway, phone *labtest.Host) {
	t.Helper()
	follow := func(what string, want string) {
		t.Helper()
		start := time.Now()
		took := eventually(t, 5*time.Second, what, func() error {
			for _, network := range []string{"tcp", "udp"} {
				for range 6 {
					got, err := whoFrom(phone, network, "", at(webService, 80), 300*time.Millisecond)
					if err != nil || !strings.HasPrefix(got, want) {
						return fmt.Errorf("over %s: %q, %w", network, got, err)
					}
				}
			}
			return nil
		})
		_ = start
		t.Logf("%s: new connections follow after %d ms", what, took.Milliseconds())
		if took > time.Second {
			t.Errorf("%s: new connections follow after %s, want ≤1 s", what, took)
		}
	}
	web := func(addrs ...string) string {
		return serviceYAML("web", []string{webService, webServiceV6}) + sliceYAML("web", "IPv4", addrs...) + sliceYAML("web", "IPv6", web1v6, web2v6)
	}
	g.write("web.yaml", web(web1))
	follow("an endpoint is removed", "web-1")
	c, err := dial(phone, "tcp", "", at(webService, 80), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo := func() error {
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	if _, err := c.Write([]byte{askEcho}); err != nil {
		t.Fatal(err)
	}
	if err := echo(); err != nil {
		t.Fatal(err)
	}
	g.write("web.yaml", web(web2))
	follow("the endpoint is another", "web-2")
	g.write("web.yaml", web())
	took := eventually(t, 5*time.Second, "without endpoints it is refused", func() error {
		_, err := whoFrom(phone, "tcp", "", at(webService, 80), 300*time.Millisecond)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%w", err)
		}
		return nil
	})
	if took > time.Second {
		t.Errorf("refused after %s, want ≤1 s", took)
	}
	refused(t, phone, "udp", at(webService, 80))
	g.write("web.yaml", web(web1, web2))
	follow("endpoints are back", "web-")
	if err := echo(); err != nil {
		t.Errorf("a connection to an endpoint that came back: %v", err)
	}
}

// Route leaves service addresses to the node: here a router that translates, as kube-proxy
// does on a real one.
func TestServicesRoute(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	n.gateway.IP("route", "add", "10.96.0.0/16", "via", "10.244.0.1")
	n.gateway.IP("-6", "route", "add", "fd00:10:96::/112", "via", "fd00:10:244::1")
	n.fabric.Run("nft", `table inet kubeproxy {
		chain prerouting { type nat hook prerouting priority dstnat;
			ip daddr `+webService+` meta l4proto {tcp, udp} th dport 80 dnat ip to `+web2+`:8080
			ip6 daddr `+webServiceV6+` meta l4proto {tcp, udp} th dport 80 dnat ip6 to [`+web2v6+`]:8080
		}
	}`)
	g.write("gateway.yaml", gatewayYAML("clusterTraffic: {services: Route, source: Masquerade}"))
	g.write("web.yaml", webYAML())
	g.run()
	phone, _ := n.dialIn(g, "phone", 2)
	for _, network := range []string{"tcp", "udp"} {
		reaches(t, phone.Host, network, at(webService, 80), "web-2 "+fabricIP, 8*time.Second)
		reaches(t, phone.Host, network, at(webServiceV6, 80), "web-2 fd00:10:244::10", 8*time.Second)
	}
}

// With Preserve a pod sees the device's address, with Masquerade the gateway's, and then
// the cluster needs no route to the devices.
func TestSourceAddresses(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.run()
	phone, _ := n.dialIn(g, "phone", 2)
	for _, to := range []string{at(web1, port), at(webService, 80)} {
		for _, network := range []string{"tcp", "udp"} {
			sees(t, phone.Host, network, to, "10.99.0.2")
		}
	}
	sees(t, phone.Host, "tcp", at(webServiceV6, 80), "fd00:99::2")

	n.fabric.IP("route", "del", "10.99.0.0/16")
	n.fabric.IP("route", "del", "fd00:99::/48")
	g.write("gateway.yaml", gatewayYAML("clusterTraffic: {source: Masquerade}"))
	for _, to := range []string{at(web1, port), at(webService, 80)} {
		for _, network := range []string{"tcp", "udp"} {
			sees(t, phone.Host, network, to, fabricIP)
		}
	}
	sees(t, phone.Host, "tcp", at(webServiceV6, 80), "fd00:10:244::10")
	sees(t, phone.Host, "udp", at(web2v6, port), "fd00:10:244::10")
	g.write("gateway.yaml", gatewayYAML("clusterTraffic: {source: Masquerade, services: Proxy}"))
	g.await("Proxy is in effect", 5*time.Second, func(r *culvert.Report) error {
		if r.Services.Mode != "Proxy" {
			return errors.New(r.Services.Mode)
		}
		return nil
	})
	sees(t, phone.Host, "tcp", at(webService, 80), fabricIP)
	sees(t, phone.Host, "udp", at(webServiceV6, 80), "fd00:10:244::10")
}

// sees waits until an answerer sees the host with an address.
func sees(t *testing.T, h *labtest.Host, network, to, want string) {
	t.Helper()
	eventually(t, 8*time.Second, h.Name+" is seen as "+want+" by "+to+" over "+network, func() error {
		got, err := whoFrom(h, network, "", to, time.Second)
		if _, from, _ := strings.Cut(got, " "); err == nil && net.ParseIP(from).String() != want {
			err = fmt.Errorf("seen as %q", got)
		}
		return err
	})
}
