package netlab

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// apiServer is a real kube-apiserver with etcd, on a host of its own beside the gateway.
// No controller runs: what the operator writes the test writes.
type apiServer struct {
	t        *testing.T
	host     *labtest.Host
	dir      string
	programs string
	server   *exec.Cmd
	done     chan struct{}
}

const apiAddress = "172.21.0.1"

// newAPIServer starts the two with Culvert's kinds, and the rights that the chart and the
// operator give a gateway "default/edge".
func newAPIServer(t *testing.T, n *network) *apiServer {
	t.Helper()
	programs, err := cluster.Programs(context.Background(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "cvtapi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a := &apiServer{t: t, host: n.Host("api"), dir: dir, programs: programs}
	n.Connect(a.host, "gateway", apiAddress+"/24", n.gateway, "mgmt", "172.21.0.2/24")
	a.credentials()
	a.host.Background(a.program("etcd"), "--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--log-level=error",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of kube-apiserver:\n%s", tail(filepath.Join(dir, "apiserver.log"), 15))
		}
		a.stop()
	})
	a.start()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	a.kubectl("apply", "--server-side", "-f", filepath.Join(root, "charts/culvert/crds"))
	a.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
	a.apply(gatewayRights(t))
	return a
}

func (a *apiServer) program(name string) string { return filepath.Join(a.programs, name) }

func (a *apiServer) file(name, text string) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

func (a *apiServer) credentials() {
	a.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		a.t.Fatal(err)
	}
	a.file("sa.key", string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
	a.file("tokens.csv", "admintoken,admin,admin,system:masters\ngatewaytoken,system:serviceaccount:default:culvert-edge,edge\n")
	for _, user := range []string{"admin", "gateway"} {
		a.file(user+".kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s:6443", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: %stoken}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, apiAddress, user))
	}
}

