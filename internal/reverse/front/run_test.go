package front

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
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

// running is a front run as a process runs it.
type running struct {
	address, http string
	log           *records
	stop          func() error
}

func run(t *testing.T, routes string, o RunOptions) *running {
	t.Helper()
	r := &running{address: freePort(t), http: freePort(t), log: &records{}}
	o.Routes, o.Listen, o.HTTP, o.AccessLog = routes, []string{r.address}, r.http, r.log
	o.Logger = newTestLogger(r.log)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	r.stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = r.stop() })
	eventually(t, 5*time.Second, "the front listens", func() error {
		conn, err := net.Dial("tcp", r.address)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	return r
}

func (r *running) get(path string) (status int, body string, err error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://" + r.http + path)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	return response.StatusCode, string(b), err
}

// The file is followed; what is wrong leaves the last good table in effect, says so, and
// breaks nothing.
func TestRunFollowsTheTable(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com", "b.example.com")
	a := newServer(t, "a", &cert, nil)
	dir := t.TempDir()
	table := func(names ...string) string {
		text := "routes:\n"
		for _, n := range names {
			text += fmt.Sprintf("- {serverName: %s, backends: [{address: %q}]}\n", n, a.address)
		}
		return text
	}
	path := writeFile(t, dir, "routes.yaml", table("a.example.com"))
	r := run(t, path, RunOptions{})
	old, _, err := ca.try(r.address, "a.example.com")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	says := func(metric string) {
		t.Helper()
		eventually(t, 5*time.Second, metric, func() error {
			_, body, err := r.get("/metrics")
			if err == nil && !strings.Contains(body, metric+"\n") {
				err = errors.New(body)
			}
			return err
		})
		if err := echo(old, []byte("still here")); err != nil {
			t.Fatal(err)
		}
	}
	says("culvert_front_routes 1")
	writeFile(t, dir, "routes.yaml", table("a.example.com", "b.example.com"))
	says("culvert_front_routes 2")
	if _, _, err := ca.try(r.address, "b.example.com"); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"routes: [", table("a.example.com", "a.example.com"), "nonsense: 1", table("a_.example.com/")} {
		writeFile(t, dir, "routes.yaml", bad)
		says("culvert_front_table_refused 1")
		says("culvert_front_routes 2")
		writeFile(t, dir, "routes.yaml", table("a.example.com", "b.example.com"))
		says("culvert_front_table_refused 0")
	}
	// Gone is not empty.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	says("culvert_front_table_refused 1")
	writeFile(t, dir, "routes.yaml", table("a.example.com", "b.example.com")) // as it was
	says("culvert_front_table_refused 0")
	writeFile(t, dir, "routes.yaml", table("b.example.com"))
	says("culvert_front_table_refused 0")
	says("culvert_front_routes 1")
	if _, _, err := ca.try(r.address, "a.example.com"); alertOf(err) != alertUnrecognizedName {
		t.Error(err)
	}
	// As Kubernetes does it: a link to a directory is replaced.
	links := t.TempDir()
	for _, version := range []string{"1", "2"} {
		if err := os.Mkdir(filepath.Join(links, version), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(links, "1"), "routes.yaml", table("a.example.com"))
	writeFile(t, filepath.Join(links, "2"), "routes.yaml", table("a.example.com", "b.example.com"))
	if err := errors.Join(os.Symlink("1", filepath.Join(links, "data")), os.Symlink("data/routes.yaml", filepath.Join(links, "routes.yaml"))); err != nil {
		t.Fatal(err)
	}
	k := run(t, filepath.Join(links, "routes.yaml"), RunOptions{})
	if err := errors.Join(os.Symlink("2", filepath.Join(links, "new")), os.Rename(filepath.Join(links, "new"), filepath.Join(links, "data"))); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "the new route", func() error {
		conn, _, err := ca.try(k.address, "b.example.com")
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	if !strings.Contains(r.log.String(), "the last good one stays") {
		t.Errorf("nothing is said of the bad table: %s", r.log.String())
	}
}

func TestRunRefusesAtStart(t *testing.T) {
	dir := t.TempDir()
	good := writeFile(t, dir, "good.yaml", "routes: []")
	bad := writeFile(t, dir, "bad.yaml", "routes: [{}]")
	taken, err := net.Listen("tcp", "127.0.0.1:0") // without SO_REUSEPORT
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for want, o := range map[string]RunOptions{
		"bad.yaml: routes[0].serverName":       {Routes: bad, Listen: []string{"127.0.0.1:0"}},
		"no such file":                         {Routes: dir + "/none", Listen: []string{"127.0.0.1:0"}},
		"listen on " + taken.Addr().String():   {Routes: good, Listen: []string{taken.Addr().String()}},
		"serve HTTP on 127.0.0.1:" + "notport": {Routes: good, Listen: []string{"127.0.0.1:0"}, HTTP: "127.0.0.1:notport"},
	} {
		o.Logger = newTestLogger(io.Discard)
		if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// On its way out a front is not ready, takes nobody new, lets those under way go on, and
// resets them when their time is over.
func TestDrain(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	path := writeFile(t, t.TempDir(), "routes.yaml", fmt.Sprintf("routes: [{serverName: a.example.com, backends: [{address: %q}]}]", a.address))
	for name, whole := range map[string]bool{"all leave": true, "one stays": false} {
		t.Run(name, func(t *testing.T) {
			r := run(t, path, RunOptions{DrainDelay: 300 * time.Millisecond, DrainTimeout: 1500 * time.Millisecond})
			secure, _, err := ca.try(r.address, "a.example.com")
			if err != nil {
				t.Fatal(err)
			}
			defer secure.Close()
			if status, _, err := r.get("/readyz"); status != 200 {
				t.Fatal(status, err)
			}
			done := make(chan error, 1)
			begin := time.Now()
			go func() { done <- r.stop() }()
			eventually(t, time.Second, "not ready", func() error {
				status, _, err := r.get("/readyz")
				if status != 503 {
					return fmt.Errorf("%d, %w", status, err)
				}
				return nil
			})
			if conn, _, err := ca.try(r.address, "a.example.com"); err != nil {
				t.Errorf("refused before the delay was over: %v", err)
			} else {
				_ = conn.Close()
			}
			eventually(t, 2*time.Second, "new ones are refused", func() error {
				conn, err := net.Dial("tcp", r.address)
				if err == nil {
					_ = conn.Close()
					return errors.New("accepted")
				}
				return nil
			})
			if err := echo(secure, []byte("still here")); err != nil {
				t.Fatal(err)
			}
			if whole {
				_ = secure.Close()
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			took := time.Since(begin)
			if whole && took > 1500*time.Millisecond || !whole && took < 1800*time.Millisecond {
				t.Errorf("took %s", took)
			}
			if _, err := secure.Read(make([]byte, 1)); err == nil {
				t.Error("the connection is still there")
			}
		})
	}
}

// A successor takes over the port while clients come; those of the predecessor go on until
// they end. Where the kernel moves what a closing listener has (net.ipv4.tcp_migrate_req),
// no client is lost; elsewhere at most those whose handshake ends in that instant.
func TestSuccessor(t *testing.T) {
	for _, migrate := range []string{"0", "1"} {
		t.Run("migrate "+migrate, func(t *testing.T) {
			h := labtest.New(t).Host("host")
			h.Sysctl("net/ipv4/tcp_migrate_req", migrate)
			successor(t, h, migrate == "1")
		})
	}
}

func successor(t *testing.T, h *labtest.Host, migrates bool) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	var a *server
	h.Do(func() error { a = newServer(t, "a", &cert, nil); return nil })
	path := writeFile(t, t.TempDir(), "routes.yaml", fmt.Sprintf("routes: [{serverName: a.example.com, backends: [{address: %q}]}]", a.address))
	o := childOptions{Routes: path, Listen: "127.0.0.1:8443", DrainTimeout: 10 * time.Second}
	try := func() (conn *tls.Conn, err error) {
		err = h.Host.Do(func() error {
			conn, _, err = ca.try(o.Listen, "a.example.com")
			return err
		})
		return conn, err
	}
	start := func() (c *child) {
		h.Do(func() error { c = startChild(t, o); return nil })
		return c
	}
	first := start()
	old, err := try()
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	const clients = 4
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var mu sync.Mutex
	var served int
	var failed []error
	for range clients {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := try()
				mu.Lock()
				if err != nil {
					failed = append(failed, err)
				} else {
					served++
					_ = conn.Close()
				}
				mu.Unlock()
			}
		})
	}
	second := start()
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if err := echo(old, []byte("still here")); err != nil {
		t.Errorf("a connection of the predecessor: %v", err)
	}
	close(stop)
	wg.Wait()
	t.Logf("%d served, %d failed", served, len(failed))
	if served < 20 { // under the race detector on a busy machine it is some hundred less
		t.Errorf("only %d were served", served)
	}
	if most := map[bool]int{false: clients, true: 0}[migrates]; len(failed) > most {
		t.Errorf("%d failed: %v", len(failed), failed)
	}
	_ = old.Close()
	select {
	case err := <-first.done:
		if err != nil {
			t.Errorf("the predecessor: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the predecessor is still there")
	}
	select {
	case err := <-second.done:
		t.Errorf("the successor has ended: %v", err)
	default:
	}
}

// Without notifications (none to be had on this host, or no such directory) the file is
// looked at now and then.
func TestWatchWithoutNotifications(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	f := &file{path: filepath.Join(dir, "routes.yaml")}
	ctx, cancel := context.WithCancel(t.Context())
	begun, found := make(chan struct{}, 1), make(chan struct{})
	var once sync.Once
	done := make(chan error, 1)
	go func() {
		done <- f.Watch(ctx, func() {
			if _, changed, err := f.Read(); changed && err == nil {
				once.Do(func() { close(found) })
			}
			select {
			case begun <- struct{}{}:
			default:
			}
		})
	}()
	<-begun
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir, "routes.yaml", "routes: []")
	select {
	case <-found:
	case <-time.After(2 * pollFile):
		t.Error("the file was not found")
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
