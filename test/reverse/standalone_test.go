package reverse

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

const manifest = `
apiVersion: culvert.dev/v1alpha1
kind: RemoteCluster
metadata: {name: prod, namespace: default}
spec:
  hub: {replicas: 2}
  front: {serverName: front.example.com}
  targets:
  - cidrs: [10.50.0.0/16]
    ports: [{port: 80}, {port: 7000}]
  exports:
  - {name: back, listen: "127.0.0.1:8080", target: "192.0.2.1:81"}
`

// site is the two hosts of the standalone test: the control plane's, and one in the remote
// cluster, which alone can reach the target.
type site struct {
	t               *testing.T
	program, dir    string
	control, remote *labtest.Host
	options         tunnel.HubOptions
	logs            []string
}

func newSite(t *testing.T) *site {
	l := labtest.New(t)
	s := &site{t: t, dir: t.TempDir(), control: l.Host("control"), remote: l.Host("remote")}
	l.Connect(s.control, "eth0", "192.0.2.1/24", s.remote, "eth0", "192.0.2.2/24")
	s.remote.IP("addr", "add", "10.50.0.1/32", "dev", "lo")
	s.program = filepath.Join(s.dir, "culvert-tunnel")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", s.program, "../../cmd/culvert-tunnel")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	s.write("manifests/prod.yaml", manifest)
	s.options = tunnel.HubOptions{
		Manifests: s.path("manifests"), State: s.path("hub"), Name: "prod", Clients: ":8132",
		Addresses: []string{"192.0.2.1:8443", "192.0.2.1:8444"}, ClientAddresses: []string{"192.0.2.1:8132", "192.0.2.1:8133"},
	}
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.path(name)), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// start runs culvert-tunnel on a host.
func (s *site) start(h *labtest.Host, args ...string) *exec.Cmd {
	s.t.Helper()
	cmd, log := h.Background(s.program, args...)
	s.logs = append(s.logs, log)
	s.t.Cleanup(func() {
		if s.t.Failed() {
			b, _ := os.ReadFile(log)
			s.t.Logf("%v:\n%s", args, b)
		}
	})
	return cmd
}

func (s *site) startHub(i int) *exec.Cmd {
	n := strconv.Itoa(i)
	args := []string{"hub", "--manifests", s.options.Manifests, "--state", s.options.State, "--replica", n,
		"--listen-spokes", ":" + strconv.Itoa(8443+i), "--listen-clients", ":" + strconv.Itoa(8132+i), "--http", "127.0.0.1:" + strconv.Itoa(9587+i)}
	for i := range s.options.Addresses {
		args = append(args, "--address", s.options.Addresses[i], "--client-address", s.options.ClientAddresses[i])
	}
	return s.start(s.control, args...)
}

func (s *site) invite(role pki.Role, name, file string) {
	s.t.Helper()
	i, err := tunnel.Invite(s.options, role, name)
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := yaml.Marshal(i)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(file, string(b))
}

// get asks a web server inside a host.
func (s *site) get(h *labtest.Host, url string) (status int, body string, err error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
			err = errors.Join(h.Host.Do(func() (err error) {
				c, err = (&net.Dialer{}).DialContext(ctx, network, address)
				return err
			}))
			return c, err
		},
	}}
	r, err := client.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// web runs a web server inside a host that says its name.
func (s *site) web(h *labtest.Host, address string) {
	s.t.Helper()
	var l net.Listener
	h.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, h.Name) }), ReadHeaderTimeout: time.Second}
	go func() { _ = server.Serve(l) }()
	s.t.Cleanup(func() { _ = server.Close() })
}

// through connects to the target through the egress's socket.
func (s *site) through(to string) error {
	p := &egressProcess{socket: s.path("e.sock")}
	c, err := p.connect(to)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	b, err := io.ReadAll(c)
	if err == nil && !strings.HasSuffix(string(b), "remote") {
		err = fmt.Errorf("%q came back", b)
	}
	return err
}

