package reverse

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// ground runs, in the remote cluster, a web server, and a pod that is an admission webhook
// and an aggregated API.
func (p *plant) ground() {
	p.t.Helper()
	certificate, key := selfSigned(p.t, "web.ground.svc")
	p.remote.Namespace("ground")
	p.remote.Apply(fmt.Sprintf(groundManifest, base64.StdEncoding.EncodeToString(certificate), base64.StdEncoding.EncodeToString(key)))
	p.t.Cleanup(func() { // before kube-apiserver's way to them is gone
		_, _ = p.remote.TryKubectl("delete", "validatingwebhookconfiguration/ground", "apiservice/v1.probe.example.com", "--ignore-not-found")
	})
	p.remote.Wait("ground", "web")
}

const groundManifest = `
apiVersion: v1
kind: Secret
metadata: {name: tls, namespace: ground}
type: kubernetes.io/tls
data: {tls.crt: %[1]s, tls.key: %[2]s}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: ground, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: http
    image: culvert.dev/test:dev
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
  - name: tls
    image: culvert.dev/test:dev
    imagePullPolicy: Never
    command: [/server, tls, /tls/tls.crt, /tls/tls.key]
    volumeMounts: [{name: tls, mountPath: /tls}]
    readinessProbe: {tcpSocket: {port: 8443}, periodSeconds: 1}
  volumes: [{name: tls, secret: {secretName: tls}}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: ground}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: https, port: 443, targetPort: 8443}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: ground}
webhooks:
- name: probe.example.com
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 10
  objectSelector: {matchExpressions: [{key: probe, operator: Exists}]}
  rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
  clientConfig: {service: {name: web, namespace: ground, path: /admit}, caBundle: %[1]s}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.probe.example.com}
spec:
  group: probe.example.com
  version: v1
  groupPriorityMinimum: 100
  versionPriority: 100
  service: {name: web, namespace: ground}
  caBundle: %[1]s
`

// selfSigned is a certificate for a name that is its own authority, and its key, as PEM.
func selfSigned(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b})
}

// testAPIServer uses everything for which a kube-apiserver dials nodes and pods.
func (p *plant) testAPIServer(t *testing.T) {
	c := p.remote.In(t)
	t.Run("logs -f", func(t *testing.T) { p.follow(t) })
	t.Run("exec", func(t *testing.T) { p.exec(t) })
	t.Run("cp", func(t *testing.T) { p.copy(t) })
	t.Run("port-forward", func(t *testing.T) { p.portForward(t) })
	t.Run("service proxy", func(t *testing.T) {
		if out := c.In(t).Kubectl("get", "--raw", "/api/v1/namespaces/ground/services/web:80/proxy/"); !strings.Contains(out, "pod=web") {
			t.Errorf("%s", out)
		}
	})
	t.Run("kubelet's metrics", func(t *testing.T) {
		if out := c.In(t).Kubectl("get", "--raw", "/api/v1/nodes/node1/proxy/metrics"); !strings.Contains(out, "kubelet_running_pods") {
			t.Errorf("%.300s", out)
		}
	})
	t.Run("webhook", func(t *testing.T) {
		labtest.Eventually(t, 30*time.Second, "the webhook refuses", func() error {
			_, err := c.TryKubectl("create", "-f", p.manifest(t, "refuse"))
			if err == nil || !strings.Contains(err.Error(), "refused by the webhook") {
				return fmt.Errorf("%w", err)
			}
			return nil
		})
		c.In(t).Kubectl("create", "-f", p.manifest(t, "allow"))
	})
	t.Run("aggregated API", func(t *testing.T) {
		labtest.Eventually(t, 60*time.Second, "the aggregated API answers", func() error {
			out, err := c.TryKubectl("get", "--raw", "/apis/probe.example.com/v1/hello")
			if err == nil && out != "aggregated hello for admin\n" {
				err = fmt.Errorf("%q", out)
			}
			return err
		})
	})
}

// manifest is a file with a ConfigMap that the webhook is asked about.
func (p *plant) manifest(t *testing.T, probe string) string {
	t.Helper()
	p.write(probe+".yaml", fmt.Appendf(nil, "apiVersion: v1\nkind: ConfigMap\nmetadata: {generateName: probe-, namespace: ground, labels: {probe: %s}}\n", probe))
	return p.path(probe + ".yaml")
}

func (p *plant) kubectl(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, p.remote.Program("kubectl"), append([]string{"--kubeconfig", p.remote.Kubeconfig(), "-n", "ground"}, args...)...)
}

// follow sees a line of the log that is written while it is followed: its readiness probe
// calls every second.
func (p *plant) follow(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := p.kubectl(ctx, "logs", "-f", "--since=1s", "web", "-c", "http")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if n, err := out.Read(make([]byte, 100)); err != nil || n == 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	cancel()
	_ = cmd.Wait()
}

// exec runs a program with a pipe, and one on a terminal.
func (p *plant) exec(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := p.kubectl(ctx, "exec", "-i", "web", "-c", "http", "--", "wc", "-c")
	cmd.Stdin = bytes.NewReader(make([]byte, 1<<20))
	if out, err := cmd.Output(); err != nil || strings.TrimSpace(string(out)) != "1048576" {
		t.Errorf("pipe: %q, %v", out, err)
	}
	// script(1) gives kubectl a terminal.
	line := strings.Join(p.kubectl(ctx, "exec", "-it", "web", "-c", "http", "--", "sh", "-c", "'test -t 0 && echo terminal'").Args, " ")
	if out, err := exec.CommandContext(ctx, "script", "-qec", line, "/dev/null").CombinedOutput(); err != nil || !strings.Contains(string(out), "terminal") {
		t.Errorf("terminal: %q, %v", out, err)
	}
}

// copy copies 100 MB there and back.
func (p *plant) copy(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if _, err := p.remote.Exec("ground", "web", "/bin/busybox", "ln", "-sf", "/bin/busybox", "/bin/tar"); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 100_000_000)
	_, _ = rand.Read(data)
	p.write("there", data)
	began := time.Now()
	for _, args := range [][]string{{"cp", p.path("there"), "web:/tmp-there", "-c", "http"}, {"cp", "web:/tmp-there", p.path("back"), "-c", "http"}} {
		out, err := p.kubectl(ctx, args...).CombinedOutput()
		for range 2 { // Kubernetes' own, on a machine that is too busy: docs/reverse-tunnel.md
			if err != nil && strings.Contains(string(out), "unexpected EOF") {
				t.Logf("again: %s", out)
				out, err = p.kubectl(ctx, args...).CombinedOutput()
			}
		}
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	back, err := os.ReadFile(p.path("back"))
	if err != nil || sha256.Sum256(back) != sha256.Sum256(data) {
		t.Errorf("%d of %d bytes came back, or others: %v", len(back), len(data), err)
	}
	t.Logf("100 MB there and back in %s", time.Since(began).Round(time.Millisecond))
}

// portForward gets a page through a forwarded port.
func (p *plant) portForward(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	_, port, _ := net.SplitHostPort(address)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := p.kubectl(ctx, "port-forward", "pod/web", port+":8080")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 30*time.Second, "the forwarded port", func() error {
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
