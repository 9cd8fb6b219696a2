package relay

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// childEnv makes the test binary a relay process inside the gateway's namespace: Go opens
// sockets on whatever thread it likes, so one namespace per process is what is certain.
const childEnv = "CULVERT_RELAY_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		serveChild()
		return
	}
	goleak.VerifyTestMain(m)
}

// request is one line to the relay process; reply is one line back.
type request struct {
	Options  *Options           // New
	Set      *netstate.Services // Set
	Close    bool               // Close and look for leaked goroutines
	Observe  bool
	Resource bool
}

type reply struct {
	Changed     int
	Stats       Stats
	Error       string
	Descriptors int
	Goroutines  int
	GoBytes     uint64 // heap and stacks in use
	RSSBytes    uint64
}

func serveChild() {
	var r *Relay
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var q request
		if err := in.Decode(&q); err != nil {
			os.Exit(0)
		}
		var a reply
		var err error
		ctx := context.Background()
		switch {
		case q.Options != nil:
			r = New(*q.Options)
		case q.Set != nil:
			a.Changed, err = r.Set(ctx, *q.Set)
		case q.Observe:
			a.Stats, err = r.Observe(ctx)
		case q.Close:
			err = errors.Join(r.Close(), goleak.Find())
		}
		if q.Resource || q.Close {
			a.measure()
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := out.Encode(a); err != nil {
			os.Exit(1)
		}
	}
}

func (a *reply) measure() {
	runtime.GC()
	fds, _ := os.ReadDir("/proc/self/fd")
	a.Descriptors = len(fds) - 1
	a.Goroutines = runtime.NumGoroutine()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	a.GoBytes = m.HeapAlloc + m.StackInuse
	b, _ := os.ReadFile("/proc/self/statm")
	var size, resident uint64
	_, _ = fmt.Sscan(string(b), &size, &resident)
	a.RSSBytes = resident * uint64(os.Getpagesize())
}

// network is client — gateway with a relay — pods. Pods have no route to the client.
type network struct {
	t                     *testing.T
	client, gateway, pods *labtest.Host
	in                    io.WriteCloser
	out                   *bufio.Reader
}

const ruleset = `
table inet relaytest {
	chain prerouting {
		type filter hook prerouting priority mangle
		iifname tun0 ip daddr 10.96.0.0/16 meta l4proto { tcp, udp } tproxy ip to 127.0.0.1:%[1]d meta mark set %#[2]x accept
		iifname tun0 ip6 daddr fd96::/112 meta l4proto { tcp, udp } tproxy ip6 to [::1]:%[1]d meta mark set %#[2]x accept
	}
}
`

func newNetwork(t *testing.T, opts Options) *network {
	t.Helper()
	l := labtest.New(t, "nft")
	n := &network{t: t, client: l.Host("client"), gateway: l.Host("gw"), pods: l.Host("pods")}
	l.Connect(n.client, "eth0", "10.1.0.2/24 10.1.0.3/24 fd01::2/64", n.gateway, "tun0", "10.1.0.1/24 fd01::1/64")
	l.Connect(n.gateway, "eth0", "10.2.0.1/24 fd02::1/64",
		n.pods, "eth0", "10.2.0.2/24 10.2.0.3/24 10.2.0.4/24 fd02::2/64 fd02::3/64")
	n.client.IP("route", "add", "10.96.0.0/16", "via", "10.1.0.1")
	n.client.IP("-6", "route", "add", "fd96::/112", "via", "fd01::1")
	for _, f := range []string{"-4", "-6"} {
		mark := fmt.Sprintf("%#x/%#x", netstate.MarkProxy, netstate.MarkMask)
		table := fmt.Sprint(netstate.ProxyTable)
		n.gateway.IP(f, "rule", "add", "fwmark", mark, "lookup", table, "priority", fmt.Sprint(netstate.RulePriorityProxy))
		n.gateway.IP(f, "route", "add", "local", "default", "dev", "lo", "table", table)
	}
	cmd := n.gateway.Command(t.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(ruleset, netstate.RelayPort, netstate.MarkProxy))
	cmd.Stderr = os.Stderr
	if err := errors.Join(n.gateway.Start(cmd), cmd.Wait()); err != nil {
		t.Fatalf("nft: %v", err)
	}
	n.startChild(opts)
	return n
}

