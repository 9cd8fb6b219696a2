package cluster_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// TestReversedTunnel lets kube-apiserver reach kubelet and pods through hub and spoke only:
// its own way to them is shut.
func TestReversedTunnel(t *testing.T) {
	if os.Getenv("CULVERT_CLUSTER") != "" {
		labtest.Skip(t, "changes the control plane of its cluster")
	}
	c := clustertest.Start(t, cluster.Options{Nodes: 1})
	startGround(c)
	r := &reversed{Cluster: c, t: t, dir: t.TempDir()}
	t.Run("cp without the tunnel", func(t *testing.T) { r.copy(t) })
	r.start()
	r.shut()
	if _, err := r.logs(); err == nil {
		t.Fatal("kube-apiserver reaches the kubelet without the tunnel")
	}
	r.useEgress()
	labtest.Eventually(t, 60*time.Second, "logs through the tunnel", func() error {
		_, err := r.logs()
		return err
	})
	t.Run("logs -f", func(t *testing.T) { r.follow(t) })
	t.Run("exec", func(t *testing.T) { r.exec(t) })
	t.Run("cp", func(t *testing.T) { r.copy(t) })
	t.Run("port-forward", func(t *testing.T) { r.portForward(t) })
	t.Run("service proxy", func(t *testing.T) {
		if out := c.In(t).Kubectl("get", "--raw", "/api/v1/namespaces/ground/services/web:80/proxy/"); !strings.Contains(out, "node1") {
			t.Errorf("%s", out)
		}
	})
	t.Run("kubelet's metrics", func(t *testing.T) {
		if out := c.In(t).Kubectl("get", "--raw", "/api/v1/nodes/node1/proxy/metrics"); !strings.Contains(out, "kubelet_running_pods") {
			t.Errorf("%.300s", out)
		}
	})
	t.Run("what is not allowed", func(t *testing.T) {
		_, err := c.TryKubectl("get", "--raw", "/api/v1/namespaces/ground/pods/on-node1:9999/proxy/")
		if err == nil || !strings.Contains(err.Error(), "port 9999 of") {
			t.Errorf("the refusal does not say why: %v", err)
		}
	})
}

type reversed struct {
	*clustertest.Cluster
	t   *testing.T
	dir string
}

func (r *reversed) path(name string) string { return filepath.Join(r.dir, name) }

func (r *reversed) write(name string, b []byte) {
	r.t.Helper()
	if err := os.WriteFile(r.path(name), b, 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// start runs hub and egress beside kube-apiserver, and a spoke on the node.
func (r *reversed) start() {
	r.t.Helper()
	program := r.path("culvert-tunnel")
	if out, err := exec.Command("go", "build", "-o", program, "../../cmd/culvert-tunnel").CombinedOutput(); err != nil {
		r.t.Fatalf("build: %v: %s", err, out)
	}
	if err := os.Mkdir(r.path("manifests"), 0o755); err != nil {
		r.t.Fatal(err)
	}
	r.write("manifests/rc.yaml", fmt.Appendf(nil, `
apiVersion: culvert.dev/v1alpha1
kind: RemoteCluster
metadata: {name: self, namespace: default}
spec:
  hub: {replicas: 1}
  targets:
  - {cidrs: [%s/32], ports: [{port: 10250}]}
  - {cidrs: [10.244.0.0/16], ports: [{port: 8080}]}
`, r.Nodes[0].IPs()[0]))
	host := strings.TrimSuffix(strings.TrimPrefix(r.Server(), "https://"), ":6443")
	o := tunnel.HubOptions{
		Manifests: r.path("manifests"), State: r.path("hub"), Name: "self", Clients: ":8132",
		Addresses: []string{host + ":8443"}, ClientAddresses: []string{"127.0.0.1:8132"},
	}
	for role, file := range map[pki.Role]string{pki.Spoke: "spoke.yaml", pki.Client: "egress.yaml"} {
		i, err := tunnel.Invite(o, role, string(role))
		if err != nil {
			r.t.Fatal(err)
		}
		b, err := yaml.Marshal(i)
		if err != nil {
			r.t.Fatal(err)
		}
		r.write(file, b)
	}
	r.run(r.Control, program, "hub", "--manifests", o.Manifests, "--state", o.State, "--address", o.Addresses[0], "--client-address", o.ClientAddresses[0], "--log-level", "debug")
	r.run(r.Nodes[0].Host, program, "spoke", "--join", r.path("spoke.yaml"), "--state", r.path("spoke"), "--log-level", "debug")
	r.run(r.Control, program, "egress", "--join", r.path("egress.yaml"), "--state", r.path("egress"), "--socket", r.path("e.sock"))
}

// run runs a program on a machine until the test's end.
func (r *reversed) run(h *lab.Host, program string, args ...string) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.Command(ctx, program, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := h.Start(cmd); err != nil {
		cancel()
		r.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	r.t.Cleanup(func() {
		cancel()
		<-done
		if r.t.Failed() {
			r.t.Logf("%s:\n%s", args[0], out.String())
		}
	})
}

// shut closes the control plane's own way to kubelets and pods.
func (r *reversed) shut() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	rules := fmt.Sprintf(`table inet reversed { chain out { type filter hook output priority 0; ip daddr %s tcp dport 10250 reject with tcp reset; ip daddr 10.244.0.0/16 reject; }; }`, r.Nodes[0].IPs()[0])
	r.write("shut.nft", []byte(rules))
	if out, err := r.Control.Output(ctx, "nft", "-f", r.path("shut.nft")); err != nil {
		r.t.Fatalf("%v: %s", err, out)
	}
}

// useEgress starts kube-apiserver anew with the egress selector.
func (r *reversed) useEgress() {
	r.t.Helper()
	r.write("selector.yaml", []byte(tunnel.EgressSelectorConfiguration(r.path("e.sock"))))
	args := r.apiserverArgs()
	if err := r.StopProgram("control", "kube-apiserver"); err != nil {
		r.t.Fatal(err)
	}
	if err := r.StartProgram("control", "kube-apiserver", append(args, "--egress-selector-config-file="+r.path("selector.yaml"))...); err != nil {
		r.t.Fatal(err)
	}
	labtest.Eventually(r.t, 2*time.Minute, "kube-apiserver is ready again", func() error {
		_, err := r.TryKubectl("get", "--raw", "/readyz")
		return err
	})
}

// apiserverArgs are those of the running kube-apiserver.
func (r *reversed) apiserverArgs() []string {
	r.t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if filepath.Base(args[0]) == "kube-apiserver" && strings.Contains(string(b), filepath.Dir(r.Kubeconfig())+"/") {
			return args[1:]
		}
	}
	r.t.Fatal("kube-apiserver does not run")
	return nil
}

func (r *reversed) logs() (string, error) {
	return r.TryKubectl("-n", "ground", "logs", "on-node1", "--tail=5")
}

func (r *reversed) kubectl(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, r.Program("kubectl"), append([]string{"--kubeconfig", r.Kubeconfig(), "-n", "ground"}, args...)...)
}

