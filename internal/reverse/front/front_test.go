package front

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Each name leads to its own backend and certificate, by SNI and by CONNECT on the same
// port, and the log says so.
func TestEachNameToItsBackend(t *testing.T) {
	ca := newAuthority(t)
	certA, certB := ca.certificate(t, "h0-a.example.com"), ca.certificate(t, "h0-b.example.com")
	a, b := newServer(t, "a", &certA, nil), newServer(t, "b", &certB, nil)
	routeA := routeTo("H0-a.example.com", a)
	routeA.Tenant = "alpha"
	f := start(t, Options{}, routeA, routeTo("h0-b.example.com", b))
	payload := make([]byte, 3<<20)
	_, _ = rand.Read(payload)
	for name, s := range map[string]*server{"h0-a.example.com": a, "h0-b.example.com": b} {
		for _, protocol := range []string{protocolTLS, protocolConnect} {
			conn := dial(t, f.address)
			if protocol == protocolConnect {
				if status, line, err := connect(conn, connectTo(name+":443", name)); status != 200 || line != "200 OK" || err != nil {
					t.Fatalf("%s: %q, %v", name, line, err)
				}
			}
			secure, greeting, err := ca.hello(conn, name)
			if err != nil || greeting != s.name {
				t.Fatalf("%s by %s: %q, %v", name, protocol, greeting, err)
			}
			if err := echo(secure, payload); err != nil {
				t.Fatal(err)
			}
			if err := secure.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, secure); err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
			r := f.record(func(r map[string]any) bool { return r["serverName"] == name && r["protocol"] == protocol })
			tenant := name
			if s == a {
				tenant = "alpha"
			}
			in, _ := r["bytesIn"].(float64)
			out, _ := r["bytesOut"].(float64)
			if r["verdict"] != "relayed" || r["tenant"] != tenant || r["backend"] != s.address || r["source"] != conn.LocalAddr().String() ||
				int(in) < len(payload) || int(out) < len(payload) || in > float64(len(payload)+100_000) {
				t.Errorf("%v", r)
			}
		}
	}
}

// alertOf is the TLS alert that a client was refused with; 0: another error.
func alertOf(err error) tls.AlertError {
	var alert *net.OpError
	if errors.As(err, &alert) && alert.Op == "remote error" {
		var code tls.AlertError
		if errors.As(err, &code) {
			return code
		}
		// crypto/tls has no exported type for what came from the other side.
		for name, code := range map[string]tls.AlertError{"unrecognized name": 112, "internal error": 80, "error decoding message": 50} {
			if strings.Contains(err.Error(), name) {
				return code
			}
		}
	}
	return 0
}

// A hello that comes in pieces, with pauses, is put together.
func TestHelloInPieces(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	f := start(t, Options{}, routeTo("a.example.com", a))
	for _, size := range []int{1, 100, 700} {
		conn := dial(t, f.address)
		_ = conn.SetNoDelay(true)
		secure, greeting, err := ca.hello(&pieces{Conn: conn, size: size}, "a.example.com")
		if err != nil || greeting != "a" {
			t.Fatalf("pieces of %d: %q, %v", size, greeting, err)
		}
		_ = secure.Close()
	}
}

// pieces writes a few bytes at a time, the first two thousand bytes.
type pieces struct {
	net.Conn
	size, written int
}