func (n *network) startChild(opts Options) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := n.gateway.Command(ctx, os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, n.gateway.Start(cmd)); err != nil {
		cancel()
		n.t.Fatal(err)
	}
	n.in, n.out = in, bufio.NewReader(out)
	n.t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait(); cancel() })
	n.call(request{Options: &opts})
}

func (n *network) call(q request) reply {
	n.t.Helper()
	a, err := n.try(q)
	if err != nil {
		n.t.Fatal(err)
	}
	return a
}

func (n *network) try(q request) (reply, error) {
	var a reply
	b, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	if _, err := n.in.Write(append(b, '\n')); err != nil {
		return a, err
	}
	line, err := n.out.ReadBytes('\n')
	if err != nil {
		return a, fmt.Errorf("the relay process is gone: %w", err)
	}
	if err := json.Unmarshal(line, &a); err != nil {
		return a, err
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// set makes the ports the relayed ones.
func (n *network) set(ports ...netstate.ServicePort) int {
	n.t.Helper()
	return n.call(request{Set: &netstate.Services{Mode: netstate.ServicesProxy, Ports: ports}}).Changed
}

func (n *network) stats() Stats { n.t.Helper(); return n.call(request{Observe: true}).Stats }

func (n *network) resources() reply { n.t.Helper(); return n.call(request{Resource: true}) }

// port makes a service port: port(TCP, "10.96.0.1:80", "10.2.0.2:8080").
func port(p netstate.Protocol, address string, endpoints ...string) netstate.ServicePort {
	a := netip.MustParseAddrPort(address)
	s := netstate.ServicePort{Name: "test/" + address, Address: a.Addr(), Protocol: p, Port: a.Port()}
	for _, e := range endpoints {
		s.Endpoints = append(s.Endpoints, netip.MustParseAddrPort(e))
	}
	return s
}

// dial opens a TCP or UDP socket in the client's namespace.
func (n *network) dial(protocol, address string) net.Conn {
	n.t.Helper()
	c, err := n.tryDial(protocol, "", address)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// tryDial is dial from a given source address ("" for any).
func (n *network) tryDial(protocol, source, address string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	if source != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
		if protocol == "udp" {
			d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(source)}
		}
	}
	err = n.client.Host.Do(func() (err error) { c, err = d.Dial(protocol, address); return err })
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		n.t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// serveTCP runs handle for every connection to an address of the pods' namespace.
func (n *network) serveTCP(address string, handle func(c *net.TCPConn)) {
	n.t.Helper()
	var l net.Listener
	n.pods.Do(func() (err error) { l, err = net.Listen("tcp", address); return err })
	done := make(chan struct{})
	n.t.Cleanup(func() { _ = l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); handle(asTCP(c)) }()
		}
	}()
}

// serveUDP runs handle for every datagram to an address of the pods' namespace.
func (n *network) serveUDP(address string, handle func(c net.PacketConn, from net.Addr, b []byte)) net.PacketConn {
	n.t.Helper()
	var c net.PacketConn
	n.pods.Do(func() (err error) { c, err = net.ListenPacket("udp", address); return err })
	done := make(chan struct{})
	n.t.Cleanup(func() { _ = c.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 1<<16)
		for {
			k, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				handle(c, from, b[:k])
			}
		}
	}()
	return c
}

func asTCP(c net.Conn) *net.TCPConn {
	tcp, _ := c.(*net.TCPConn)
	return tcp
}

func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// name serves the text s to every connection.
func name(s string) func(*net.TCPConn) {
	return func(c *net.TCPConn) { _, _ = io.WriteString(c, s) }
}

// ask writes one line and reads what comes back at once.
func ask(t *testing.T, c net.Conn, s string) string {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatalf("write %q: %v", s, err)
	}
	b := make([]byte, 1<<16)
	k, err := c.Read(b)
	if err != nil {
		t.Fatalf("read the answer to %q: %v", s, err)
	}
	return string(b[:k])
}
