package nft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// network is a gateway with two tunnel links, whose other ends hold a site and a device
// each, and with pods, a node and the world behind its default route. Plain veth links
// stand in for tunnels: the applier knows links by name only.
type network struct {
	t            *testing.T
	gw, a, b, in *labtest.Host
	nft          *NFT
}

// place is an address per family, on one host.
type place struct{ v4, v6 string }

var places = map[string]place{
	"site a":   {"172.16.1.10", "fd01:1::10"},
	"device a": {"172.18.0.5", "fd02::5"},
	"spoofed":  {"172.19.0.1", "fd03::1"},
	"site b":   {"172.16.2.10", "fd01:2::10"},
	"device b": {"172.18.0.6", "fd02::6"},
	"pod 1":    {"10.0.0.10", "fd00::10"},
	"pod 2":    {"10.0.0.11", "fd00::11"},
	"node":     {"192.0.2.9", "fd04::9"},
	"world":    {"203.0.113.9", "fd05::9"},
	"gateway":  {"10.0.0.1", "fd00::1"},
	"pool":     {"172.18.0.1", "fd02::1"}, // the gateway's own address in the device pool
	"service":  {"10.96.0.1", "fd06::1"},
	"unserved": {"10.96.0.99", "fd06::99"},
}

func (p place) of(family int) netip.Addr {
	if family == 4 {
		return netip.MustParseAddr(p.v4)
	}
	return netip.MustParseAddr(p.v6)
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// logger writes to the test's log.
func logger(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

const echoPort = 7

func newNetwork(t *testing.T) *network { return newNetworkIn(t, labtest.New(t, "nft"), "") }

// newNetworkIn makes a network in a lab that may hold others; suffix tells them apart.
func newNetworkIn(t *testing.T, l *labtest.Lab, suffix string) *network {
	n := &network{t: t, gw: l.Host("gw" + suffix), a: l.Host("a" + suffix), b: l.Host("b" + suffix), in: l.Host("in" + suffix)}
	for _, h := range []*labtest.Host{n.gw, n.a, n.b, n.in} {
		for _, s := range []string{
			"net/ipv4/conf/all/rp_filter", "net/ipv4/conf/default/rp_filter",
			"net/ipv6/conf/all/accept_dad", "net/ipv6/conf/default/accept_dad",
		} {
			h.Sysctl(s, "0")
		}
	}
	n.gw.Sysctl("net/ipv4/ip_forward", "1")
	n.gw.Sysctl("net/ipv6/conf/all/forwarding", "1")
	l.Connect(n.gw, "eth0", "10.0.0.1/24 fd00::1/64", n.in, "eth0", "10.0.0.10/24 10.0.0.11/24 fd00::10/64 fd00::11/64")
	n.in.IP("route", "add", "default", "via", "10.0.0.1")
	n.in.IP("route", "add", "default", "via", "fd00::1")
	n.gw.IP("route", "add", "default", "via", "10.0.0.10")
	n.gw.IP("route", "add", "default", "via", "fd00::10")
	n.own(n.in, "lo", "node", "world")
	n.tunnel(l, n.a, "cvtwg0", "site a", "device a", "spoofed")
	n.tunnel(l, n.b, "cvtwg1", "site b", "device b")
	n.own(n.gw, "cvtwg0", "pool")
	n.echo(n.a, "site a", "device a")
	n.echo(n.b, "site b", "device b")
	n.echo(n.in, "pod 1", "pod 2", "node", "world")
	n.echo(n.gw, "gateway", "pool")
	n.nft = n.fresh()
	return n
}

// fresh is the applier of a new process.
func (n *network) fresh() *NFT {
	n.t.Helper()
	a, err := New(Options{Logger: logger(n.t)})
	if err != nil {
		n.t.Fatal(err)
	}
	return a
}

func (n *network) own(h *labtest.Host, link string, names ...string) {
	for _, name := range names {
		h.IP("addr", "add", places[name].v4+"/32", "dev", link)
		h.IP("addr", "add", places[name].v6+"/128", "dev", link, "nodad")
	}
}

// tunnel joins a host to the gateway by a link with static neighbours: what a tunnel has
// no use for (neighbour discovery) would be dropped.
func (n *network) tunnel(l *labtest.Lab, h *labtest.Host, link string, names ...string) {
	l.Connect(n.gw, link, "", h, "tun0", "")
	for _, l := range []struct {
		h    *labtest.Host
		link string
	}{{n.gw, link}, {h, "tun0"}} {
		// Tunnels have no link-local addresses, and send nothing by themselves.
		l.h.IP("link", "set", l.link, "down")
		l.h.IP("link", "set", l.link, "addrgenmode", "none", "up")
	}
	n.gw.IP("link", "set", link, "address", "02:00:00:00:00:01")
	h.IP("link", "set", "tun0", "address", "02:00:00:00:00:02")
	n.own(h, "tun0", names...)
	for _, via := range []string{"169.254.1.1", "fe80::1"} {
		h.IP("neigh", "replace", via, "lladdr", "02:00:00:00:00:01", "dev", "tun0", "nud", "permanent")
		h.IP("route", "add", "default", "via", via, "dev", "tun0", "onlink")
	}
	for _, name := range names {
		for _, a := range []string{places[name].v4, places[name].v6} {
			n.gw.IP("neigh", "replace", a, "lladdr", "02:00:00:00:00:02", "dev", link, "nud", "permanent")
			n.gw.IP("route", "add", a, "dev", link)
		}
	}
}

// echo answers UDP and TCP on the echo port of places with their names.
func (n *network) echo(h *labtest.Host, names ...string) {
	for _, name := range names {
		for _, f := range []int{4, 6} {
			n.serve(h, name, netip.AddrPortFrom(places[name].of(f), echoPort))
		}
	}
}

// serve answers each datagram, and each line of a connection, with a name.
func (n *network) serve(h *labtest.Host, name string, at netip.AddrPort) {
	n.t.Helper()
	var u *net.UDPConn
	var l *net.TCPListener
	h.Do(func() (err error) {
		if u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at)); err != nil {
			return err
		}
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	})
	n.t.Cleanup(func() { _, _ = u.Close(), l.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			_, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = u.WriteToUDPAddrPort([]byte(name+" < "+from.Addr().String()), from)
		}
	}()
	labtest.Serve(l, func(c net.Conn) {
		b := make([]byte, 2048)
		from, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			if _, err := c.Write([]byte(name + " < " + from)); err != nil {
				return
			}
		}
	})
}

