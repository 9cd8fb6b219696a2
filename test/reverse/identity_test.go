package reverse

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/hub"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// knock connects to an address with a certificate and a protocol, and asks for the target:
// by a stream, or by CONNECT when there is no protocol. Nil: it got through.
func (n *tenant) knock(address, protocol string, certificate *tls.Certificate, to string) error {
	config := identity.Dial(n.holder(pki.Client, "x"), "h0-"+n.uid, protocol)
	config.GetClientCertificate, config.VerifyConnection = nil, nil
	config.NextProtos = nil
	if protocol != "" {
		config.NextProtos = []string{protocol}
	}
	if certificate != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	}
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	if protocol == "" || protocol == wire.ALPNHTTP {
		_, err := handshake(conn, to)
		return err
	}
	s := mux.New(conn, mux.Config{Dialer: true})
	defer s.Close()
	st, err := s.Open(wire.Open{Kind: wire.StreamTarget, Timeout: time.Second, Target: to}.Append(nil))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if _, err = st.Answer(ctx); err != nil {
		var reset *mux.ResetError
		if errors.As(err, &reset) {
			return wire.ParseRefusal(reset.Reason)
		}
	}
	return err
}

// Who is not who it should be reaches nothing, and is told within a second.
func TestWrongIdentities(t *testing.T) {
	n, other := newTenant(t, "u1"), newTenant(t, "u2")
	n.startHubs(1)
	n.startSpoke("a")
	var dials atomic.Int64
	to := serve(t, func(c *net.TCPConn) { dials.Add(1); _ = c.Close() })
	h := n.hubs[0]
	certificate := func(n *tenant, role pki.Role, name string) *tls.Certificate {
		return n.holder(role, name).Get().Certificate
	}
	expired := n.issued(pki.Client, "late", time.Now().Add(-8*24*time.Hour))
	future := n.issued(pki.Client, "early", time.Now().Add(8*time.Hour))
	// One who signs for the right UID, but is nobody.
	impostor := newTenant(t, "u1")
	cases := map[string]struct {
		listener net.Listener
		protocol string
		c        *tls.Certificate
		ok       bool
	}{
		"client":                           {h.clients, "", certificate(n, pki.Client, "c"), true},
		"client, http/1.1":                 {h.clients, wire.ALPNHTTP, certificate(n, pki.Client, "c"), true},
		"client session":                   {h.clients, wire.ALPNClient, certificate(n, pki.Client, "c"), true},
		"no certificate":                   {h.clients, "", nil, false},
		"no certificate, session":          {h.clients, wire.ALPNClient, nil, false},
		"no certificate at spokes' port":   {h.spokes, wire.ALPNSpoke, nil, false},
		"spoke at clients' port":           {h.clients, "", certificate(n, pki.Spoke, "a"), false},
		"spoke at clients' port, session":  {h.clients, wire.ALPNClient, certificate(n, pki.Spoke, "a"), false},
		"spoke asks for a target":          {h.spokes, wire.ALPNSpoke, certificate(n, pki.Spoke, "a"), false},
		"spokes' protocol, clients' port":  {h.clients, wire.ALPNSpoke, certificate(n, pki.Spoke, "a"), false},
		"clients' protocol, spokes' port":  {h.spokes, wire.ALPNClient, certificate(n, pki.Client, "c"), false},
		"no protocol at spokes' port":      {h.spokes, "", certificate(n, pki.Client, "c"), false},
		"client at spokes' port":           {h.spokes, wire.ALPNSpoke, certificate(n, pki.Client, "c"), false},
		"hub as client":                    {h.clients, "", certificate(n, pki.Hub, "0"), false},
		"other tenant's client":            {h.clients, "", certificate(other, pki.Client, "c"), false},
		"other tenant's spoke":             {h.spokes, wire.ALPNSpoke, certificate(other, pki.Spoke, "a"), false},
		"impostor's client":                {h.clients, "", certificate(impostor, pki.Client, "c"), false},
		"expired":                          {h.clients, "", expired, false},
		"not yet valid":                    {h.clients, "", future, false},
		"join protocol, no token, no cert": {h.clients, wire.ALPNJoin, nil, false},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			before := dials.Load()
			began := time.Now()
			err := n.knock(c.listener.Addr().String(), c.protocol, c.c, to)
			if took := time.Since(began); took > time.Second {
				t.Errorf("it took %s", took)
			}
			if c.ok != (err == nil) {
				t.Errorf("%v", err)
			}
			time.Sleep(20 * time.Millisecond)
			if dialled := dials.Load() - before; !c.ok && dialled != 0 {
				t.Errorf("%d dials of the target", dialled)
			}
		})
	}
}

