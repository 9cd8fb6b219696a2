package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// A device reaches what its access says, and nothing else; pods reach every device.
func TestAccessMatrix(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.run("--http", "0.0.0.0:9586")
	answer(t, n.gateway, fabricIP, public)
	n.wgSiteHosts(g)
	access := map[string][]string{
		"default":  {"pods", "services"}, // nothing said
		"pods":     {"pods"},
		"services": {"services"},
		"nodes":    {"nodes"},
		"sites":    {"sites"},
		"all":      {"pods", "services", "nodes", "sites"},
	}
	spec := map[string]string{"pods": "[Pods]", "services": "[Services]", "nodes": "[Nodes]", "sites": "[Sites]", "all": "[Pods, Services, Nodes, Sites]"}
	targets := map[string][]string{
		"pods":     {at(web1, port), at(web2v6, port)},
		"services": {at(webService, 80), at(webServiceV6, 80)},
		"nodes":    {at(nodeIP, port)},
		"sites":    {at("10.20.0.5", port), at("fd00:20::5", port)},
	}
	devices := map[string]*device{}
	number := 2
	for name := range access {
		var extra []string
		if spec[name] != "" {
			extra = []string{"access: {to: " + spec[name] + "}"}
		}
		devices[name], _ = n.dialIn(g, "d-"+name, number, extra...)
		number++
	}
	for name, d := range devices {
		may := map[string]bool{}
		for _, a := range access[name] {
			may[a] = true
		}
		for target, list := range targets {
			for _, to := range list {
				for _, network := range []string{"tcp", "udp"} {
					if may[target] {
						reaches(t, d.Host, network, to, "", 8*time.Second)
					}
				}
			}
		}
	}
	// After the positive controls, so that a tunnel that is not up yet is not taken for one
	// that is closed.
	group := newGroup(t)
	for name, d := range devices {
		may := map[string]bool{}
		for _, a := range access[name] {
			may[a] = true
		}
		for target, list := range targets {
			for _, to := range list {
				for _, network := range []string{"tcp", "udp"} {
					if !may[target] {
						group.blocked(d.Host, network, to)
					}
				}
			}
		}
		// The gateway's host is nobody's, however it is called.
		for _, to := range []string{at(fabricIP, port), at(fabricIP, 9586), at("10.99.0.1", 9586), at("fd00:99::1", 9586), at("10.99.0.1", port)} {
			group.blocked(d.Host, "tcp", to)
		}
		group.blocked(d.Host, "udp", at(fabricIP, port))
		for other, o := range devices {
			if other != name {
				group.blocked(d.Host, "tcp", at(o.addrs[0], port))
				group.blocked(d.Host, "udp", at(o.addrs[1], port))
			}
		}
	}
	site := n.hosts["oslo"]
	for _, d := range devices {
		group.blocked(site, "tcp", at(d.addrs[0], port))
	}
	group.blocked(site, "tcp", at("10.20.128.5", port))
	group.blocked(site, "udp", at(nodeIP, port))
	group.wait()
	for _, d := range devices {
		reaches(t, n.web1, "tcp", at(d.addrs[0], port), "d-", 5*time.Second)
		reaches(t, n.web2, "udp", at(d.addrs[1], port), "d-", 5*time.Second)
	}
	reaches(t, n.web1, "tcp", at("10.20.0.5", port), "oslo "+web1, 5*time.Second)
	// Control: that the host answers at all, from where it may be asked.
	reaches(t, n.web1, "tcp", at(fabricIP, port), "gateway", 5*time.Second)
}

// wgSiteHosts adds two sites over WireGuard.
func (n *network) wgSiteHosts(g *gateway) {
	n.t.Helper()
	n.hosts = map[string]*labtest.Host{}
	oslo := n.wgSite(g, "oslo", []string{"10.20.0.0/17", "fd00:20::/64"}, []string{"10.20.0.5", "fd00:20::5"})
	rome := n.wgSite(g, "rome", []string{"10.20.128.0/17"}, []string{"10.20.128.5"})
	n.hosts["oslo"], n.hosts["rome"] = oslo.Host, rome.Host
	for _, d := range []*device{oslo, rome} {
		reaches(n.t, d.Host, "udp", at(web1, port), "web-1", 8*time.Second)
	}
}

