package front

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestParseTable(t *testing.T) {
	table, err := ParseTable([]byte(`
routes:
- serverName: H0-3F2A.front.example.com
  tenant: alpha
  backends:
  - address: hub-0.hub.alpha.svc:8443
    proxyProtocol: V2
  - address: "[2001:db8::1]:8443"
- serverName: vpn.example.com
  content: TCP
  connectPort: 1194
  backends: [{address: "10.0.0.7:1194"}]
tenants:
- name: alpha
  maxConnections: 500
  connectionsPerSecond: 0.5
`))
	if err != nil {
		t.Fatal(err)
	}
	if r := table.Routes[0]; r.ServerName != "h0-3f2a.front.example.com" || r.Tenant != "alpha" || r.ConnectPort != 443 || r.Content != ContentTLS ||
		r.Backends[0].ProxyProtocol != ProxyV2 || r.Backends[1].ProxyProtocol != ProxyNone {
		t.Errorf("%+v", r)
	}
	if r := table.Routes[1]; r.Tenant != "vpn.example.com" || r.ConnectPort != 1194 || r.Content != ContentTCP {
		t.Errorf("%+v", r)
	}
	if _, err := ParseTable(nil); err != nil {
		t.Errorf("an empty table: %v", err)
	}
	const backend = "backends: [{address: '10.0.0.1:1'}]"
	for text, want := range map[string]string{
		"routes: [{serverName: a.b, " + backend + ", weight: 1}]":                                            `unknown field "routes[0].weight"`,
		"routes: [{serverName: a.b, serverName: c.d, " + backend + "}]":                                      "already set in map",
		"routes: [{" + backend + "}]":                                                                        "routes[0].serverName",
		"routes: [{serverName: 10.0.0.1, " + backend + "}]":                                                  "routes[0].serverName",
		"routes: [{serverName: '*.b', " + backend + "}]":                                                     "routes[0].serverName",
		"routes: [{serverName: a.b}]":                                                                        "routes[0].backends: none",
		"routes: [{serverName: a.b, backends: [{address: '10.0.0.1'}]}]":                                     "routes[0].backends[0].address",
		"routes: [{serverName: a.b, backends: [{address: '10.0.0.1:0'}]}]":                                   "no port",
		"routes: [{serverName: a.b, backends: [{address: ':80'}]}]":                                          "routes[0].backends[0].address",
		"routes: [{serverName: a.b, backends: [{address: '127.1:80'}]}]":                                     "routes[0].backends[0].address",
		"routes: [{serverName: a.b, backends: [{address: 'a:1'}, {address: 'a:1'}]}]":                        "twice",
		"routes: [{serverName: a.b, backends: [{address: 'a:1', proxyProtocol: V3}]}]":                       "proxyProtocol: \"V3\"",
		"routes: [{serverName: a.b, content: UDP, " + backend + "}]":                                         "routes[0].content",
		"routes: [{serverName: a.b, " + backend + "}, {serverName: A.B, " + backend + "}]":                   "routes[1].serverName: a.b is routed by routes[0]",
		"routes: [{serverName: a.b, " + backend + "}]\ntenants: [{name: x}]":                                 "tenants[0].name: no route",
		"routes: [{serverName: a.b, " + backend + "}]\ntenants: [{name: a.b, maxConnections: -1}]":           "tenants[0].maxConnections",
		"routes: [{serverName: a.b, " + backend + "}]\ntenants: [{name: a.b}, {name: a.b}]":                  "tenants[1].name",
		"routes: [{serverName: a.b, connectPort: 70000, " + backend + "}]":                                   "connectPort",
		"routes: [{serverName: a.b, " + backend + "}]\ntenants: [{name: a.b, connectionsPerSecond: -0.1}]\n": "connectionsPerSecond",
	} {
		if _, err := ParseTable([]byte(text)); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s:\n  %v\n  want %q in one line", text, err, want)
		}
	}
}

// 20,000 routes of as many tenants are read and put into effect in seconds.
func TestLargeTable(t *testing.T) {
	var b strings.Builder
	b.WriteString("routes:\n")
	for i := range 20_000 {
		fmt.Fprintf(&b, "- serverName: h0-%08d-1b0a-4c9e-9a39-2f7f0c6f8d11.front.example.com\n  tenant: t%d\n  backends: [{address: \"hub-0.hub.t%d.svc:8443\", proxyProtocol: V2}]\n", i, i, i)
	}
	b.WriteString("tenants:\n")
	for i := range 20_000 {
		fmt.Fprintf(&b, "- {name: t%d, maxConnections: 10}\n", i)
	}
	begin := time.Now()
	table, err := ParseTable([]byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	parsed := time.Since(begin)
	f := New(Options{})
	defer f.Close()
	begin = time.Now()
	if changed, err := f.Set(t.Context(), table); changed != 20_000 || err != nil {
		t.Errorf("%d changes, %v", changed, err)
	}
	set := time.Since(begin)
	begin = time.Now()
	if changed, err := f.Set(t.Context(), table); changed != 0 || err != nil {
		t.Errorf("%d changes, %v", changed, err)
	}
	t.Logf("%d KB of YAML in %s, set in %s, set again in %s", b.Len()>>10, parsed, set, time.Since(begin))
	if parsed > 30*time.Second || set > 5*time.Second {
		t.Error("that is too slow")
	}
}
