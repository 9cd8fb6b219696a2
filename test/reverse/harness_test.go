// Package reverse tests the reversed tunnel as a whole, in one process: client, egress,
// hubs, spokes and targets, over loopback, with delays and deaths made to order.
package reverse

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/reverse/dial"
	"github.com/culvert-vpn/culvert/internal/reverse/egress"
	"github.com/culvert-vpn/culvert/internal/reverse/hub"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/spoke"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// target is an address that stands for this host in the remote cluster: loopback itself
// is never dialled.
const target = "10.9.8.7"

// blackhole is one that never answers.
const blackhole = "10.6.6.6"

// blackholeOnce stands for this host, too, but does not answer the first that dials it.
const blackholeOnce = "10.6.6.7"

var dialledOnce atomic.Bool

// tenant is one RemoteCluster: its authority, hubs and members.
type tenant struct {
	t         testing.TB
	uid       string
	authority *pki.Authority
	policy    policy.Policy
	exports   []hub.Export
	hubs      []*hubProcess
	delay     *delay // between spokes and hubs; nil: none
	most      int    // connections to each hub
}

var everything = policy.Policy{Rules: []policy.Rule{{
	CIDRs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
	Names: []string{"*.example.com"},
	Ports: []policy.Ports{{First: 1, Last: 65535}},
}}}

func newTenant(t testing.TB, uid string) *tenant {
	t.Helper()
	a, err := pki.NewAuthority(uid, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &tenant{t: t, uid: uid, authority: a, policy: everything, most: 8}
}

// holder makes credentials.
func (n *tenant) holder(role pki.Role, name string) *identity.Holder {
	n.t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		n.t.Fatal(err)
	}
	r := pki.Request{Identity: pki.Identity{UID: n.uid, Role: role, Name: name}, PublicKey: key.Public(), Now: time.Now()}
	if role == pki.Hub {
		i, _ := strconv.Atoi(name)
		r.DNSNames = []string{wire.HubServerName(n.uid, i, "")}
	}
	der, err := n.authority.Issue(r)
	if err != nil {
		n.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		n.t.Fatal(err)
	}
	h := &identity.Holder{}
	h.Set(&identity.Credentials{
		UID: n.uid, Certificate: &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf},
		Authorities: []*x509.Certificate{n.authority.Certificate},
	})
	return h
}

// logger discards: what is checked is behaviour.
func (n *tenant) logger() *slog.Logger { return slog.New(slog.DiscardHandler) }

// hubProcess is a hub with its listeners; kill ends it as SIGKILL would.
type hubProcess struct {
	*hub.Hub
	holder          *identity.Holder
	spokes, clients net.Listener
	conns           *conns
	kill            func()
}

// startHubs starts n hubs that know of each other.
func (n *tenant) startHubs(count int) {
	n.t.Helper()
	for i := range count {
		h := &hubProcess{holder: n.holder(pki.Hub, strconv.Itoa(i)), conns: &conns{}}
		h.Hub = hub.New(hub.Options{Holder: h.holder, Logger: n.logger(), Dial: toLoopback})
		h.spokes, h.clients = h.conns.listen(n.t), h.conns.listen(n.t)
		n.hubs = append(n.hubs, h)
	}
	for _, h := range n.hubs {
		h.Set(n.settings())
		n.run(h)
	}
}

func (n *tenant) run(h *hubProcess) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = h.ServeSpokes(ctx, h.spokes) })
	wg.Go(func() { _ = h.ServeClients(ctx, h.clients) })
	var once sync.Once
	h.kill = func() {
		once.Do(func() {
			cancel()
			h.conns.cut()
			wg.Wait()
		})
	}
	n.t.Cleanup(h.kill)
}

func (n *tenant) settings() *hub.Settings {
	s := &hub.Settings{Policy: n.policy, Exports: n.exports}
	for i, h := range n.hubs {
		name := wire.HubServerName(n.uid, i, "")
		s.Hubs = append(s.Hubs, wire.HubAddress{Address: h.spokes.Addr().String(), ServerName: name})
		s.ClientHubs = append(s.ClientHubs, wire.HubAddress{Address: h.clients.Addr().String(), ServerName: name})
	}
	return s
}

// links are the options of a spoke or an egress.
func (n *tenant) links(h *identity.Holder, protocol, name string, c *conns) link.Options {
	path := n.delay
	d := &link.Dialer{
		Proxy: func(string) (*url.URL, error) { return nil, nil }, //nolint:nilnil // no proxy
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			if protocol == wire.ALPNSpoke && path != nil {
				conn = path.wrap(conn)
			}
			return c.add(conn), nil
		},
	}
	return link.Options{
		Dialer: d, TLS: func(s string) *tls.Config { return identity.Dial(h, s, protocol) },
		Hello: wire.Hello{Name: name}, Least: 2, Most: n.most, Logger: n.logger(),
	}
}

// member is a spoke or an egress; kill ends it as SIGKILL would.
type member struct {
	conns *conns
	kill  func()
	stop  func() // in good order
}

func (n *tenant) start(run func(context.Context) error, c *conns) *member {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { _ = run(ctx); close(done) }()
	m := &member{conns: c}
	m.kill = func() {
		cancel()
		c.cut()
		<-done
	}
	m.stop = func() { cancel(); <-done }
	n.t.Cleanup(m.kill)
	return m
}

// spokeProcess is a running spoke.
type spokeProcess struct {
	*spoke.Spoke
	*member
}