// The whole life of a tunnel, with the programs and files that a user has.
func TestStandalone(t *testing.T) {
	s := newSite(t)
	s.web(s.remote, "10.50.0.1:80")
	s.web(s.control, "192.0.2.1:81")
	hubs := []*exec.Cmd{s.startHub(0), s.startHub(1)}
	s.invite(pki.Spoke, "node-1", "spoke.yaml")
	s.invite(pki.Client, "api", "egress.yaml")
	spoke := s.start(s.remote, "spoke", "--join", s.path("spoke.yaml"), "--state", s.path("spoke"))
	egress := s.start(s.control, "egress", "--join", s.path("egress.yaml"), "--state", s.path("egress"), "--socket", s.path("e.sock"), "--listen", "127.0.0.1:8139")
	works := func() error { return s.through("10.50.0.1:80") }
	labtest.Eventually(t, 15*time.Second, "a connection through the tunnel", works)
	if info, err := os.Stat(s.path("e.sock")); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	for i := range hubs {
		if status, body, err := s.get(s.control, "http://127.0.0.1:"+strconv.Itoa(9587+i)+"/readyz"); status != 200 {
			t.Errorf("hub %d: %d %s %v", i, status, body, err)
		}
	}
	t.Run("memory", func(t *testing.T) { s.memory(t, hubs) })
	t.Run("idle connections", func(t *testing.T) { s.idle(t, hubs) })
	t.Run("1 Gbit/s", func(t *testing.T) { s.gigabit(t) })
	t.Run("everything stands still", func(t *testing.T) { s.standStill(t, append([]*exec.Cmd{spoke, egress}, hubs...)) })
	t.Run("export", func(t *testing.T) {
		labtest.Eventually(t, 5*time.Second, "the other direction", func() error {
			_, body, err := s.get(s.remote, "http://127.0.0.1:8080/")
			if err == nil && body != "control" {
				err = errors.New(body)
			}
			return err
		})
	})
	t.Run("metrics", func(t *testing.T) {
		_, body, err := s.get(s.control, "http://127.0.0.1:9589/metrics")
		if err != nil || !regexp.MustCompile(`(?m)^culvert_tunnel_streams_total\{kind="target",part="egress",remote_cluster="default/prod"\} [1-9]`).MatchString(body) {
			t.Errorf("%v:\n%s", err, body)
		}
	})
	t.Run("curl", func(t *testing.T) { s.curl(t) })
	t.Run("a token works once", func(t *testing.T) {
		out, err := s.remote.Try(s.program, "spoke", "--join", s.path("spoke.yaml"), "--state", s.path("thief"), "--http", "")
		if err == nil || !strings.Contains(out, "the token is not valid: it was used at") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("policy is followed", func(t *testing.T) {
		s.write("manifests/prod.yaml", strings.Replace(manifest, "port: 80", "port: 79", 1))
		labtest.Eventually(t, 5*time.Second, "the target is refused", func() error {
			if err := works(); err == nil || !strings.HasPrefix(err.Error(), "403 port 80 of 10.50.0.1 is not allowed") {
				return fmt.Errorf("%w", errors.Join(errors.New("not yet"), err))
			}
			return nil
		})
		// A broken manifest changes nothing.
		s.write("manifests/prod.yaml", strings.Replace(manifest, "port: 80", "port: 99999", 1))
		time.Sleep(300 * time.Millisecond)
		if err := works(); err == nil || !strings.HasPrefix(err.Error(), "403") {
			t.Errorf("%v", err)
		}
		s.write("manifests/prod.yaml", manifest)
		labtest.Eventually(t, 5*time.Second, "the target is allowed again", works)
	})
	t.Run("restart without the invitation", func(t *testing.T) {
		_ = syscall.Kill(-spoke.Process.Pid, syscall.SIGKILL)
		labtest.Eventually(t, 10*time.Second, "its ports are free", func() error {
			if err := syscall.Kill(spoke.Process.Pid, 0); !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("it is still there: %w", err)
			}
			return nil
		})
		s.start(s.remote, "spoke", "--state", s.path("spoke"))
		labtest.Eventually(t, 10*time.Second, "the spoke is back", works)
	})
	t.Run("a hub stops", func(t *testing.T) {
		_ = hubs[0].Process.Signal(syscall.SIGTERM)
		for range 100 {
			if err := works(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	t.Run("revocation", func(t *testing.T) {
		if err := tunnel.Revoke(s.options, pki.Spoke, "node-1"); err != nil {
			t.Fatal(err)
		}
		labtest.Eventually(t, 3*time.Second, "the spoke is gone", func() error {
			if err := works(); err == nil || !strings.HasPrefix(err.Error(), "503 no spoke") {
				return fmt.Errorf("%w", errors.Join(errors.New("not yet"), err))
			}
			return nil
		})
		if status, _, _ := s.get(s.control, "http://127.0.0.1:9588/readyz"); status != 503 {
			t.Errorf("the hub is ready without a spoke: %d", status)
		}
		s.invite(pki.Spoke, "node-1", "again.yaml")
		s.start(s.remote, "spoke", "--join", s.path("again.yaml"), "--state", s.path("spoke2"), "--http", "")
		labtest.Eventually(t, 10*time.Second, "it joined again", works)
	})
	s.secrets()
}

// standStill stops all programs for longer than a path may be silent, as a machine does that is moved
// to another host: what was open goes on.
func (s *site) standStill(t *testing.T, all []*exec.Cmd) {
	if os.Getenv("CULVERT_GOALS") == "" {
		t.Skip("CULVERT_GOALS=1 runs it: it takes 12 s")
	}
	c, err := (&egressProcess{socket: s.path("e.sock")}).connect("10.50.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answers := bufio.NewReader(c)
	ask := func() error {
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		r, err := http.ReadResponse(answers, nil)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r.Body)
		return errors.Join(err, r.Body.Close())
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	for _, signal := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT} {
		for _, program := range all {
			if err := syscall.Kill(-program.Process.Pid, signal); err != nil {
				t.Fatal(err)
			}
		}
		if signal == syscall.SIGSTOP {
			time.Sleep(10 * time.Second)
		}
	}
	for range 4 { // also once everybody has looked at the clock
		if err := ask(); err != nil {
			t.Fatalf("after standing still: %v", err)
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// curl: a stock client, by the egress's loopback address as Prometheus does, and at a hub's own
// port with the files that "culvert join certificate" writes.
func (s *site) curl(t *testing.T) {
	labtest.Require(t, "curl")
	if err := tunnel.IssueClient(s.options, "curl", s.path("tls")); err != nil {
		t.Fatal(err)
	}
	hub := []string{"-x", "https://127.0.0.1:8132", "--proxy-cacert", s.path("tls/ca.crt"), "--proxy-cert", s.path("tls/tls.crt"), "--proxy-key", s.path("tls/tls.key")}
	for what, args := range map[string][]string{
		"the egress, GET":     {"-x", "http://127.0.0.1:8139"},
		"the egress, CONNECT": {"-p", "-x", "http://127.0.0.1:8139"},
		"a hub, GET":          hub,
		"a hub, CONNECT":      append([]string{"-p"}, hub...),
	} {
		if out, err := s.control.Try("curl", append(args, "-sS", "-m", "10", "http://10.50.0.1/")...); err != nil || out != "remote" {
			t.Errorf("by %s: %q, %v", what, out, err)
		}
		out, err := s.control.Try("curl", append(args, "-sS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code} %{http_connect}", "http://169.254.169.254/")...)
		if !strings.Contains(out, "403") {
			t.Errorf("a metadata address by %s: %q, %v", what, out, err)
		}
	}
	if out, err := s.control.Try("curl", "-sS", "-m", "10", "-p", "-x", "https://127.0.0.1:8132", "--proxy-cacert", s.path("tls/ca.crt"), "http://10.50.0.1/"); err == nil {
		t.Errorf("by a hub without a certificate: %q", out)
	}
}

// secrets: keys and tokens are in files that only their owner reads, and in no log and no
// status.
func (s *site) secrets() {
	var secrets []string
	private := regexp.MustCompile(`(?s)-----BEGIN PRIVATE KEY-----(.*?)-----END`)
	for _, dir := range []string{"hub", "spoke", "spoke2", "egress"} {
		err := filepath.WalkDir(s.path(dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			info, err := d.Info()
			if err == nil && info.Mode().Perm() != 0o600 {
				s.t.Errorf("%s: mode %s", path, info.Mode())
			}
			b, err := os.ReadFile(path)
			text := strings.ReplaceAll(string(b), `\n`, "\n")
			for _, m := range private.FindAllStringSubmatch(text, -1) {
				secrets = append(secrets, strings.Fields(m[1])[0])
			}
			return err
		})
		if err != nil {
			s.t.Fatal(err)
		}
	}
	for _, file := range []string{"spoke.yaml", "egress.yaml", "again.yaml"} {
		i, err := tunnel.ReadInvitation(s.path(file))
		if err != nil {
			s.t.Fatal(err)
		}
		secrets = append(secrets, i.Token)
	}
	if len(secrets) < 7 {
		s.t.Fatalf("only %d secrets were found", len(secrets))
	}
	places := map[string]string{}
	for _, log := range s.logs {
		b, _ := os.ReadFile(log)
		places[log] = string(b)
	}
	for _, port := range []string{"9588", "9589"} {
		for _, path := range []string{"/v1/status", "/metrics"} {
			_, body, err := s.get(s.control, "http://127.0.0.1:"+port+path)
			if err != nil || path == "/v1/status" && !json.Valid([]byte(body)) {
				s.t.Errorf("%s%s: %v: %s", port, path, err, body)
			}
			places[port+path] = body
		}
	}
	for where, text := range places {
		for _, x := range secrets {
			if strings.Contains(text, x) {
				s.t.Errorf("a secret is in %s", where)
			}
		}
	}
}
