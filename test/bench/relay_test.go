package bench

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/relay"
)

// relayEnv makes the test binary a process that is nothing but the relay of one service: there is no
// gateway without a tunnel.
const relayEnv = "BENCH_RELAY"

// relayAlone serves servicesIP:80 until it is killed.
func relayAlone() int {
	r := relay.New(relay.Options{})
	port := netstate.ServicePort{
		Name: "default/web", Address: netip.MustParseAddr(servicesIP), Protocol: netstate.TCP, Port: 80,
		Endpoints: []netip.AddrPort{netip.MustParseAddrPort(target)},
	}
	if _, err := r.Set(context.Background(), netstate.Services{Mode: netstate.ServicesProxy, Ports: []netstate.ServicePort{port}}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	select {}
}

// relays is the transparent proxy beside HAProxy without a tunnel, which takes most of the time
// of the suite "services".
func relays(brief bool) *suite {
	start := func(name string, up func(*reversal)) contender {
		return contender{name: name, ours: name == "Culvert", start: func(t *testing.T, l *labtest.Lab) candidate { return newRelay(t, l, name, brief, up) }}
	}
	s := &suite{
		name: "relay", title: "Services without a tunnel: site → transparent proxy → pod", against: "Culvert", turns: 6, glances: 25,
		metrics: []metric{{name: "one stream", unit: "Gbit/s"}, {name: "eight", unit: "Gbit/s"}, {name: "CPU", unit: "s/GB", less: true}, {name: "new connections", unit: "1/s"}, {name: "first byte", unit: "ms", less: true}},
		contenders: []contender{
			start("Culvert", culvertRelay),
			start("HAProxy, splice on", haproxyRelay("option splice-request\n  option splice-response")),
			start("HAProxy, splice auto", haproxyRelay("option splice-auto")),
			start("HAProxy", haproxyRelay("")),
		},
	}
	for i := range s.contenders[1:] {
		s.contenders[1+i].absent = needs("haproxy")
	}
	if brief {
		s.turns, s.glances = 1, 1
	}
	return s
}

// relayed is a site, a gateway and a pod in a row.
type relayed struct{ *reversal }

func newRelay(t *testing.T, l *labtest.Lab, name string, brief bool, up func(*reversal)) relayed {
	t.Helper()
	n := hosts.Add(1)
	pod := l.Host(fmt.Sprintf("pod%d", n))
	r := &reversal{name: name, brief: brief, pair: &pair{t: t, a: l.Host(fmt.Sprintf("site%d", n)), b: l.Host(fmt.Sprintf("gateway%d", n)), dir: shortDir(t)}}
	l.Connect(r.a, "eth0", outerA+"/24", r.b, "eth0", outerB+"/24")
	l.Connect(r.b, "pods", "10.50.0.254/24", pod, "eth0", targetIP+"/24")
	r.a.IP("route", "add", servicesIP+"/32", "via", outerB)
	r.b.Sysctl("net/ipv4/ip_forward", "1")
	r.serveAt(pod, target, 'h')
	up(r)
	r.connect = func() (net.Conn, error) { return dial(r.a, "tcp", servicesIP+":80") }
	labtest.Eventually(t, 30*time.Second, "a way to the service by "+name, func() error {
		c, err := r.open()
		if err == nil {
			err = c.Close()
		}
		return err
	})
	return relayed{r}
}

// culvertRelay has the kernel hand connections to the relay as a gateway's rules do (TPROXY).
func culvertRelay(r *reversal) {
	mark := fmt.Sprintf("%#x/%#x", netstate.MarkProxy, netstate.MarkMask)
	table := fmt.Sprint(netstate.ProxyTable)
	r.b.IP("rule", "add", "fwmark", mark, "lookup", table, "priority", fmt.Sprint(netstate.RulePriorityProxy))
	r.b.IP("route", "add", "local", "default", "dev", "lo", "table", table)
	r.b.Run("nft", fmt.Sprintf("table ip bench { chain services { type filter hook prerouting priority mangle; ip daddr %s tcp dport 80 tproxy to 127.0.0.1:%d meta mark set %#x accept; }; }",
		servicesIP, netstate.RelayPort, netstate.MarkProxy))
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	r.program(r.b, "env", relayEnv+"=1", self, "-test.run=^$")
}

func haproxyRelay(options string) func(*reversal) {
	return func(r *reversal) {
		r.b.IP("addr", "add", servicesIP+"/32", "dev", "lo")
		file := r.write("haproxy.cfg", "global\n  nbthread 2\n  maxconn 4000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n  "+options+
			"\nlisten web\n  bind "+servicesIP+":80\n  server pod "+target+"\n")
		r.program(r.b, "haproxy", "-db", "-f", file)
	}
}

func (r relayed) glance(t *testing.T) figures { return r.connections(t, 50) }

func (r relayed) measure(t *testing.T) figures {
	t.Helper()
	out := figures{}
	size := int64(512 << 20)
	if r.brief {
		size = 16 << 20
	}
	cpu := processorTime(r.pids...)
	for streams, name := range map[int]string{1: "one stream", 8: "eight"} {
		seconds, err := r.download(streams, size/int64(streams))
		if err != nil {
			t.Fatalf("%s: %v", r.name, err)
		}
		out[name] = float64(size) * 8 / seconds / 1e9
	}
	out["CPU"] = (processorTime(r.pids...) - cpu) / (2 * float64(size) / 1e9)
	return out
}
