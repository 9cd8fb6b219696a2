// Package reverse holds the reversed tunnel in Kubernetes to its promises: hubs and front
// made by the operator in one cluster, spokes applied in others that only dial out, and a
// kube-apiserver that has no other way to its nodes.
package reverse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/culvert-vpn/culvert/internal/cli"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// plant is everything: the hosting cluster with the front and two tenants, "remote" with a
// cluster behind NAT, and "self" with the hosting cluster itself. Both clusters have the
// same ranges of nodes, pods and services.
type plant struct {
	t       *testing.T
	hosting *clustertest.Cluster
	remote  *clustertest.Cluster
	front   netip.Addr
	dir     string
}

func TestReversedTunnel(t *testing.T) {
	log.SetLogger(logr.Discard()) // of the commands that are run in here
	if os.Getenv("CULVERT_CLUSTER") != "" && os.Getenv("CULVERT_REMOTE") == "" {
		labtest.Skip(t, "needs two clusters: set CULVERT_REMOTE, too")
	}
	p := build(t)
	p.ground()
	p.tenants()
	p.useEgress()
	renewals := p.watchRenewals(p.selfTenant())
	t.Run("kube-apiserver", func(t *testing.T) { p.testAPIServer(t) })
	t.Run("same ranges", func(t *testing.T) { p.testSameRanges(t) })
	t.Run("what is not allowed", func(t *testing.T) { p.testNotAllowed(t) })
	t.Run("exports", func(t *testing.T) { p.testExports(t) })
	t.Run("hubs are updated", func(t *testing.T) { p.testHubsUpdated(t) })
	t.Run("a hub dies", func(t *testing.T) { p.testHubDies(t) })
	t.Run("a spoke dies", func(t *testing.T) { p.testSpokeDies(t) })
	t.Run("the table changes", func(t *testing.T) { p.testTableChanges(t) })
	t.Run("the authority is lost", func(t *testing.T) { p.testAuthority(t) })
	t.Run("revoked", func(t *testing.T) { p.testRevoked(t) })
	t.Run("probes in a pod", func(t *testing.T) { p.testProbes(t) })
	t.Run("the feature gate", func(t *testing.T) { p.testGate(t) })
	t.Run("renewals", func(t *testing.T) { p.testRenewals(t, renewals) })
	t.Run("rights", func(t *testing.T) { p.testRights(t) })
}

// build starts both clusters, and lets the remote one dial the outside of the hosting one.
func build(t *testing.T) *plant {
	p := &plant{t: t, dir: t.TempDir()}
	type started struct {
		c   *cluster.Cluster
		err error
	}
	other := make(chan started, 1)
	go func() {
		if name := os.Getenv("CULVERT_REMOTE"); name != "" {
			c, err := cluster.Attach(context.Background(), name)
			other <- started{c, err}
			return
		}
		if os.Geteuid() != 0 || cluster.Check() != nil { // the hosting cluster's start says so
			other <- started{nil, errors.New("no cluster can run here")}
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		c, err := cluster.Start(ctx, cluster.Options{Name: fmt.Sprintf("r%d", os.Getpid()), Nodes: 1})
		other <- started{c, err}
	}()
	ended := false
	t.Cleanup(func() {
		if !ended {
			if s := <-other; s.err == nil && os.Getenv("CULVERT_REMOTE") == "" {
				_ = s.c.Stop()
			}
		}
	})
	p.hosting = clustertest.Start(t, cluster.Options{Nodes: 1})
	s := <-other
	ended = true
	if s.err != nil {
		t.Fatal(s.err)
	}
	if os.Getenv("CULVERT_REMOTE") == "" {
		t.Cleanup(func() {
			if err := s.c.Stop(); err != nil {
				t.Errorf("remove the remote cluster: %v", err)
			}
		})
	}
	p.remote = (&clustertest.Cluster{Cluster: s.c}).In(t)
	p.remote.LoadCulvert()
	p.hosting.LoadCulvert()
	// Operator and front, too.
	p.hosting.Apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + clustertest.System + ", labels: {pod-security.kubernetes.io/enforce: restricted}}\n")
	balanced := p.balance() // helm waits for the load balancer's address
	p.hosting.Install("--set", "front.enabled=true,agent.enabled=false,gatewayPods.sysctls=InitContainer")
	b := <-balanced
	if b == nil {
		t.Fatal("there is no load balancer")
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("load balancer: %v", err)
		}
	})
	p.front = b.Addresses[0]
	p.uplink()
	return p
}

// balance gives the front's Service a load balancer as soon as there is one.
func (p *plant) balance() <-chan *cluster.Balancer {
	out := make(chan *cluster.Balancer, 1)
	go func() {
		defer close(out)
		ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
		defer cancel()
		for ctx.Err() == nil {
			if b, err := p.hosting.Cluster.Balance(ctx, clustertest.System, "culvert-front", cluster.BalanceOptions{}); err == nil {
				out <- b
				return
			}
			time.Sleep(500 * time.Millisecond)
		}
	}()
	return out
}