func (n *tenant) startSpoke(name string) *spokeProcess {
	n.t.Helper()
	c := &conns{}
	h := n.holder(pki.Spoke, name)
	s := spoke.New(spoke.Options{
		Links: n.links(h, wire.ALPNSpoke, name, c), Hubs: n.settings().Hubs[:1], Logger: n.logger(),
		Dialer: dial.Dialer{Dial: toLoopback, Lookup: lookup},
	})
	s.SetPolicy(&n.policy)
	p := &spokeProcess{s, n.start(s.Run, c)}
	n.eventually("the spoke is connected to every hub", func() error {
		for i, h := range n.hubs {
			found := 0
			for _, p := range h.Peers() {
				if p.Role == pki.Spoke && p.Name == name {
					found += p.Connections
				}
			}
			if found < 2 {
				return fmt.Errorf("%d connections to hub %d", found, i)
			}
		}
		return s.Ready()
	})
	return p
}

// egressProcess is a running egress.
type egressProcess struct {
	*egress.Egress
	*member
	socket string
}

func (n *tenant) startEgress() *egressProcess {
	n.t.Helper()
	c := &conns{}
	h := n.holder(pki.Client, "api")
	e := egress.New(egress.Options{Links: n.links(h, wire.ALPNClient, "api", c), Hubs: n.settings().ClientHubs})
	socket := filepath.Join(n.t.TempDir(), "e")
	l, err := process.ListenUnix(context.Background(), socket, 0o660)
	if err != nil {
		n.t.Fatal(err)
	}
	m := n.start(func(ctx context.Context) error {
		var wg sync.WaitGroup
		wg.Go(func() { _ = e.Serve(ctx, l) })
		err := e.Run(ctx)
		wg.Wait()
		return err
	}, c)
	p := &egressProcess{e, m, socket}
	n.eventually("the egress is connected to every hub", func() error {
		for i, h := range n.hubs {
			if !strings.Contains(fmt.Sprint(h.Peers()), "api") {
				return fmt.Errorf("not to hub %d", i)
			}
		}
		return e.Ready()
	})
	return p
}

func (n *tenant) eventually(what string, f func() error) {
	n.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: not within 10 s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// connect does what kube-apiserver does: one CONNECT, and then the connection is the
// target's. The status line is the error when it is not exactly 200.
func (p *egressProcess) connect(to string) (net.Conn, error) {
	conn, err := net.Dial("unix", p.socket)
	if err != nil {
		return nil, err
	}
	c, err := handshake(conn, to)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

// connectTLS is CONNECT at a hub's own listener, as curl and Prometheus speak it.
func (n *tenant) connectTLS(h *identity.Holder, to string) (net.Conn, error) {
	config := identity.Dial(h, wire.HubServerName(n.uid, 0, ""), "")
	config.NextProtos, config.VerifyConnection = nil, nil
	conn, err := tls.Dial("tcp", n.hubs[0].clients.Addr().String(), config)
	if err != nil {
		return nil, err
	}
	c, err := handshake(conn, to)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func handshake(conn net.Conn, to string) (net.Conn, error) {
	_ = conn.SetDeadline(time.Now().Add(15 * time.Second))
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", to); err != nil {
		return nil, err
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, err
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, errors.New(res.Status)
	}
	if br.Buffered() > 0 {
		return nil, fmt.Errorf("%d bytes came with the answer", br.Buffered())
	}
	_ = conn.SetDeadline(time.Time{})
	return conn, nil
}

// dialled are all addresses that hubs and spokes have dialled.
var dialled sync.Map

// toLoopback dials the target's address on this host; the black hole never answers.
func toLoopback(ctx context.Context, network, address string) (net.Conn, error) {
	dialled.Store(address, true)
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	if a := ap.Addr().String(); a == blackhole || a == blackholeOnce && dialledOnce.CompareAndSwap(false, true) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return (&net.Dialer{}).DialContext(ctx, network, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), ap.Port()).String())
}

// lookup is the remote cluster's resolver.
func lookup(_ context.Context, _, host string) ([]netip.Addr, error) {
	switch host {
	case "good.example.com":
		return []netip.Addr{netip.MustParseAddr(target)}, nil
	case "metadata.example.com":
		return []netip.Addr{netip.MustParseAddr("169.254.169.254")}, nil
	case "mapped.example.com":
		return []netip.Addr{netip.MustParseAddr("::ffff:127.0.0.1")}, nil
	case "both.example.com":
		return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr(target)}, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// serve runs a target that f serves, and returns its "host:port" in the remote cluster.
func serve(t testing.TB, f func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f(c.(*net.TCPConn))
		}
	}()
	return net.JoinHostPort(target, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
}

// echo sends everything back, through a buffer: between two TCP connections io.Copy takes a pipe
// from a pool that only a garbage collection empties, which a test that counts descriptors sees.
func echo(c *net.TCPConn) {
	_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	_ = c.Close()
}

// conns remembers connections so that they can be cut all at once.
type conns struct {
	mu   sync.Mutex
	list []net.Conn
	dead bool
	ls   []net.Listener
}

func (c *conns) add(conn net.Conn) net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		_ = conn.Close()
	}
	c.list = append(c.list, conn)
	return conn
}

func (c *conns) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	for _, l := range c.ls {
		_ = l.Close()
	}
	for _, conn := range c.list {
		if t, ok := conn.(*net.TCPConn); ok {
			_ = t.SetLinger(0)
		}
		_ = conn.Close()
	}
}

// listen makes a listener whose connections can be cut.
func (c *conns) listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.ls = append(c.ls, l)
	return cutListener{l, c}
}

type cutListener struct {
	net.Listener
	conns *conns
}

// Accept implements net.Listener.
func (l cutListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.conns.add(c), nil
}
