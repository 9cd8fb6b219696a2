package front

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

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