const patience = 300 * time.Millisecond

// dial opens a connection from one address to another.
func (n *network) dial(h *labtest.Host, proto string, from, to netip.AddrPort) (net.Conn, error) {
	var c net.Conn
	err := h.Host.Do(func() (err error) {
		d := net.Dialer{Timeout: patience}
		if proto == "tcp" {
			d.LocalAddr = net.TCPAddrFromAddrPort(from)
		} else {
			d.LocalAddr = net.UDPAddrFromAddrPort(from)
		}
		c, err = d.DialContext(context.Background(), proto, to.String())
		return err
	})
	return c, err
}

// ask sends one message over c and returns the answer.
func ask(c net.Conn) (string, error) {
	if _, err := c.Write([]byte("?")); err != nil {
		return "", err
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 2048)
	m, err := c.Read(b)
	return string(b[:m]), err
}

// try opens a connection, asks, and says what came of it: the answer, "refused" or
// "silence".
func (n *network) try(h *labtest.Host, proto string, from netip.Addr, to netip.AddrPort) string {
	n.t.Helper()
	c, err := n.dial(h, proto, netip.AddrPortFrom(from, 0), to)
	answer := ""
	if err == nil {
		answer, err = ask(c)
		_ = c.Close()
	}
	switch {
	case err == nil:
		return answer
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.EPERM): // dropped on its way out of the host
		return "silence"
	case errors.Is(err, os.ErrDeadlineExceeded) || strings.Contains(err.Error(), "timeout"):
		return "silence"
	}
	return err.Error()
}

