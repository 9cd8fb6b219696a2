package process_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-vpn/culvert/internal/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFirstToEndEndsAllAndAllAreAwaited(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		first error
		want  string
	}{"with an error": {broken, "first: broken"}, "without": {nil, ""}} {
		t.Run(name, func(t *testing.T) {
			g := process.NewGroup(t.Context())
			var ended atomic.Int32
			for range 3 {
				g.Go("other", func(ctx context.Context) error {
					<-ctx.Done()
					time.Sleep(20 * time.Millisecond)
					ended.Add(1)
					return ctx.Err()
				})
			}
			g.Go("first", func(context.Context) error { return c.first })
			err := g.Wait()
			if ended.Load() != 3 {
				t.Errorf("%d of 3 parts were awaited", ended.Load())
			}
			if c.want == "" && err != nil || c.want != "" && (err == nil || err.Error() != c.want || !errors.Is(err, broken)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestGroupEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	g := process.NewGroup(ctx)
	g.Go("a", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	g.Go("b", func(ctx context.Context) error { <-ctx.Done(); return errors.New("could not tidy up") })
	cancel()
	if err := g.Wait(); err == nil || err.Error() != "b: could not tidy up" {
		t.Errorf("%v", err)
	}
}

// get fetches over a Unix socket, or over TCP when path is empty.
func get(t *testing.T, path, url string) (status int, body string) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	if path != "" {
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

func TestHealthMetricsAndPProf(t *testing.T) {
	health := process.NewHealth()
	var state atomic.Pointer[error]
	notYet := errors.New("no plan was applied\nyet")
	state.Store(&notYet)
	health.AddReady("config", func() error { return nil })
	health.AddReady("tunnels", func() error { return *state.Load() })
	g := process.NewGroup(t.Context())
	path := filepath.Join(t.TempDir(), "s")
	if err := process.ServeUnix(g, path, process.Mux(health, process.NewRegistry(), false)); err != nil {
		t.Fatal(err)
	}
	expect := func(url string, status int, contains ...string) {
		t.Helper()
		s, body := get(t, path, "http://x"+url)
		if s != status {
			t.Errorf("%s: status %d, want %d", url, s, status)
		}
		for _, c := range contains {
			if !strings.Contains(body, c) {
				t.Errorf("%s: no %q in:\n%s", url, c, body)
			}
		}
	}
	expect("/healthz", 200, "ok\n")
	expect("/readyz", 503, "config: ok\ntunnels: no plan was applied; yet\n")
	var fine error
	state.Store(&fine)
	expect("/readyz", 200, "config: ok\ntunnels: ok\n")
	health.AddLive("loop", func() error { return errors.New("stuck") })
	expect("/healthz", 503, "loop: stuck\n")
	expect("/metrics", 200, `culvert_build_info{goversion="go`, `version="`+process.Version()+`"`, "go_goroutines", "process_open_fds")
	expect("/debug/pprof/", 404)
	g.Stop()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}

	g = process.NewGroup(t.Context())
	if err := process.ServeUnix(g, path, process.Mux(health, process.NewRegistry(), true)); err != nil {
		t.Fatal(err)
	}
	expect("/debug/pprof/", 200, "goroutine")
	expect("/debug/pprof/heap", 200)
	g.Stop()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestServeTCPRefusesATakenAddressAndEndsGracefully(t *testing.T) {
	var c net.ListenConfig
	l, err := c.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	g := process.NewGroup(t.Context())
	if err := process.ServeTCP(g, address, http.NotFoundHandler()); err == nil || !strings.Contains(err.Error(), "serve HTTP on "+address) {
		t.Errorf("%v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	started := make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(started)
		time.Sleep(200 * time.Millisecond)
		_, _ = w.Write([]byte("to the end"))
	})
	if err := process.ServeTCP(g, address, h); err != nil {
		t.Fatal(err)
	}
	go func() { <-started; g.Stop() }()
	if status, body := get(t, "", "http://"+address); status != 200 || body != "to the end" {
		t.Errorf("%d %q", status, body)
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestServerThatFailsEndsTheGroup(t *testing.T) {
	var c net.ListenConfig
	l, err := c.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := process.NewGroup(t.Context())
	process.Serve(g, l, http.NotFoundHandler())
	_ = l.Close()
	if err := g.Wait(); err == nil || !strings.Contains(err.Error(), "serve HTTP on 127.0.0.1:") {
		t.Errorf("%v", err)
	}
}

// A client that sends nothing more must not hold a connection for ever.
func TestSlowHeaderIsCut(t *testing.T) {
	t.Parallel()
	g := process.NewGroup(t.Context())
	path := filepath.Join(t.TempDir(), "s")
	if err := process.ServeUnix(g, path, http.NotFoundHandler()); err != nil {
		t.Fatal(err)
	}
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n")); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(8 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Errorf("not cut within 8 s: %v", err)
	}
	g.Stop()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "culvert.sock")
	listen := func(mode fs.FileMode) (net.Listener, error) { return process.ListenUnix(t.Context(), path, mode) }

	for _, mode := range []fs.FileMode{0o600, 0o660} {
		l, err := listen(mode)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != fs.ModeSocket|mode {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		if l.Addr().String() != path {
			t.Errorf("address %s", l.Addr())
		}
		// A living one is not replaced.
		if _, err := listen(mode); err == nil || !strings.Contains(err.Error(), "another process listens there") {
			t.Errorf("%v", err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 0 {
			t.Errorf("left behind: %v", entries)
		}
	}

	// A dead process's socket is replaced.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := listen(0o600)
	if err != nil {
		t.Fatal(err)
	}
	// A successor's socket in its place survives.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	next, err := listen(0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the successor's socket is gone: %v", err)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}

	// Anything else stays.
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(0o600); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("%v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("a file was overwritten")
	}
	path = filepath.Join(dir, strings.Repeat("x", 120))
	if _, err := listen(0o600); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("%v", err)
	}
}

func TestNewLogger(t *testing.T) {
	var out bytes.Buffer
	log, err := process.NewLogger(&out, process.LogOptions{Level: "warn", Format: "json"})
	if err != nil {
		t.Fatal(err)
	}
	log.Info("not this")
	log.Warn("this", "site", "default/berlin")
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line["msg"] != "this" || line["site"] != "default/berlin" {
		t.Errorf("%v: %s", err, out.String())
	}
	for _, o := range []process.LogOptions{{Level: "loud"}, {Format: "xml"}} {
		if _, err := process.NewLogger(&out, o); err == nil || !strings.Contains(err.Error(), "use ") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