// issued makes a certificate at another time.
func (n *tenant) issued(role pki.Role, name string, at time.Time) *tls.Certificate {
	n.t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		n.t.Fatal(err)
	}
	der, err := n.authority.Issue(pki.Request{Identity: pki.Identity{UID: n.uid, Role: role, Name: name}, PublicKey: key.Public(), Now: at})
	if err != nil {
		n.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		n.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// A spoke does not take another for its hub: not a spoke, not another replica, not another
// tenant's hub.
func TestWrongHub(t *testing.T) {
	n, other := newTenant(t, "u1"), newTenant(t, "u2")
	h := n.holder(pki.Spoke, "a")
	for name, c := range map[string]*tls.Certificate{
		"another replica":    n.holder(pki.Hub, "1").Get().Certificate,
		"a spoke":            n.holder(pki.Spoke, "b").Get().Certificate,
		"a client":           n.holder(pki.Client, "b").Get().Certificate,
		"other tenant's hub": other.holder(pki.Hub, "0").Get().Certificate,
	} {
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*c}, NextProtos: []string{wire.ALPNSpoke}, MinVersion: tls.VersionTLS13})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := l.Accept()
			if err == nil {
				_ = c.(*tls.Conn).Handshake()
				_, _ = io.Copy(io.Discard, c)
			}
		}()
		conn, err := tls.Dial("tcp", l.Addr().String(), identity.Dial(h, "h0-u1", wire.ALPNSpoke))
		if err == nil {
			_ = conn.Close()
			t.Errorf("%s: taken for the hub", name)
		}
		_ = l.Close()
	}
}

// Two tenants with the same ranges reach their own targets only.
func TestTenantsAreApart(t *testing.T) {
	a, b := newTenant(t, "u1"), newTenant(t, "u2")
	for _, n := range []*tenant{a, b} {
		n.startHubs(1)
		n.startSpoke("s")
	}
	to := serve(t, echo)
	if err := a.knock(a.hubs[0].clients.Addr().String(), "", a.holder(pki.Client, "c").Get().Certificate, to); err != nil {
		t.Error(err)
	}
	// With the other's certificate, and at the other's hub.
	if a.knock(a.hubs[0].clients.Addr().String(), "", b.holder(pki.Client, "c").Get().Certificate, to) == nil ||
		a.knock(b.hubs[0].clients.Addr().String(), "", a.holder(pki.Client, "c").Get().Certificate, to) == nil {
		t.Error("a tenant got through the other one's hub")
	}
}

// Revocation closes what is open, and lets nobody in again.
func TestRevocation(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	h := n.hubs[0]
	now := *h.holder.Get()
	now.Revoked = pki.Revocations{{Role: pki.Spoke, Name: "a", Before: time.Now().Add(time.Second)}}
	h.holder.Set(&now)
	if closed := h.Recheck(); closed < 2 {
		t.Errorf("%d connections were closed", closed)
	}
	n.eventually("the spoke is gone", func() error {
		if h.Ready() == nil {
			return errors.New("it is still there")
		}
		return nil
	})
	time.Sleep(2 * time.Second) // it tries again meanwhile
	if err := h.Ready(); err == nil {
		t.Error("it is back")
	}
}

// A hub's policy and a spoke's are both needed, and changes count for new connections.
func TestPolicyAtBothEnds(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	s := n.startSpoke("a")
	e := n.startEgress()
	to := serve(t, echo)
	try := func(want string) {
		t.Helper()
		c, err := e.connect(to)
		if err == nil {
			_ = c.Close()
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	try("")
	n.policy.Rules = nil
	n.hubs[0].Set(n.settings())
	try("403")
	n.policy = everything
	n.hubs[0].Set(n.settings())
	try("")
	s.SetPolicy(&policy.Policy{})
	try("403")
}

// Exports: a listener at the spoke comes out at its target on the hub's side, and only
// there.
func TestExports(t *testing.T) {
	n := newTenant(t, "u1")
	to := serve(t, echo)
	n.exports = []hub.Export{{Listener: wire.Listener{Name: "api", Listen: "127.0.0.1:0"}, Target: to}}
	n.startHubs(2)
	s := n.startSpoke("a")
	n.eventually("the export is open", func() error {
		if s.Exports()["api"] == nil {
			return errors.New("not yet")
		}
		return nil
	})
	c, err := net.Dial("tcp", s.Exports()["api"].String())
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, c)
	address := s.Exports()["api"].String()
	// Something that is never dialled is not dialled for an export either.
	n.exports = []hub.Export{{Listener: n.exports[0].Listener, Target: "169.254.169.254:80"}}
	for _, h := range n.hubs {
		h.Set(n.settings())
	}
	if c, err = net.Dial("tcp", address); err == nil { // it may be cut before that
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1))
		_ = c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v", err)
	}
	// An export that is gone is closed.
	n.exports = nil
	for _, h := range n.hubs {
		h.Set(n.settings())
	}
	n.eventually("the export is closed", func() error {
		if c, err := net.Dial("tcp", address); err == nil {
			return errors.Join(errors.New("it listens"), c.Close())
		}
		return nil
	})
}