func (n *network) ping(h *labtest.Host, from, to netip.Addr) bool {
	_, err := h.Try("ping", "-c1", "-W1", "-I", from.String(), to.String())
	return err == nil
}

func (n *network) setFirewall(f netstate.Firewall) int {
	n.t.Helper()
	var changed int
	n.gw.Do(func() (err error) { changed, err = n.nft.SetFirewall(context.Background(), f); return err })
	return changed
}

func (n *network) setServices(s netstate.Services) int {
	n.t.Helper()
	var changed int
	n.gw.Do(func() (err error) { changed, err = n.nft.SetServices(context.Background(), s); return err })
	return changed
}

func (n *network) observe() Observation {
	n.t.Helper()
	var o Observation
	n.gw.Do(func() (err error) { o, err = n.nft.Observe(context.Background()); return err })
	return o
}

// firewall is the two sites and two devices with the given access.
func firewall(access netstate.Access) netstate.Firewall {
	return netstate.Firewall{
		Pods: prefixes("10.0.0.0/24", "fd00::/64"), Services: prefixes("10.96.0.0/24", "fd06::/112"), Nodes: prefixes("192.0.2.9/32", "fd04::9/128"),
		Tunnels: []netstate.Tunnel{
			{Name: "site default/a", Kind: netstate.TunnelSite, Link: "cvtwg0", Prefixes: prefixes("172.16.1.0/24", "fd01:1::/64"), Access: access},
			{Name: "site default/b", Kind: netstate.TunnelSite, Link: "cvtwg1", Prefixes: prefixes("172.16.2.0/24", "fd01:2::/64")},
			{Name: "device default/a", Kind: netstate.TunnelDevice, Link: "cvtwg0", Prefixes: prefixes("172.18.0.5/32", "fd02::5/128"), Access: access},
			{Name: "device default/b", Kind: netstate.TunnelDevice, Link: "cvtwg1", Prefixes: prefixes("172.18.0.6/32", "fd02::6/128")},
		},
		Pools: []netstate.Pool{{Link: "cvtwg0", Prefixes: prefixes("172.18.0.0/24", "fd02::/64")}},
	}
}

func services(ports ...netstate.ServicePort) netstate.Services {
	return netstate.Services{
		Mode: netstate.ServicesTranslate, Ranges: prefixes("10.96.0.0/24", "fd06::/112"), Pods: prefixes("10.0.0.0/24", "fd00::/64"),
		Sources: []string{"cvtwg0", "cvtwg1"}, Ports: ports,
	}
}

// servicePorts is the service in both families and protocols, answered by places.
func servicePorts(affinity int, names ...string) []netstate.ServicePort {
	var out []netstate.ServicePort
	for _, f := range []int{4, 6} {
		for _, proto := range []netstate.Protocol{netstate.TCP, netstate.UDP} {
			p := netstate.ServicePort{Name: "default/echo", Address: places["service"].of(f), Protocol: proto, Port: 80, AffinitySeconds: affinity}
			for _, name := range names {
				p.Endpoints = append(p.Endpoints, netip.AddrPortFrom(places[name].of(f), echoPort))
			}
			out = append(out, p)
		}
	}
	return out
}

// everyFamily runs f for TCP and UDP over IPv4 and IPv6.
func everyFamily(t *testing.T, f func(t *testing.T, family int, proto string)) {
	for _, family := range []int{4, 6} {
		for _, proto := range []string{"tcp", "udp"} {
			t.Run(fmt.Sprintf("%s%d", proto, family), func(t *testing.T) { f(t, family, proto) })
		}
	}
}

// transparent listens with IP_TRANSPARENT in the gateway.
func (n *network) transparent(at netip.AddrPort) net.Listener {
	n.t.Helper()
	var l net.Listener
	n.gw.Do(func() (err error) {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
			var set error
			err := c.Control(func(fd uintptr) {
				if at.Addr().Is4() {
					set = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
				} else {
					set = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
				}
			})
			return errors.Join(err, set)
		}}
		l, err = lc.Listen(context.Background(), "tcp", at.String())
		return err
	})
	return l
}