// group runs many checks that wait for nothing to happen at once.
type group struct {
	t    *testing.T
	slot chan struct{}
	errs chan error
	n    int
}

func newGroup(t *testing.T) *group {
	return &group{t: t, slot: make(chan struct{}, 64), errs: make(chan error, 1000)}
}

func (g *group) blocked(h *labtest.Host, network, to string) {
	g.n++
	go func() {
		g.slot <- struct{}{}
		defer func() { <-g.slot }()
		got, err := whoFrom(h, network, "", to, time.Second)
		if err == nil {
			g.errs <- fmt.Errorf("%s reaches %s over %s: %q answered", h.Name, to, network, got)
			return
		}
		g.errs <- nil
	}()
}

func (g *group) wait() {
	g.t.Helper()
	for range g.n {
		if err := <-g.errs; err != nil {
			g.t.Error(err)
		}
	}
	g.t.Logf("%d paths are closed", g.n)
}

// A device or a site that sends with another's source address: nothing of that is
// delivered (FAULTS 9).
func TestSpoofedSource(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.run()
	phone, _ := n.dialIn(g, "phone", 2, "access: {to: [Pods, Services, Nodes, Sites]}")
	n.dialIn(g, "laptop", 3)
	n.wgSiteHosts(g)
	oslo := n.hosts["oslo"]
	for _, to := range []string{web1, web1v6} {
		reaches(t, phone.Host, "udp", at(to, port), "web-1", 8*time.Second)
	}

	got := map[string]int{}
	done := make(chan string, 1000)
	c := sniff(t, n.web1, "eth0", func(p labtest.Packet) {
		if p.DPort == port && p.Protocol == unix.IPPROTO_UDP {
			done <- p.Src.String()
		}
	})
	c6 := sniff(t, n.node, "eth0", func(p labtest.Packet) {
		if p.DPort == port && p.Protocol == unix.IPPROTO_UDP {
			done <- p.Src.String()
		}
	})
	for _, x := range []struct {
		from    *labtest.Host
		sources []string
		target  string
	}{
		{phone.Host, []string{"10.99.0.2", "10.99.0.3", "10.99.0.1", "10.99.0.77", web2, "10.244.0.10", "10.96.0.80", nodeIP, "10.20.0.5", "192.0.2.77", public, "127.0.0.1"}, at(web1, port)},
		{phone.Host, []string{"fd00:99::2", "fd00:99::3", "fd00:99::1", web2v6, "fd00:20::5", "2001:db8::77"}, at(web1v6, port)},
		{oslo, []string{"10.20.0.9", "10.20.128.5", "10.99.0.2", web2, "192.0.2.78"}, at(web1, port)},
	} {
		for _, source := range x.sources {
			if err := spoof(x.from, source, x.target); err != nil && source != "127.0.0.1" {
				t.Errorf("%s sends as %s: %v", x.from.Name, source, err)
			}
		}
	}
	time.Sleep(300 * time.Millisecond)
	c.stop()
	c6.stop()
	close(done)
	for src := range done {
		got[src]++
	}
	// The positive controls, and nobody else.
	for _, own := range []string{"10.99.0.2", "fd00:99::2", "10.20.0.9"} {
		if got[own] == 0 {
			t.Errorf("a packet from its own %s did not arrive", own)
		}
		delete(got, own)
	}
	if len(got) > 0 {
		t.Errorf("spoofed packets arrived from: %v", got)
	}
}

// spoof sends one UDP packet with any source address.
func spoof(h *labtest.Host, source, to string) error {
	return h.Host.Do(func() error {
		lc := net.ListenConfig{Control: transparent}
		local := net.JoinHostPort(source, "0")
		c, err := lc.ListenPacket(context.Background(), "udp", local)
		if err != nil {
			return err
		}
		defer c.Close()
		addr, err := net.ResolveUDPAddr("udp", to)
		if err != nil {
			return err
		}
		_, err = c.WriteTo([]byte("spoofed"), addr)
		return err
	})
}

// transparent lets a socket bind to an address that is not the host's.
func transparent(network, _ string, c syscall.RawConn) error {
	var err error
	control := c.Control(func(fd uintptr) {
		if network == "udp6" {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			return
		}
		err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
	})
	return errors.Join(control, err)
}