// Through a corporate proxy, with a password.
func TestThroughAProxy(t *testing.T) {
	var through atomic.Int64
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	labtest.Serve(l, func(c net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil || r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != "Basic dXNlcjpzZWNyZXQ=" {
			_, _ = io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
			return
		}
		up, err := net.Dial("tcp", r.Host)
		if err != nil {
			return
		}
		through.Add(1)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		_, _, _ = mux.Relay(c.(*net.TCPConn), up.(*net.TCPConn))
	})
	n := newTenant(t, "u1")
	n.startHubs(1)
	proxy := func(user string) *link.Dialer {
		return &link.Dialer{Proxy: func(string) (*url.URL, error) { return url.Parse("http://" + user + "@" + l.Addr().String()) }}
	}
	if _, err := proxy("user:wrong").DialContext(t.Context(), n.hubs[0].spokes.Addr().String()); err == nil || !strings.Contains(err.Error(), "407") || strings.Contains(err.Error(), "wrong") {
		t.Errorf("%v", err)
	}
	conn, err := proxy("user:secret").DialContext(t.Context(), n.hubs[0].spokes.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(conn, identity.Dial(n.holder(pki.Spoke, "a"), "h0-u1", wire.ALPNSpoke))
	if err := c.Handshake(); err != nil || through.Load() != 1 {
		t.Errorf("%v, %d connections through the proxy", err, through.Load())
	}
	_ = c.Close()
}

// "GET http://…" as Prometheus sends it for targets without TLS.
func TestAbsoluteForm(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	e := n.startEgress()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s", r.Host, r.URL.Path, r.Header.Get("X-Forwarded-For"))
	}))
	defer web.Close()
	to := net.JoinHostPort(target, port(strings.TrimPrefix(web.URL, "http://")))
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		Proxy:       func(*http.Request) (*url.URL, error) { return url.Parse("http://egress") },
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", e.socket) },
	}}
	defer client.CloseIdleConnections()
	for address, want := range map[string]string{
		"http://" + to + "/metrics":      "200 " + to + " /metrics ",
		"http://169.254.169.254/latest/": "403 169.254.169.254 is link-local",
	} {
		r, err := client.Get(address)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(r.Body)
		_ = r.Body.Close()
		if got := fmt.Sprintf("%d %s", r.StatusCode, b); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
}

// Broken heads are refused with a status, and clients that never finish are cut off.
func TestBadClients(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	e := n.startEgress()
	to := serve(t, echo)
	send := func(text string) string {
		t.Helper()
		c, err := net.Dial("unix", e.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(12 * time.Second))
		_, _ = io.WriteString(c, text)
		b, _ := io.ReadAll(io.LimitReader(c, 13))
		return string(b)
	}
	for text, want := range map[string]string{
		"CONNECT " + to + " HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n":                   "HTTP/1.1 400 ",
		"CONNECT " + to + " HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello":               "HTTP/1.1 400 ",
		"CONNECT " + to + " HTTP/9\r\n\r\n":                                           "HTTP/1.1 400 ",
		"CONNECT " + to + " HTTP/1.1\r\nX: " + strings.Repeat("y", 9000) + "\r\n\r\n": "HTTP/1.1 431 ",
		"CONNECT " + to + " HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 100) + "\r\n":  "HTTP/1.1 431 ",
		"CONNECT 127.1:80 HTTP/1.1\r\n\r\n":                                           "HTTP/1.1 400 ",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n":                     "HTTP/1.1 405 ",
		"\x16\x03\x01\x02\x00":                                                        "HTTP/1.1 400 ",
		"CONNECT " + to + " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n":                      "HTTP/1.1 200 ",
	} {
		if got := send(text); got != want {
			t.Errorf("%.60q: %q, want %q", text, got, want)
		}
	}
	// 500 that stop in the middle of a head; an honest one is served meanwhile.
	slow := make(chan string, 500)
	for range 500 {
		go func() { slow <- send("CONNECT " + to + " HTTP/1.1\r\nHost") }()
	}
	time.Sleep(200 * time.Millisecond)
	began := time.Now()
	c, err := e.connect(to)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("an honest client waited for %s", took)
	}
	for range 500 {
		if got := <-slow; got != "HTTP/1.1 400 " {
			t.Errorf("slow client: %q", got)
			break
		}
	}
}
