package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Kubeconfig is the file of the cluster's administrator (group system:masters). It leads
// through a port of 127.0.0.1, so it works in any network namespace of the host's own,
// but not inside a node.
func (c *Cluster) Kubeconfig() string { return c.pki("admin.kubeconfig") }

// NodeKubeconfig is the same for programs that run on a node or on the control plane's
// machine.
func (c *Cluster) NodeKubeconfig() string { return c.pki("inside.kubeconfig") }

func (c *Cluster) pki(file string) string { return c.path("pki", file) }

// Server is the URL of kube-apiserver on the fabric.
func (c *Cluster) Server() string {
	return "https://" + netip.AddrPortFrom(c.plan.control.ips[0], 6443).String()
}

// AuditLog is the file with a line of JSON for each request that a service account made
// (audit.k8s.io/v1, level Metadata).
func (c *Cluster) AuditLog() string { return c.path("log", "audit.log") }

func (c *Cluster) startControl(ctx context.Context) error {
	if err := c.forward(ctx); err != nil {
		return err
	}
	if err := c.issue(); err != nil {
		return err
	}
	if err := os.WriteFile(c.path("audit-policy.yaml"), []byte(auditPolicy), 0o600); err != nil {
		return err
	}
	if err := c.StartProgram("control", "etcd", "--name=cvk", "--data-dir="+c.path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=cvk=http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := c.StartProgram("control", "kube-apiserver", c.apiserverFlags()...); err != nil {
		return err
	}
	err := until(ctx, 3*time.Minute, "kube-apiserver is ready", func() error {
		_, err := c.Kubectl(ctx, "get", "--raw", "/readyz")
		return err
	})
	if err != nil {
		return fmt.Errorf("%w; its log ends with:\n%s", err, tail(c.Log("control", "kube-apiserver")))
	}
	if err := c.createNodes(ctx); err != nil {
		return err
	}
	controllers, scheduler := c.pki("kube-controller-manager.kubeconfig"), c.pki("kube-scheduler.kubeconfig")
	return errors.Join(
		c.StartProgram("control", "kube-controller-manager", "--leader-elect=false", "--bind-address=127.0.0.1",
			"--kubeconfig="+controllers, "--authentication-kubeconfig="+controllers, "--authorization-kubeconfig="+controllers,
			"--use-service-account-credentials", "--service-account-private-key-file="+c.pki("service-accounts.key"),
			"--root-ca-file="+c.pki("ca.crt"), "--cluster-signing-cert-file="+c.pki("ca.crt"), "--cluster-signing-key-file="+c.pki("ca.key"),
			"--controllers=*,-node-ipam-controller", "--allocate-node-cidrs=false"),
		c.StartProgram("control", "kube-scheduler", "--leader-elect=false", "--bind-address=127.0.0.1",
			"--kubeconfig="+scheduler, "--authentication-kubeconfig="+scheduler, "--authorization-kubeconfig="+scheduler),
	)
}

func (c *Cluster) apiserverFlags() []string {
	return []string{
		"--advertise-address=" + c.plan.control.ips[0].String(), "--secure-port=6443", "--etcd-servers=http://127.0.0.1:2379",
		"--client-ca-file=" + c.pki("ca.crt"), "--tls-cert-file=" + c.pki("kube-apiserver.crt"), "--tls-private-key-file=" + c.pki("kube-apiserver.key"),
		"--kubelet-certificate-authority=" + c.pki("ca.crt"),
		"--kubelet-client-certificate=" + c.pki("kubelet-client.crt"), "--kubelet-client-key=" + c.pki("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + c.pki("service-accounts.pub"), "--service-account-signing-key-file=" + c.pki("service-accounts.key"),
		"--service-cluster-ip-range=" + join(ServiceCIDRs),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
		// Extension API servers and webhooks are reached at their pods' addresses: no
		// kube-proxy runs beside the control plane.
		"--enable-aggregator-routing",
		"--requestheader-client-ca-file=" + c.pki("front.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + c.pki("front-proxy.crt"), "--proxy-client-key-file=" + c.pki("front-proxy.key"),
		"--audit-policy-file=" + c.path("audit-policy.yaml"), "--audit-log-path=" + c.AuditLog(),
	}
}

// auditPolicy keeps what service accounts do, for tests of least privilege.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, userGroups: ["system:serviceaccounts:kube-system"]}
- {level: Metadata, userGroups: ["system:serviceaccounts"]}
- {level: None}
`

// issue makes all certificates and kubeconfigs.
func (c *Cluster) issue() error {
	ca, err := newAuthority(c.path("pki"), "ca")
	if err != nil {
		return err
	}
	front, err := newAuthority(c.path("pki"), "front")
	if err != nil {
		return err
	}
	local := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	errs := []error{
		ca.cert("kube-apiserver", subject{
			user: "kube-apiserver",
			dns: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
				"kubernetes.default.svc.cluster.local"},
			ips: append([]netip.Addr{local, ServiceCIDRs[0].Addr().Next(), ServiceCIDRs[1].Addr().Next()}, c.plan.control.ips...),
		}),
		ca.cert("kubelet-client", subject{user: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}}),
		ca.cert("service-accounts", subject{user: "service-accounts"}),
		front.cert("front-proxy", subject{user: "front-proxy"}),
		ca.kubeconfig("admin", "https://127.0.0.1:"+strconv.Itoa(c.port), subject{user: "admin", groups: []string{"system:masters"}}),
		ca.kubeconfig("inside", c.Server(), subject{user: "admin", groups: []string{"system:masters"}}),
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		errs = append(errs, ca.kubeconfig(name, c.Server(), subject{user: "system:" + name}))
	}
	for _, m := range c.plan.nodes {
		errs = append(errs,
			ca.kubeconfig(m.name, c.Server(), subject{user: "system:node:" + m.name, groups: []string{"system:nodes"}}),
			ca.cert(m.name+"-serving", subject{user: "system:node:" + m.name, groups: []string{"system:nodes"}, dns: []string{m.name}, ips: slices.Concat(m.ips, m.spare)}))
	}
	return errors.Join(errs...)
}

// forward starts a forwarder from a free port of 127.0.0.1 to kube-apiserver.
func (c *Cluster) forward(ctx context.Context) error {
	var err error
	for range 3 { // somebody may be quicker to take the free port
		if err = c.forwardOnce(ctx); err == nil {
			return c.save()
		}
	}
	return err
}

func (c *Cluster) forwardOnce(ctx context.Context) error {
	l, err := net.Listen("tcp4", "127.0.0.1:0") //nolint:noctx // only to find a free port
	if err != nil {
		return err
	}
	c.port = l.Addr().(*net.TCPAddr).Port
	if err := l.Close(); err != nil {
		return err
	}
	group, err := c.spawn(nil, "forward", []string{
		"socat",
		fmt.Sprintf("TCP4-LISTEN:%d,bind=127.0.0.1,reuseaddr,fork", c.port),
		fmt.Sprintf("EXEC:nsenter --net=/run/netns/%s socat -t 60 STDIO\\,shut-down TCP4\\:%s\\:6443", c.Control.Namespace, c.plan.control.ips[0]),
	})
	if err != nil {
		return err
	}
	c.running[forwarder] = running{Group: group}
	return until(ctx, 10*time.Second, fmt.Sprintf("socat listens on 127.0.0.1:%d", c.port), func() error {
		if syscall.Kill(group, 0) != nil {
			return stop{fmt.Errorf("it ended: %s", tail(c.Log("host", "forward")))}
		}
		tables, err := os.ReadFile("/proc/thread-self/net/tcp") // not /proc/net: the first thread may have ended in a namespace
		if want := fmt.Sprintf(" 0100007F:%04X 00000000:0000 0A ", c.port); err == nil && !strings.Contains(string(tables), want) {
			err = errors.New("not yet")
		}
		return err
	})
}

const forwarder = "host/forward"

// Kubectl runs kubectl as the cluster's administrator and returns what it printed on
// both streams.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.kubectl(ctx, "", args...)
}

// Apply applies manifests given as YAML.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	_, err := c.kubectl(ctx, manifests, "apply", "-f", "-")
	return err
}

func (c *Cluster) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.Program("kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "KUBECACHEDIR="+c.path("kubectl"), fewCollections, mark(c.Name))
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

func join[T fmt.Stringer](values []T) string {
	var texts []string
	for _, v := range values {
		texts = append(texts, v.String())
	}
	return strings.Join(texts, ",")
}