// follow sees a line of the log that is written while it is followed.
func (r *reversed) follow(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := r.kubectl(ctx, "logs", "-f", "--since=1s", "on-node1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if n, err := out.Read(make([]byte, 100)); err != nil || n == 0 { // its readiness probe calls every second
		t.Errorf("%d bytes, %v", n, err)
	}
	cancel()
	_ = cmd.Wait()
}

// exec runs a program with a pipe, and one on a terminal.
func (r *reversed) exec(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := r.kubectl(ctx, "exec", "-i", "on-node1", "--", "wc", "-c")
	cmd.Stdin = bytes.NewReader(make([]byte, 1<<20))
	if out, err := cmd.Output(); err != nil || strings.TrimSpace(string(out)) != "1048576" {
		t.Errorf("pipe: %q, %v", out, err)
	}
	// script(1) gives kubectl a terminal.
	line := strings.Join(r.kubectl(ctx, "exec", "-it", "on-node1", "--", "sh", "-c", "'test -t 0 && echo terminal'").Args, " ")
	if out, err := exec.CommandContext(ctx, "script", "-qec", line, "/dev/null").CombinedOutput(); err != nil || !strings.Contains(string(out), "terminal") {
		t.Errorf("terminal: %q, %v", out, err)
	}
}

// copy copies 100 MB there and back.
func (r *reversed) copy(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if _, err := r.Exec("ground", "on-node1", "/bin/busybox", "ln", "-sf", "/bin/busybox", "/bin/tar"); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 100_000_000)
	_, _ = rand.Read(data)
	r.write("there", data)
	began := time.Now()
	for _, args := range [][]string{{"cp", r.path("there"), "on-node1:/tmp-there"}, {"cp", "on-node1:/tmp-there", r.path("back")}} {
		if out, err := r.kubectl(ctx, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	back, err := os.ReadFile(r.path("back"))
	if err != nil || sha256.Sum256(back) != sha256.Sum256(data) {
		t.Errorf("%d of %d bytes came back, or others: %v", len(back), len(data), err)
	}
	t.Logf("100 MB there and back in %s", time.Since(began).Round(time.Millisecond))
}

// portForward gets a page through a forwarded port.
func (r *reversed) portForward(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	_, port, _ := net.SplitHostPort(address)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := r.kubectl(ctx, "port-forward", "pod/on-node1", port+":8080")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 10*time.Second, "the forwarded port", func() error {
		res, err := http.Get("http://" + address + "/")
		if err != nil {
			return err
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("%s", res.Status)
		}
		return nil
	})
	cancel()
	_ = cmd.Wait()
}