// uplinkAddress is the remote cluster's on the outside of the hosting one.
const uplinkAddress = "198.19.0.9"

// uplink joins the remote cluster's router to the outside of the hosting cluster, as one
// more machine there: out through its NAT, never in.
func (p *plant) uplink() {
	p.t.Helper()
	router, outside := p.remote.Router, p.hosting.Outside
	_ = router.IP("link", "delete", "up0") // of an earlier run
	p.write("uplink.nft", fmt.Appendf(nil, `table ip uplink
delete table ip uplink
table ip uplink {
	chain out { type nat hook postrouting priority srcnat - 1; oifname "up0" masquerade; }
	chain through { type filter hook forward priority filter; iifname "up0" ct state new drop; }
	chain in { type filter hook input priority filter; iifname "up0" ct state new drop; }
}
`))
	for _, err := range []error{
		router.IP("link", "add", "up0", "type", "veth", "peer", "name", "p-remote", "netns", outside.Namespace),
		outside.IP("link", "set", "p-remote", "master", "br0", "up"),
		router.Up("up0", uplinkAddress+"/32"),
		router.IP("route", "replace", p.front.String()+"/32", "dev", "up0", "src", uplinkAddress),
	} {
		if err != nil {
			p.t.Fatal(err)
		}
	}
	if out, err := router.Output(p.t.Context(), "nft", "-f", p.path("uplink.nft")); err != nil {
		p.t.Fatalf("%v: %s", err, out)
	}
}

func (p *plant) path(name string) string { return filepath.Join(p.dir, name) }

