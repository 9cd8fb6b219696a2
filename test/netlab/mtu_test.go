package netlab

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

const bulk = 10 << 20 // bytes

// noICMP makes the internet's router silent: no "fragmentation needed", no "packet too
// big", nothing.
func (n *network) noICMP() {
	n.internet.Run("nft", `table inet silent {
		chain forward { type filter hook forward priority 0; meta l4proto { icmp, icmpv6 } drop; }
		chain output { type filter hook output priority 0; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }
	}`)
}

// bulkBothWays sends 10 MiB each way, over both families, from both ends.
func bulkBothWays(t *testing.T, what string, timeout time.Duration, paths ...path) {
	t.Helper()
	for _, p := range paths {
		up, down, err := transfer(p.from, p.source, p.to, bulk, timeout)
		if err != nil {
			t.Errorf("%s: %s → %s: %v", what, p.from.Name, p.to, err)
			continue
		}
		t.Logf("%s: %s → %s: 10 MiB byte-exact there in %d ms, back in %d ms", what, p.from.Name, p.to, up.Milliseconds(), down.Milliseconds())
	}
}

type path struct {
	from       *labtest.Host
	source, to string
}

// 10 MiB arrive byte-exact in both directions, over underlays of 1280 to 1500 bytes whose
// routers send no ICMP; also when only the far end's link is that small, which nobody
// tells the gateway (FAULTS 28).
func TestUnderlayMTU(t *testing.T) {
	for _, x := range []struct {
		mtu    int
		hidden bool // the gateway's own link has 1500
	}{{1280, false}, {1400, false}, {1500, false}, {1280, true}} {
		name := fmt.Sprint(x.mtu)
		if x.hidden {
			name += " beyond 1500"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNetworkMTU(t, x.mtu)
			if x.hidden {
				n.internet.IP("link", "set", "gateway", "mtu", "1500")
				n.gateway.IP("link", "set", "public", "mtu", "1500")
			}
			n.noICMP()
			g := newGateway(t, n.gateway)
			g.write("gateway.yaml", gatewayYAML())
			g.write("web.yaml", webYAML())
			g.write("berlin.yaml", pskSiteYAML("berlin", berlinCIDRs, "a pre-shared key of berlin"))
			g.run()
			phone, _ := n.dialIn(g, "phone", 2)
			if !x.hidden {
				// What "culvert device config" says.
				phone.IP("link", "set", phone.link, "mtu", fmt.Sprint(max(x.mtu-80, 1280)))
			}
			host := n.dialler("berlin").host
			// The peers' own sockets must not forbid fragments either: it is their packets that
			// the small link takes.
			for _, h := range []*labtest.Host{phone.Host, host} {
				h.Sysctl("net/ipv4/ip_no_pmtu_disc", "1")
			}
			reaches(t, phone.Host, "tcp", at(web1, port), "web-1", 8*time.Second)
			bulkBothWays(t, "WireGuard", 10*time.Second,
				path{phone.Host, "", at(web1, port)}, path{phone.Host, "", at(web1v6, port)},
				path{n.web2, "", at("10.99.0.2", port)})
			// Datagrams of every size up to the tunnel's own MTU.
			for _, size := range []int{1000, 1232, 1252} {
				if err := datagram(phone.Host, at(web1, port), size); err != nil {
					t.Errorf("a datagram of %d bytes: %v", size, err)
				}
			}
			if x.hidden {
				return // strongSwan's socket forbids fragments, and cannot be told not to
			}
			inside(t, host, berlin4, berlin6)
			newStrongSwan(t, host, pskConf("berlin", berlinTS, "a pre-shared key of berlin"))
			bothWays(t, n, host, false, 10*time.Second)
			reachesFrom(t, host, "tcp", berlin6, at(web1v6, port), "web-1", 5*time.Second)
			bulkBothWays(t, "IPsec", 10*time.Second,
				path{host, berlin4, at(web1, port)}, path{host, berlin6, at(web1v6, port)},
				path{n.web2, "", at(berlin4, port)})
		})
	}
}

// datagram sends one and awaits it back; three tries.
func datagram(h *labtest.Host, to string, size int) error {
	c, err := dial(h, "udp", "", to, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	buf := make([]byte, 2048)
	for range 3 {
		if _, err = c.Write([]byte(strings.Repeat("x", size))); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		var n int
		if n, err = c.Read(buf); err == nil && n != size {
			err = fmt.Errorf("%d bytes came back", n)
		}
		if err == nil {
			return nil
		}
	}
	return err
}

// With one packet in twenty lost, both ways, transfers complete.
func TestLossyUnderlay(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", berlinCIDRs, "a pre-shared key of berlin"))
	g.run()
	phone, _ := n.dialIn(g, "phone", 2)
	host := n.dialler("berlin").host
	inside(t, host, berlin4, berlin6)
	newStrongSwan(t, host, pskConf("berlin", berlinTS, "a pre-shared key of berlin"))
	reaches(t, phone.Host, "tcp", at(web1, port), "web-1", 8*time.Second)
	bothWays(t, n, host, false, 10*time.Second)
	n.internet.Run("nft", `table inet lossy {
		counter lost { }
		chain forward { type filter hook forward priority 0; numgen random mod 100 < 5 counter name lost drop; }
	}`)
	bulkBothWays(t, "5 % loss, WireGuard", 60*time.Second, path{phone.Host, "", at(web1, port)})
	bulkBothWays(t, "5 % loss, IPsec", 60*time.Second, path{host, berlin4, at(web1, port)})
	if out := n.internet.Run("nft", "list", "counters"); !strings.Contains(out, "packets") || strings.Contains(out, "packets 0") {
		t.Errorf("nothing was lost: %s", out)
	}
}