// start starts kube-apiserver and waits until it is ready.
func (a *apiServer) start() {
	a.t.Helper()
	log, err := os.OpenFile(filepath.Join(a.dir, "apiserver.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		a.t.Fatal(err)
	}
	defer log.Close()
	key := filepath.Join(a.dir, "sa.key")
	cmd := a.host.Command(context.Background(), a.program("kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379",
		"--bind-address="+apiAddress, "--advertise-address="+apiAddress, "--secure-port=6443", "--cert-dir="+filepath.Join(a.dir, "certs"),
		"--token-auth-file="+filepath.Join(a.dir, "tokens.csv"), "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+key, "--service-account-signing-key-file="+key,
		"--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112", "--enable-priority-and-fairness=false")
	cmd.Stdout, cmd.Stderr = log, log
	if err := a.host.Start(cmd); err != nil {
		a.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	a.server, a.done = cmd, done
	eventually(a.t, 2*time.Minute, "kube-apiserver is ready", func() error {
		select {
		case <-done:
			return errors.New("it ended")
		default:
		}
		_, err := a.try("get", "--raw", "/readyz")
		return err
	})
}

// stop kills kube-apiserver.
func (a *apiServer) stop() {
	if a.server == nil {
		return
	}
	_ = a.server.Process.Kill()
	<-a.done
	a.server = nil
}

// try is kubectl as administrator.
func (a *apiServer) try(args ...string) (string, error) {
	return a.feed("", args...)
}

func (a *apiServer) feed(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := a.host.Command(ctx, a.program("kubectl"), append([]string{"--kubeconfig", filepath.Join(a.dir, "admin.kubeconfig"), "--cache-dir", filepath.Join(a.dir, "cache")}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := a.host.Start(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

func (a *apiServer) kubectl(args ...string) string {
	a.t.Helper()
	out, err := a.try(args...)
	if err != nil {
		a.t.Fatal(err)
	}
	return out
}

func (a *apiServer) apply(text string) {
	a.t.Helper()
	if _, err := a.feed(text, "apply", "-f", "-"); err != nil {
		a.t.Fatal(err)
	}
}

// status writes a part of an object's status, as the operator does.
func (a *apiServer) status(kind, name, status string) {
	a.t.Helper()
	a.kubectl("patch", kind, name, "--subresource=status", "--type=merge", "-p", `{"status":`+status+`}`)
}

// field is a field of an object, by its path.
func (a *apiServer) field(kind, name, path string) string {
	a.t.Helper()
	return a.kubectl("get", kind, name, "-o", "jsonpath={"+path+"}")
}

// condition is "STATUS REASON: MESSAGE".
func (a *apiServer) condition(kind, name, condition string) string {
	a.t.Helper()
	at := `.status.conditions[?(@.type=="` + condition + `")]`
	return a.kubectl("get", kind, name, "-o", "jsonpath={"+at+".status} {"+at+".reason}: {"+at+".message}")
}

// awaitCondition waits until a condition begins as wanted.
func (a *apiServer) awaitCondition(kind, name, condition, want string, timeout time.Duration) time.Duration {
	a.t.Helper()
	return eventually(a.t, timeout, fmt.Sprintf("condition %s of %s %s is %q", condition, kind, name, want), func() error {
		if got := a.condition(kind, name, condition); !strings.HasPrefix(got, want) {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// gatewayRights are the objects that let a gateway do what it must, and nothing else: the
// ClusterRole of the chart and the Role that the operator makes.
func gatewayRights(t *testing.T) string {
	t.Helper()
	gw := &model.Gateway{ID: model.ID{Namespace: "default", Name: "edge"}, Replicas: 1}
	objects, err := workload.Gateway(gw, workload.Options{ClusterRole: "culvert-gateway"})
	if err != nil {
		t.Fatal(err)
	}
	text := chartRole
	for _, o := range objects {
		switch o.GetObjectKind().GroupVersionKind().Kind {
		case "Role", "RoleBinding", "ClusterRoleBinding":
			o.SetOwnerReferences(nil)
			b, err := yaml.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			text += "---\n" + string(b)
		}
	}
	return text
}

// chartRole is what the chart's ClusterRole culvert-gateway allows.
const chartRole = `apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: culvert-gateway}
rules:
- {apiGroups: [culvert.dev], resources: [vpngateways, sites, devices], verbs: [get, list, watch]}
- {apiGroups: [culvert.dev], resources: [vpngateways/status, sites/status, devices/status], verbs: [patch]}
- {apiGroups: [""], resources: [services, nodes], verbs: [get, list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [get, list, watch]}
- {apiGroups: [events.k8s.io], resources: [events], verbs: [create, patch]}
`

// grant lets the gateway read one Secret, as the operator does.
func grant(t *testing.T, secrets ...string) string {
	t.Helper()
	text := ""
	for _, o := range (workload.Options{}).Grant(model.ID{Namespace: "default", Name: "edge"}, "default", secrets) {
		b, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		text += "---\n" + string(b)
	}
	return text
}

// inCluster makes a gateway read its objects from the API server, as the pod edge-0 on
// node-1, with an IKE daemon of its own beside it.
func (g *gateway) inCluster(a *apiServer) {
	g.t.Helper()
	ike := filepath.Join(g.dir, "ike")
	g.source = []string{"--kubeconfig", filepath.Join(a.dir, "gateway.kubeconfig"), "--namespace", "default", "--name", "edge", "--ipsec-dir", ike}
	g.env = []string{"POD_NAME=edge-0", "POD_NAMESPACE=default", "NODE_NAME=node-1", "POD_IPS=" + fabricIP + ",fd00:10:244::10", "HOST_IPS=" + nodeIP}
	g.host.Background(program, "gateway", "ipsec-daemon", "--dir", ike)
	g.t.Cleanup(func() {
		if g.t.Failed() {
			g.t.Logf("log of the IKE daemon:\n%s", tail(filepath.Join(ike, "charon.log"), 40))
		}
	})
}

// kubectlCulvert runs the program as a plug-in of kubectl, as administrator.
func (a *apiServer) kubectlCulvert(args ...string) (stdout, stderr string, code int) {
	a.t.Helper()
	plugin := filepath.Join(a.dir, "kubectl-culvert")
	if err := os.Symlink(program, plugin); err != nil && !errors.Is(err, os.ErrExist) {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := a.host.Command(ctx, plugin, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(a.dir, "admin.kubeconfig"))
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := a.host.Start(cmd); err != nil {
		a.t.Fatal(err)
	}
	_ = cmd.Wait()
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// operator runs the operator as an ordinary process.
func (a *apiServer) operator() {
	a.t.Helper()
	_, log := a.host.Background(program, "operator", "--kubeconfig", filepath.Join(a.dir, "admin.kubeconfig"), "--namespace", "default",
		"--image", "culvert.dev/culvert:test", "--alone", "--http", "", "--service-account", "none")
	a.t.Cleanup(func() {
		if a.t.Failed() {
			a.t.Logf("log of the operator:\n%s", tail(log, 30))
		}
	})
}