func (p *plant) write(name string, b []byte) {
	p.t.Helper()
	if err := os.WriteFile(p.path(name), b, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// culvert runs a command on the hosting cluster and returns what it printed.
func (p *plant) culvert(t *testing.T, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	if code := cli.Run(t.Context(), append(args, "--kubeconfig", p.hosting.Kubeconfig()), cli.Streams{Out: &out, Err: &errs}); code != 0 {
		t.Fatalf("culvert %s: exit code %d: %s", strings.Join(args, " "), code, errs.String())
	}
	return out.String()
}

// tenant is a namespace of the hosting cluster with a RemoteCluster.
type tenant struct {
	namespace, name string
	cluster         *clustertest.Cluster // the other side
}

func (p *plant) remoteTenant() tenant { return tenant{"team-remote", "remote", p.remote} }
func (p *plant) selfTenant() tenant   { return tenant{"team-self", "self", p.hosting} }

// tenants makes both RemoteClusters, joins the clusters, and runs an egress for each.
func (p *plant) tenants() {
	p.t.Helper()
	for _, x := range []struct{ tenant, more string }{
		{"remote", "exports: [{name: office, listen: '0.0.0.0:6080', target: 'office.team-remote.svc:80'}]"}, // the front: its load balancer
		{"self", "front: {address: 'culvert-front." + clustertest.System + ".svc:443'}"},
	} {
		p.hosting.Namespace("team-" + x.tenant)
		p.hosting.Kubectl("label", "namespace", "team-"+x.tenant, "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
		if x.tenant == p.selfTenant().name {
			p.holdBack(p.selfTenant())
		}
		p.hosting.Apply(fmt.Sprintf(`
apiVersion: culvert.dev/v1alpha1
kind: RemoteCluster
metadata: {name: %s, namespace: team-%[1]s}
spec:
  %s
  targets:
  - {cidrs: [%s/32], ports: [{port: 10250}]}
  - {cidrs: [10.244.0.0/16], ports: [{port: 8080}, {port: 8443}]}
`, x.tenant, x.more, p.remote.Nodes[0].IPs()[0]))
	}
	p.shorten(p.selfTenant())
	p.hosting.Namespace("team-gateway")
	p.hosting.Apply(gatewayOfTwo + "---" + office)
	for _, x := range []tenant{p.remoteTenant(), p.selfTenant()} {
		p.hosting.Kubectl("-n", x.namespace, "wait", "remotecluster/"+x.name, "--for=condition=Ready", "--timeout=100s")
		x.cluster.Apply(p.culvert(p.t, "join", x.name, "-n", x.namespace, "--image-pull-policy", "Never"))
		p.t.Cleanup(func() {
			if out, err := x.cluster.TryKubectl("delete", "namespace", "culvert-spoke", "--wait=false", "--ignore-not-found"); err != nil {
				p.t.Errorf("%v: %s", err, out)
			}
		})
		p.hosting.Apply(p.culvert(p.t, "join", x.name, "-n", x.namespace, "--role", "client"))
		p.hosting.Apply(fmt.Sprintf(egressPod, x.name, x.namespace))
	}
	for _, x := range []tenant{p.remoteTenant(), p.selfTenant()} {
		p.connected(p.t, x)
		p.hosting.Wait(x.namespace, "egress")
		p.socket(x)
	}
}

// egressPod is what a kube-apiserver's pod would have beside it.
const egressPod = `
apiVersion: v1
kind: Pod
metadata: {name: egress, namespace: %[2]s}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: egress
    image: culvert.dev/culvert:dev
    imagePullPolicy: Never
    command: [culvert-tunnel]
    args: [egress, --join=/etc/culvert/invitation.yaml, --state-secret=culvert-egress-%[1]s, --socket=/run/egress/s.sock, "--http=:9589"]
    readinessProbe: {httpGet: {path: /readyz, port: 9589}, periodSeconds: 1}
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, readOnlyRootFilesystem: true}
    volumeMounts: [{name: invitation, mountPath: /etc/culvert}, {name: run, mountPath: /run/egress}]
  volumes: [{name: invitation, secret: {secretName: culvert-egress-%[1]s-invitation}}, {name: run, emptyDir: {}}]
`

// connected waits until spokes are at all hubs.
func (p *plant) connected(t *testing.T, x tenant) {
	t.Helper()
	labtest.Eventually(t, 100*time.Second, "spokes of "+x.name+" at all hubs", func() error {
		out, err := p.hosting.TryKubectl("-n", x.namespace, "get", "remotecluster", x.name, "-o", "jsonpath={.status.conditions[?(@.type=='Connected')].reason}")
		if err == nil && out != "Connected" {
			pods, _ := x.cluster.TryKubectl("-n", "culvert-spoke", "get", "pods")
			logs, _ := x.cluster.TryKubectl("-n", "culvert-spoke", "logs", "-l", "app.kubernetes.io/component=spoke", "--tail=3")
			err = fmt.Errorf("%s\n%s\n%s", out, pods, logs)
		}
		return err
	})
}

// socket makes a short name for a tenant's egress: those in pods are too long for an
// address.
func (p *plant) socket(x tenant) string {
	p.t.Helper()
	link := p.path(x.name + ".sock")
	if _, err := os.Lstat(link); err == nil {
		return link
	}
	uid := p.hosting.Kubectl("-n", x.namespace, "get", "pod", "egress", "-o", "jsonpath={.metadata.uid}")
	inside := filepath.Join(filepath.Dir(filepath.Dir(p.hosting.Kubeconfig())), "node1/var/lib/kubelet/pods", uid, "volumes/kubernetes.io~empty-dir/run/s.sock")
	if err := os.Symlink(inside, link); err != nil {
		p.t.Fatal(err)
	}
	return link
}

// useEgress shuts the remote kube-apiserver's own way to nodes and pods, and starts it anew
// with the egress selector.
func (p *plant) useEgress() {
	p.t.Helper()
	p.write("shut.nft", fmt.Appendf(nil, `table inet reversed
delete table inet reversed
table inet reversed { chain out { type filter hook output priority 0; ip daddr %s ct state new reject; ip daddr 10.244.0.0/16 reject; }; }
`, p.remote.Nodes[0].IPs()[0]))
	if out, err := p.remote.Control.Output(p.t.Context(), "nft", "-f", p.path("shut.nft")); err != nil {
		p.t.Fatalf("%v: %s", err, out)
	}
	if _, err := p.remote.TryKubectl("-n", "ground", "logs", "web", "--tail=1"); err == nil && os.Getenv("CULVERT_REMOTE") == "" {
		p.t.Fatal("kube-apiserver reaches the kubelet without the tunnel")
	}
	p.write("selector.yaml", []byte(tunnel.EgressSelectorConfiguration(p.socket(p.remoteTenant()))))
	args := p.apiserverArgs()
	if err := p.remote.StopProgram("control", "kube-apiserver"); err != nil {
		p.t.Fatal(err)
	}
	if err := p.remote.StartProgram("control", "kube-apiserver", append(args, "--egress-selector-config-file="+p.path("selector.yaml"))...); err != nil {
		p.t.Fatal(err)
	}
	labtest.Eventually(p.t, 2*time.Minute, "kube-apiserver is ready again", func() error {
		_, err := p.remote.TryKubectl("get", "--raw", "/readyz")
		return err
	})
	labtest.Eventually(p.t, time.Minute, "logs through the tunnel", func() error {
		_, err := p.remote.TryKubectl("-n", "ground", "logs", "web", "--tail=1")
		return err
	})
}

// apiserverArgs are those of the remote kube-apiserver as it was started.
func (p *plant) apiserverArgs() []string {
	p.t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if filepath.Base(args[0]) != "kube-apiserver" || !strings.Contains(string(b), filepath.Dir(p.remote.Kubeconfig())+"/") {
			continue
		}
		var out []string
		for _, a := range args[1:] {
			if !strings.HasPrefix(a, "--egress-selector-config-file=") { // of an earlier run
				out = append(out, a)
			}
		}
		return out
	}
	p.t.Fatal("the remote kube-apiserver does not run")
	return nil
}
