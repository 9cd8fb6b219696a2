package front

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Each limit refuses what is over it and nothing else, and gives back what is closed.
func TestLimits(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com", "b.example.com")
	a := newServer(t, "a", &cert, nil)
	routes := []Route{routeTo("a.example.com", a), routeTo("b.example.com", a)}
	for name, c := range map[string]struct {
		opts    Options
		tenants []Tenant
		reason  Reason
		alert   tls.AlertError // for one too many; 0: reset
		other   bool           // the other tenant goes on
	}{
		"total":           {Options{MaxConnections: 3}, nil, Limit, alertInternalError, false},
		"source":          {Options{MaxConnectionsPerSource: 3}, nil, SourceLimit, 0, false},
		"tenant":          {Options{MaxConnectionsPerTenant: 3}, nil, TenantLimit, alertInternalError, true},
		"tenant's own":    {Options{}, []Tenant{{Name: "a.example.com", MaxConnections: 3}}, TenantLimit, alertInternalError, true},
		"source's rate":   {Options{SourceRate: .001, SourceBurst: 3}, nil, SourceRate, 0, false},
		"tenant's rate":   {Options{TenantRate: .001, TenantBurst: 3}, nil, TenantRate, alertInternalError, true},
		"rate of its own": {Options{}, []Tenant{{Name: "a.example.com", ConnectionsPerSecond: .001, ConnectionsBurst: 3}}, TenantRate, alertInternalError, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, c.opts)
			if _, err := f.Set(t.Context(), Table{Routes: routes, Tenants: c.tenants}); err != nil {
				t.Fatal(err)
			}
			var open []*tls.Conn
			for i := range 3 {
				secure, _, err := ca.try(f.address, "a.example.com")
				if err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
				open = append(open, secure)
			}
			if _, _, err := ca.try(f.address, "a.example.com"); err == nil || alertOf(err) != c.alert {
				t.Errorf("one too many: %v", err)
			}
			f.record(reasonIs(c.reason))
			if _, _, err := ca.try(f.address, "b.example.com"); (err == nil) != c.other {
				t.Errorf("the other tenant: %v", err)
			}
			for _, secure := range open {
				if err := echo(secure, []byte("alive")); err != nil {
					t.Error(err)
				}
				_ = secure.Close()
			}
			if strings.Contains(name, "rate") {
				return
			}
			eventually(t, 5*time.Second, "room again", func() error {
				_, _, err := ca.try(f.address, "a.example.com")
				return err
			})
		})
	}
}

// Who does not say where to is displaced by newer ones; who says it at once never is.
func TestOldestPendingIsDisplaced(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	for name, opts := range map[string]Options{"total": {MaxPending: 5, MaxPendingPerSource: -1}, "source": {MaxPendingPerSource: 5}} {
		t.Run(name, func(t *testing.T) {
			f := start(t, opts, routeTo("a.example.com", a))
			var slow []*net.TCPConn
			for range 20 {
				conn := dial(t, f.address)
				_, _ = conn.Write([]byte{22, 3})
				slow = append(slow, conn)
				if _, _, err := ca.hello(dial(t, f.address), "a.example.com"); err != nil {
					t.Fatal(err)
				}
			}
			_, pending := f.Counts()
			if pending > 5 {
				t.Errorf("%d pending", pending)
			}
			for i, conn := range slow[:14] {
				_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
				var timeout net.Error
				if _, err := conn.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
					t.Errorf("the slow one number %d is still there: %v", i, err)
				}
			}
			f.record(reasonIs(Displaced))
		})
	}
}

func TestTimeouts(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	plain := newServer(t, "plain", nil, nil)
	silent := newServer(t, "silent", nil, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) })
	tcp := routeTo("vpn.example.com", plain)
	tcp.Content = ContentTCP
	f := start(t, Options{HeaderTimeout: 200 * time.Millisecond, HandshakeTimeout: 300 * time.Millisecond, IdleTimeout: time.Second},
		routeTo("a.example.com", a), routeTo("plain.example.com", plain), routeTo("silent.example.com", silent), tcp)
	const hello = "\x16\x03\x01\x00\xc8\x01"
	whole := string(helloFor(t, "plain.example.com"))
	for name, c := range map[string]struct {
		send   string
		reason Reason
	}{
		"nothing":           {"", HeaderTimeout},
		"a byte":            {"\x16", HeaderTimeout},
		"half a hello":      {hello, HeaderTimeout},
		"half a request":    {"CONNECT a.example.com:443 HTTP/1.1\r\nHost:", HeaderTimeout},
		"hello, then quiet": {whole, HandshakeTimeout},
		"no backend's word": {string(helloFor(t, "silent.example.com")), HandshakeTimeout},
		"CONNECT, quiet":    {connectTo("a.example.com:443", "a.example.com"), HeaderTimeout},
		"TCP, idle":         {connectTo("vpn.example.com:443", "vpn.example.com"), IdleTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			conn := dial(t, f.address)
			_, _ = io.WriteString(conn, c.send)
			_, _ = io.Copy(io.Discard, conn)
			if took := time.Since(begin); took > 4*time.Second || took < 150*time.Millisecond {
				t.Errorf("cut after %s", took)
			}
			f.record(func(r map[string]any) bool {
				return r["reason"] == string(c.reason) && r["source"] == conn.LocalAddr().String()
			})
		})
	}
	// One that moves now and then is not idle.
	secure, _, err := ca.hello(dial(t, f.address), "a.example.com")
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		time.Sleep(400 * time.Millisecond)
		if err := echo(secure, []byte("alive")); err != nil {
			t.Fatal(err)
		}
	}
}

// One customer is an address, or an IPv6 /64.
func TestSourceKey(t *testing.T) {
	for a, want := range map[string]string{
		"192.0.2.7":               "192.0.2.7",
		"::ffff:192.0.2.7":        "192.0.2.7",
		"2001:db8:0:1:2:3:4:5":    "2001:db8:0:1::",
		"2001:db8:0:1:ffff::1":    "2001:db8:0:1::",
		"fe80::1%eth0":            "fe80::",
		"2001:db8:0:2::1":         "2001:db8:0:2::",
		"::ffff:198.51.100.1%lo0": "198.51.100.1",
	} {
		if got := sourceKey(netip.MustParseAddr(a)); got.String() != want {
			t.Errorf("%s counts as %s, want %s", a, got, want)
		}
	}
}
