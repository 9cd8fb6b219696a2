// Package operator tests the operator as a process of its own against real etcd,
// kube-apiserver and kube-controller-manager on loopback: CRDs with CEL, server-side apply,
// the chart's rights and policies for the operator's service account, garbage collection.
// There are no nodes but objects of that name: what gateways do is played by the tests.
package operator

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/operator"
)

const (
	root       = "../../.."
	namespace  = "culvert-system"
	adminToken = "administrator-of-a-test" // of an API server on loopback that dies with the test
)

// plane is a control plane on loopback.
type plane struct {
	dir        string
	programs   string
	culvert    string // the program
	kubeconfig string // the administrator's
	asOperator string // the operator's service account's
	client     client.Client
	running    []*exec.Cmd
}

var shared *plane

func TestMain(m *testing.M) {
	logf.SetLogger(logr.Discard())
	os.Exit(func() int {
		p, err := startPlane()
		defer p.stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "control plane:", err)
			return 1
		}
		shared = p
		return m.Run()
	}())
}

func startPlane() (*plane, error) {
	p := &plane{}
	var err error
	if p.dir, err = os.MkdirTemp("", "culvert-plane-"); err != nil {
		return p, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	if p.programs, err = cluster.Programs(ctx, os.Stderr); err != nil {
		return p, err
	}
	p.culvert = filepath.Join(p.dir, "culvert")
	if err := run(ctx, nil, "go", "build", "-o", p.culvert, root+"/cmd/culvert"); err != nil {
		return p, err
	}
	if err := p.startServers(); err != nil {
		return p, err
	}
	if err := p.install(ctx); err != nil {
		return p, err
	}
	if err := p.startControllers(); err != nil {
		return p, err
	}
	p.client, err = newClient(p.kubeconfig)
	return p, err
}

func newClient(kubeconfig string) (client.Client, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 1000, 2000
	scheme, err := operator.NewScheme()
	if err != nil {
		return nil, err
	}
	if err := eventsv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	return client.New(config, client.Options{Scheme: scheme})
}

// startServers starts etcd, the API server and the controllers.
func (p *plane) startServers() error {
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	etcd, peer, api := ports[0], ports[1], ports[2]
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	saKey := p.write("sa.key", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})))
	tokens := p.write("tokens.csv", adminToken+",admin,admin,system:masters\n")
	p.kubeconfig = p.writeKubeconfig("admin.kubeconfig", api, "")
	p.asOperator = p.writeKubeconfig("operator.kubeconfig", api, "system:serviceaccount:"+namespace+":culvert-operator")
	url := func(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }
	for _, args := range [][]string{
		{
			"etcd", "--data-dir=" + filepath.Join(p.dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=" + url(etcd), "--advertise-client-urls=" + url(etcd), "--listen-peer-urls=" + url(peer),
			"--initial-advertise-peer-urls=" + url(peer), "--initial-cluster=default=" + url(peer),
		}, {
			"kube-apiserver", "--etcd-servers=" + url(etcd), "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", api),
			"--cert-dir=" + filepath.Join(p.dir, "certs"), "--token-auth-file=" + tokens, "--authorization-mode=RBAC",
			"--service-account-issuer=https://test", "--service-account-key-file=" + saKey, "--service-account-signing-key-file=" + saKey,
			"--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112", "--endpoint-reconciler-type=none",
		},
	} {
		if err := p.start(args...); err != nil {
			return err
		}
	}
	return p.answers()
}

// answers waits until the API server is ready.
func (p *plane) answers() error {
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := p.kubectl(context.Background(), "get", "--raw", "/readyz")
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// startControllers starts those that matter here. The garbage collector looks for new kinds
// every 30 s only, so it comes after the CRDs.
func (p *plane) startControllers() error {
	return p.start("kube-controller-manager", "--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0", "--kubeconfig="+p.kubeconfig,
		"--service-account-private-key-file="+filepath.Join(p.dir, "sa.key"), "--use-service-account-credentials=false",
		"--controllers=garbage-collector-controller,serviceaccount-controller,namespace-controller,statefulset-controller", "--concurrent-gc-syncs=5")
}

func (p *plane) start(args ...string) error {
	log, err := os.Create(filepath.Join(p.dir, args[0]+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(p.programs, args[0]), args[1:]...) //nolint:noctx // stop ends it
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	p.running = append(p.running, cmd)
	return nil
}

// restart kills a program, and starts it again after a while.
func (p *plane) restart(name string, after time.Duration) error {
	i := slices.IndexFunc(p.running, func(cmd *exec.Cmd) bool { return filepath.Base(cmd.Path) == name })
	if i < 0 {
		return fmt.Errorf("%s does not run", name)
	}
	cmd := p.running[i]
	p.running = slices.Delete(p.running, i, i+1)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	time.Sleep(after)
	return p.start(append([]string{name}, cmd.Args[1:]...)...)
}

func (p *plane) stop() {
	for _, cmd := range p.running {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	if os.Getenv("KEEP") == "" && p.dir != "" {
		_ = os.RemoveAll(p.dir)
	}
}

// install brings the CRDs and what the chart has for the operator: rights and policies.
func (p *plane) install(ctx context.Context) error {
	var helm bytes.Buffer
	if err := run(ctx, &helm, root+"/hack/helm.sh"); err != nil {
		return err
	}
	if err := p.kubectl(ctx, "apply", "--server-side", "-f", root+"/charts/culvert/crds"); err != nil {
		return err
	}
	if err := p.kubectl(ctx, "create", "namespace", namespace); err != nil {
		return err
	}
	var rendered bytes.Buffer
	args := []string{"template", "culvert", root + "/charts/culvert", "--namespace", namespace}
	for _, t := range []string{"rbac-operator", "rbac-gateway", "policy-operator"} {
		args = append(args, "--show-only", "templates/"+t+".yaml")
	}
	if err := run(ctx, &rendered, strings.TrimSpace(helm.String()), args...); err != nil {
		return err
	}
	if err := p.kubectl(ctx, "apply", "--server-side", "-f", p.write("chart.yaml", rendered.String())); err != nil {
		return err
	}
	return p.kubectl(ctx, "apply", "--server-side", "-f", p.write("nodes.yaml", nodes))
}

const nodes = `apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24], podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 172.30.0.11}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {podCIDRs: [10.244.2.0/24], podCIDR: 10.244.2.0/24}
status: {addresses: [{type: InternalIP, address: 172.30.0.12}]}
`

func (p *plane) kubectl(ctx context.Context, args ...string) error {
	return run(ctx, nil, filepath.Join(p.programs, "kubectl"), append([]string{"--kubeconfig", p.kubeconfig}, args...)...)
}

func (p *plane) write(name, text string) string {
	path := filepath.Join(p.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		panic(err)
	}
	return path
}

func (p *plane) writeKubeconfig(name string, port int, as string) string {
	user := "{token: " + adminToken
	if as != "" {
		user += fmt.Sprintf(", as: %q, as-groups: [\"system:serviceaccounts\", \"system:serviceaccounts:%s\", \"system:authenticated\"]", as, namespace)
	}
	return p.write(name, fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://127.0.0.1:%d", insecure-skip-tls-verify: true}}]
users: [{name: user, user: %s}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
`, port, user))
}

func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp4", "127.0.0.1:0") //nolint:noctx // only to find a port
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

func run(ctx context.Context, out *bytes.Buffer, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.Stdout = &said
	if out != nil {
		cmd.Stdout = out
	}
	if err := cmd.Run(); err != nil {
		return errors.Join(fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err), errors.New(said.String()))
	}
	return nil
}