func (p *pieces) Write(b []byte) (int, error) {
	total := 0
	for len(b) > 0 {
		n := len(b)
		if p.written < 2000 {
			n = min(n, p.size)
			if p.written%50 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		n, err := p.Conn.Write(b[:n])
		total += n
		p.written += n
		if err != nil {
			return total, err
		}
		b = b[n:]
	}
	return total, nil
}

// Names that are not in the table are refused in the words of their protocol.
func TestUnknownNames(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	f := start(t, Options{}, routeTo("a.example.com", a))
	for _, name := range []string{"b.example.com", "example.com", "x.a.example.com"} {
		if _, _, err := ca.hello(dial(t, f.address), name); alertOf(err) != alertUnrecognizedName {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := ca.hello(dial(t, f.address), "127.0.0.1"); alertOf(err) != alertUnrecognizedName { // sends no SNI
		t.Errorf("no name: %v", err)
	}
	for target, want := range map[string]int{
		"b.example.com:443":    404,
		"a.example.com:80":     403,
		"127.0.0.1:443":        403,
		a.address:              403,
		"[::1]:443":            403,
		"localhost:443":        404,
		"169.254.169.254:80":   403,
		"a.example.com.:443":   403,
		"a.example.com:443:80": 400,
	} {
		status, line, err := connect(dial(t, f.address), connectTo(target, target))
		if status != want || err != nil {
			t.Errorf("%s: %q, %v; want %d", target, line, err, want)
		}
	}
	for text, want := range map[string]int{
		"GET / HTTP/1.1\r\nHost: a.example.com\r\n\r\n":                                405,
		"CONNECT a.example.com:443 HTTP/1.1\r\n\r\n":                                   400,
		"CONNECT a.example.com:443 HTTP/1.1\r\nX: " + strings.Repeat("x", 20<<10):      431,
		"CONNECT a.example.com:443 HTTP/1.1\nHost: a.example.com\n\n":                  400,
		"CONNECT a.example.com:443 HTTP/1.0\r\nHost: a.example.com\r\nHost: b\r\n\r\n": 400,
	} {
		if status, line, err := connect(dial(t, f.address), text); status != want || err != nil {
			t.Errorf("%.40q: %q, %v; want %d", text, line, err, want)
		}
	}
	for _, text := range []string{"\x00\x0eopenvpn", "\x80\x2e\x01\x03\x01", "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c", "SSH-2.0-x\r\n"} {
		conn := dial(t, f.address)
		_, _ = io.WriteString(conn, text)
		if got, _ := io.ReadAll(conn); len(got) > 0 && text[0] != 'S' {
			t.Errorf("%q is answered: %q", text, got)
		}
	}
	if n := a.connections.Load(); n != 0 {
		t.Errorf("%d connections reached the backend", n)
	}
}

// SNI, Host and CONNECT target in all combinations of two tenants' names and a foreign
// one: only those get through that agree, and only to the backend of that name.
func TestNamesThatDisagree(t *testing.T) {
	ca := newAuthority(t)
	names := []string{"a.example.com", "b.example.com", "foreign.example.org"}
	cert := ca.certificate(t, names...) // so that no certificate hides a mistake
	a, b := newServer(t, names[0], &cert, nil), newServer(t, names[1], &cert, nil)
	f := start(t, Options{}, routeTo(names[0], a), routeTo(names[1], b))
	for _, target := range names {
		for _, host := range names {
			for _, sni := range names {
				before := a.bytes.Load() + b.bytes.Load()
				conn := dial(t, f.address)
				status, line, err := connect(conn, connectTo(target+":443", host+":443"))
				if err != nil {
					t.Fatal(err)
				}
				what := fmt.Sprintf("target %s, Host %s, SNI %s: %q", target, host, sni, line)
				if served := host == target && target != names[2]; (status == 200) != served {
					t.Errorf("%s", what)
				}
				if status != 200 {
					continue
				}
				_, greeting, err := ca.hello(conn, sni)
				if sni == target && (err != nil || greeting != target) {
					t.Errorf("%s: %q, %v", what, greeting, err)
				}
				if sni == target {
					continue
				}
				if alertOf(err) != alertUnrecognizedName {
					t.Errorf("%s: %v", what, err)
				}
				f.record(func(r map[string]any) bool {
					return r["reason"] == "name-mismatch" && r["verdict"] == "refused" && r["serverName"] == target
				})
				if after := a.bytes.Load() + b.bytes.Load(); after != before {
					t.Errorf("%s: %d bytes reached a backend", what, after-before)
				}
			}
		}
	}
	// What follows CONNECT must be TLS with a name, unless the route says otherwise.
	for _, text := range []string{"SSH-2.0-x\r\n", "CONNECT a.example.com:443 HTTP/1.1\r\n\r\n", "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"} {
		conn := dial(t, f.address)
		if status, _, err := connect(conn, connectTo("a.example.com:443", "a.example.com")); status != 200 || err != nil {
			t.Fatal(status, err)
		}
		_, _ = io.WriteString(conn, text)
		if got, err := io.ReadAll(conn); len(got) != 7 || got[0] != 21 {
			t.Errorf("%q: %q, %v; want an alert", text, got, err)
		}
	}
}

// With content TCP anything may follow CONNECT, from either side, also at once.
func TestConnectContentTCP(t *testing.T) {
	s := newServer(t, "plain", nil, nil)
	r := routeTo("vpn.example.com", s)
	r.Content, r.ConnectPort = ContentTCP, 1194
	f := start(t, Options{HandshakeTimeout: 50 * time.Millisecond}, r)
	conn := dial(t, f.address)
	status, _, err := connect(conn, "CONNECT vpn.example.com:1194 HTTP/1.0\r\n\r\nearly")
	if status != 200 || err != nil {
		t.Fatal(status, err)
	}
	got := make([]byte, len("plain\nearly"))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "plain\nearly" {
		t.Fatalf("%q, %v", got, err)
	}
	time.Sleep(200 * time.Millisecond) // no handshake to be late with
	if err := echo(conn, []byte("more")); err != nil {
		t.Error(err)
	}
	if status, _, _ := connect(dial(t, f.address), connectTo("vpn.example.com:443", "vpn.example.com")); status != 403 {
		t.Errorf("another port: %d", status)
	}
}

// A half-close is passed on in either direction, and the other one goes on.
func TestHalfClose(t *testing.T) {
	size := 1 << 20
	var wg sync.WaitGroup
	for name, handle := range map[string]func(net.Conn){
		"client first": func(conn net.Conn) {
			b, _ := io.ReadAll(conn)
			_, _ = conn.Write(b)
		},
		"backend first": func(conn net.Conn) {
			_ = conn.(*net.TCPConn).CloseWrite()
			b, _ := io.ReadAll(conn)
			if len(b) != size {
				t.Errorf("the backend got %d bytes", len(b))
			}
			wg.Done()
		},
	} {
		t.Run(name, func(t *testing.T) {
			wg.Add(1)
			s := newServer(t, "s", nil, handle)
			r := routeTo("vpn.example.com", s)
			r.Content = ContentTCP
			f := start(t, Options{}, r)
			conn := dial(t, f.address)
			if status, _, err := connect(conn, connectTo("vpn.example.com:443", "vpn.example.com")); status != 200 {
				t.Fatal(err)
			}
			if name == "backend first" {
				if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
			}
			_, _ = conn.Write(make([]byte, size))
			_ = conn.CloseWrite()
			if name == "client first" {
				wg.Done()
				if b, err := io.ReadAll(conn); len(b) != size || err != nil {
					t.Errorf("%d bytes came back, %v", len(b), err)
				}
			}
			wg.Wait()
			f.record(reasonIs(Done))
		})
	}
}

// Of several backends those that fail are passed over; all that fail are a refusal.
func TestBackendsThatFail(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a, b := newServer(t, "a", &cert, nil), newServer(t, "b", &cert, nil)
	r := routeTo("a.example.com", a, b)
	f := start(t, Options{}, r)
	// The one with the fewest connections is taken.
	var open []*tls.Conn
	greetings := map[string]int{}
	for range 10 {
		secure, greeting, err := ca.hello(dial(t, f.address), "a.example.com")
		if err != nil {
			t.Fatal(err)
		}
		greetings[greeting]++
		open = append(open, secure)
	}
	if greetings["a"] != 5 || greetings["b"] != 5 {
		t.Errorf("%v, want 5 each", greetings)
	}
	a.stop()
	for range 10 {
		begin := time.Now()
		_, greeting, err := ca.hello(dial(t, f.address), "a.example.com")
		if err != nil || greeting != "b" || time.Since(begin) > time.Second {
			t.Fatalf("%q, %v after %s", greeting, err, time.Since(begin))
		}
	}
	b.stop()
	if _, _, err := ca.hello(dial(t, f.address), "a.example.com"); alertOf(err) != alertInternalError {
		t.Errorf("%v", err)
	}
	if status, line, _ := connect(dial(t, f.address), connectTo("a.example.com:443", "a.example.com")); status != 502 || !strings.Contains(line, "a.example.com") {
		t.Errorf("%q", line)
	}
	f.record(reasonIs(NoBackend))
	_ = open
}

// A change of the table breaks no connection, also of routes that are gone; what is wrong
// changes nothing.
func TestTableChanges(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com", "b.example.com")
	a, b := newServer(t, "a", &cert, nil), newServer(t, "b", &cert, nil)
	f := start(t, Options{}, routeTo("a.example.com", a))
	old, _, err := ca.hello(dial(t, f.address), "a.example.com")
	if err != nil {
		t.Fatal(err)
	}
	steps := []struct {
		table   Table
		changed int
	}{
		{Table{Routes: []Route{routeTo("a.example.com", a)}}, 0},
		{Table{Routes: []Route{routeTo("a.example.com", b)}}, 1},
		{Table{Routes: []Route{routeTo("b.example.com", b)}}, 2},
	}
	for i, s := range steps {
		if changed, err := f.Set(t.Context(), s.table); changed != s.changed || err != nil {
			t.Errorf("step %d: %d changes, %v; want %d", i, changed, err, s.changed)
		}
		if err := echo(old, []byte("still here")); err != nil {
			t.Errorf("step %d: %v", i, err)
		}
	}
	if _, err := f.Set(t.Context(), Table{Routes: []Route{routeTo("c.example.com")}}); err == nil {
		t.Error("a route without backends is accepted")
	}
	if _, greeting, err := ca.hello(dial(t, f.address), "b.example.com"); greeting != "b" {
		t.Error(err)
	}
	if _, _, err := ca.hello(dial(t, f.address), "a.example.com"); alertOf(err) != alertUnrecognizedName {
		t.Error(err)
	}
	_ = old.Close()
	eventually(t, 5*time.Second, "the tenant of the old route is forgotten", func() error {
		f.limits.mu.Lock()
		defer f.limits.mu.Unlock()
		if f.limits.tenants["a.example.com"] != nil {
			return errors.New("it is known")
		}
		return nil
	})
	_ = f.Close()
	if _, err := f.Set(t.Context(), Table{}); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// helloFor is a ClientHello for the name.
func helloFor(t testing.TB, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	go func() {
		_ = tls.Client(client, &tls.Config{ServerName: name, MinVersion: tls.VersionTLS13}).HandshakeContext(context.Background())
	}()
	b := make([]byte, 4096)
	_ = server.SetDeadline(time.Now().Add(5 * time.Second))
	n, err := server.Read(b) // crypto/tls writes a record at once
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// 100 at once, each with bytes of its own, all exact.
func TestManyAtOnce(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	f := start(t, Options{}, routeTo("a.example.com", a))
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			payload := make([]byte, 300_000)
			_, _ = rand.Read(payload)
			conn, err := net.Dial("tcp", f.address)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
			secure, _, err := ca.hello(conn, "a.example.com")
			if err == nil {
				err = echo(secure, payload)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Close ends what is in any state, and soon.
func TestClose(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	hole := Route{ServerName: "hole.example.com", Backends: []Backend{{Address: "198.51.100.1:9"}}}
	f := start(t, Options{}, routeTo("a.example.com", a), hole)
	quiet := dial(t, f.address)
	secure, _, err := ca.hello(dial(t, f.address), "a.example.com")
	if err != nil {
		t.Fatal(err)
	}
	dialling := dial(t, f.address)
	_, _ = dialling.Write(helloFor(t, "hole.example.com"))
	begin := time.Now()
	_ = f.Close()
	_ = f.Close()
	for name, conn := range map[string]net.Conn{"quiet": quiet, "relayed": secure, "dialling": dialling} {
		var timeout net.Error
		if _, err := io.Copy(io.Discard, conn); errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("%s: still there", name)
		}
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("took %s", took)
	}
	f.stop()
	reasons := []any{}
	for _, r := range f.log.all(t) {
		reasons = append(reasons, r["reason"])
	}
	if !slices.Contains(reasons, any(string(Stopped))) {
		t.Errorf("%v", reasons)
	}
}
