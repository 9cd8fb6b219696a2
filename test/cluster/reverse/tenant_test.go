package reverse

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// connect opens a connection through a tenant's egress as kube-apiserver does.
func (p *plant) connect(x tenant, target string) (net.Conn, error) {
	conn, err := net.DialTimeout("unix", p.socket(x), 5*time.Second)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(12 * time.Second))
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", target); err != nil {
		return nil, err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect}) //nolint:bodyclose // it is the connection
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		_ = conn.Close()
		return nil, fmt.Errorf("%s", res.Status)
	}
	_ = conn.SetDeadline(time.Time{})
	return conn, nil
}

// kubelet is the address of the node of both clusters.
func (p *plant) kubelet() string { return p.remote.Nodes[0].IPs()[0].String() + ":10250" }

// testSameRanges: each tenant reaches, at one and the same address, its own node.
func (p *plant) testSameRanges(t *testing.T) {
	if a, b := p.hosting.Nodes[0].IPs()[0], p.remote.Nodes[0].IPs()[0]; a != b {
		t.Fatalf("the clusters' ranges differ: %s, %s", a, b)
	}
	for _, x := range []tenant{p.remoteTenant(), p.selfTenant()} {
		for _, of := range []tenant{p.remoteTenant(), p.selfTenant()} {
			conn, err := p.connect(x, p.kubelet())
			if err != nil {
				t.Fatalf("%s: %v", x.name, err)
			}
			pool := x509.NewCertPool()
			ca, err := os.ReadFile(filepath.Join(filepath.Dir(of.cluster.Kubeconfig()), "ca.crt"))
			if err != nil || !pool.AppendCertsFromPEM(ca) {
				t.Fatal(err)
			}
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			err = tls.Client(conn, &tls.Config{RootCAs: pool, ServerName: p.remote.Nodes[0].IPs()[0].String()}).HandshakeContext(t.Context())
			_ = conn.Close()
			if own := x.name == of.name; (err == nil) != own {
				t.Errorf("through the tunnel of %s: a kubelet with a certificate of %s: %v", x.name, of.name, err)
			}
		}
	}
}

func (p *plant) testNotAllowed(t *testing.T) {
	for target, want := range map[string]string{
		"172.30.0.11:22": "403", "169.254.169.254:80": "403", "127.0.0.1:10250": "403", "[::ffff:169.254.169.254]:80": "403", "kubernetes.default.svc:443": "403",
	} {
		conn, err := p.connect(p.remoteTenant(), target)
		if err == nil {
			_ = conn.Close()
		}
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, want %s", target, err, want)
		}
	}
}

// long is a connection that stays open and says when it ends.
func (p *plant) long(t *testing.T, x tenant) <-chan error {
	t.Helper()
	conn, err := p.connect(x, p.kubelet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ended := make(chan error, 1)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		ended <- err
	}()
	return ended
}

// steady opens connections all the time, and returns those that failed later than a second
// after begin was called. Only the product's own promise is measured: see testHubDies.
func (p *plant) steady(t *testing.T, x tenant, fault func()) {
	t.Helper()
	o := p.opening(x, 20*time.Millisecond)
	defer o.stop()
	time.Sleep(200 * time.Millisecond)
	fault()
	from := time.Now().Add(time.Second) // kubectl returns when the pod is gone
	time.Sleep(5 * time.Second)
	opened, failures := o.stop()
	for _, f := range failures {
		if f.at.After(from) {
			t.Errorf("a new connection failed %s after the fault: %v", f.at.Sub(from)+time.Second, f.err)
		} else {
			t.Logf("in the first second: %v", f.err)
		}
	}
	t.Logf("%d connections were opened", opened)
	if opened < 20 {
		t.Errorf("only %d connections were opened", opened)
	}
}

// testHubDies: new connections go on through the other hub, and the pod that replaces it
// gets its spokes back, with nobody invited again.
func (p *plant) testHubDies(t *testing.T) {
	x := p.remoteTenant()
	p.connected(t, x)
	p.steady(t, x, func() {
		p.hosting.In(t).Kubectl("-n", x.namespace, "delete", "pod", "culvert-hub-remote-0", "--grace-period=0", "--force")
	})
	p.connected(t, x)
}

// testSpokeDies: the same for a spoke; its streams end, and those of the other one go on.
func (p *plant) testSpokeDies(t *testing.T) {
	x := p.remoteTenant()
	var open []<-chan error
	for range 8 { // of both spokes
		open = append(open, p.long(t, x))
	}
	pods := strings.Fields(p.remote.In(t).Kubectl("-n", "culvert-spoke", "get", "pods", "-o", "name"))
	p.steady(t, x, func() {
		p.remote.In(t).Kubectl("-n", "culvert-spoke", "delete", pods[0], "--grace-period=0", "--force")
	})
	ended := 0
	for _, c := range open {
		select {
		case err := <-c:
			if ended++; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("a stream of the spoke that died: %v, want %v", err, syscall.ECONNRESET)
			}
		default:
		}
	}
	t.Logf("%d of %d streams went with the spoke", ended, len(open))
	if ended == 0 || ended == len(open) {
		t.Errorf("%d of %d streams ended with one of two spokes", ended, len(open))
	}
	p.connected(t, x)
}

// testTableChanges: other remote clusters come and go, and no connection breaks.
func (p *plant) testTableChanges(t *testing.T) {
	open := p.long(t, p.remoteTenant())
	c := p.hosting.In(t)
	since := c.Kubectl("-n", "team-remote", "get", "remotecluster", "remote", "-o", "jsonpath={.status.hubs[*].spokes[*].connectedTime}")
	c.Apply(`
apiVersion: culvert.dev/v1alpha1
kind: RemoteCluster
metadata: {name: third, namespace: team-self}
spec: {hub: {replicas: 1}, targets: [{cidrs: [10.0.0.0/8], ports: [{port: 443}]}]}
`)
	routes := func(want bool) {
		labtest.Eventually(t, 20*time.Second, "the front's table", func() error {
			out, err := c.TryKubectl("-n", "culvert-system", "get", "configmap", "culvert-front-routes", "-o", "jsonpath={.data}")
			if err == nil && strings.Contains(out, "culvert-hub-third-0-spokes.team-self.svc:8443") != want {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
	}
	routes(true)
	c.Kubectl("-n", "team-self", "delete", "remotecluster", "third")
	routes(false)
	labtest.Eventually(t, 30*time.Second, "the third one's hubs are gone", func() error {
		out, err := c.TryKubectl("-n", "team-self", "get", "statefulsets,services,roles,secrets", "-o", "name")
		if err == nil && strings.Contains(out, "culvert-hub-third") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	select {
	case err := <-open:
		t.Errorf("a connection broke: %v", err)
	default:
	}
	if now := c.Kubectl("-n", "team-remote", "get", "remotecluster", "remote", "-o", "jsonpath={.status.hubs[*].spokes[*].connectedTime}"); now != since {
		t.Errorf("spokes had to connect anew: %s, before %s", now, since)
	}
}

// testAuthority: the Secret with the authority is put back by the hubs, and never made anew.
func (p *plant) testAuthority(t *testing.T) {
	c := p.hosting.In(t)
	data := func() (out map[string]string, err error) {
		text, err := c.TryKubectl("-n", "team-remote", "get", "secret", "culvert-hub-remote-authority", "-o", "jsonpath={.data}")
		if err == nil {
			err = json.Unmarshal([]byte(text), &out)
		}
		return out, err
	}
	before, err := data()
	if err != nil {
		t.Fatal(err)
	}
	c.Kubectl("-n", "team-remote", "delete", "secret", "culvert-hub-remote-authority")
	c.Kubectl("-n", "team-remote", "annotate", "remotecluster", "remote", "probe=look-again", "--overwrite")
	labtest.Eventually(t, 90*time.Second, "the Secret is back", func() error {
		now, err := data()
		if err == nil && (len(now) != len(before) || now["authority-0.pem"] != before["authority-0.pem"]) {
			err = fmt.Errorf("another authority, or %d keys instead of %d", len(now), len(before))
		}
		return err
	})
	p.connected(t, p.remoteTenant())
}

// testRevoked: the spokes' connections close, and a new manifest lets them in again, now
// from behind a proxy.
func (p *plant) testRevoked(t *testing.T) {
	x := p.remoteTenant()
	name, _, _ := strings.Cut(p.hosting.In(t).Kubectl("-n", x.namespace, "get", "remotecluster", x.name, "-o", "jsonpath={.status.hubs[0].spokes[0].name}"), "/")
	open := p.long(t, x)
	p.culvert(t, "join", "revoke", x.name, "-n", x.namespace, "--as", name)
	select {
	case err := <-open:
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a stream of a revoked spoke: %v, want %v", err, syscall.ECONNRESET)
		}
	case <-time.After(10 * time.Second):
		t.Error("a connection of a revoked spoke is still open after 10 s")
	}
	labtest.Eventually(t, 30*time.Second, "no spoke is connected", func() error {
		out, err := p.hosting.TryKubectl("-n", x.namespace, "get", "remotecluster", x.name, "-o", "jsonpath={.status.conditions[?(@.type=='Connected')].reason}")
		if err == nil && out != "NoSpoke" {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	if conn, err := p.connect(x, p.kubelet()); err == nil || !strings.HasPrefix(err.Error(), "503") {
		t.Errorf("%v, %v", conn, err)
	}
	proxy, asked := p.behindProxy()
	x.cluster.In(t).Apply(p.culvert(t, "join", x.name, "-n", x.namespace, "--image-pull-policy", "Never", "--https-proxy", proxy))
	p.connected(t, x)
	conn, err := p.connect(x, p.kubelet())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	labtest.Eventually(t, 30*time.Second, "two spokes have two connections to each of two hubs", func() error {
		if n := asked(); n < 8 {
			return fmt.Errorf("the proxy was asked for %d", n)
		}
		return nil
	})
}

// testGate: the annotation takes the hubs away and brings them back, and the spokes come
// back by themselves.
func (p *plant) testGate(t *testing.T) {
	x := p.remoteTenant()
	c := p.hosting.In(t)
	// Its kube-apiserver keeps connections, for which a hub would wait a minute.
	c.Kubectl("-n", x.namespace, "delete", "pod", "egress")
	c.Kubectl("-n", x.namespace, "annotate", "remotecluster", x.name, "culvert.dev/reversed-tunnel=false", "--overwrite")
	labtest.Eventually(t, 30*time.Second, "the hubs are gone", func() error {
		out, err := c.TryKubectl("-n", x.namespace, "get", "statefulsets,services", "-o", "name")
		if err == nil && strings.TrimSpace(out) != "" && strings.Contains(out, "culvert-hub") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	if out := c.Kubectl("-n", x.namespace, "get", "remotecluster", x.name, "-o", "jsonpath={.status.conditions[?(@.type=='Accepted')].reason}"); out != "FeatureDisabled" {
		t.Errorf("Accepted has the reason %s", out)
	}
	c.Kubectl("-n", x.namespace, "annotate", "remotecluster", x.name, "culvert.dev/reversed-tunnel-")
	p.connected(t, x)
}

// ownAuthority: a hub asks for what its Role gives it before the API server knows of that, or after
// it is gone.
func ownAuthority(user, uri string) bool {
	account := strings.Split(strings.TrimPrefix(user, "system:serviceaccount:"), ":")
	return len(account) == 2 && uri == "/api/v1/namespaces/"+account[0]+"/secrets/"+account[1]+"-authority"
}

// testRights: nobody asked for what it may not have, and a hub reads its own Secret only.
func (p *plant) testRights(t *testing.T) {
	for _, c := range []string{p.hosting.AuditLog(), p.remote.AuditLog()} {
		f, err := os.Open(c)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var e struct {
				User           struct{ Username string }
				Verb           string
				RequestURI     string
				ResponseStatus struct{ Code int }
			}
			if json.Unmarshal(lines.Bytes(), &e) == nil && e.ResponseStatus.Code == http.StatusForbidden && strings.Contains(e.User.Username, ":culvert-") &&
				!strings.HasSuffix(e.User.Username, ":culvert-agent") && !strings.HasSuffix(e.User.Username, ":culvert-operator") && // of them test/cluster/chart knows more
				!ownAuthority(e.User.Username, e.RequestURI) {
				t.Errorf("%s: %s %s is forbidden", e.User.Username, e.Verb, e.RequestURI)
			}
		}
		_ = f.Close()
	}
	for name, want := range map[string]string{"culvert-hub-remote-authority": "yes", "culvert-egress-remote": "no"} {
		out, _ := p.hosting.TryKubectl("auth", "can-i", "get", "secret/"+name, "-n", "team-remote", "--as=system:serviceaccount:team-remote:culvert-hub-remote")
		if !strings.HasPrefix(out, want) {
			t.Errorf("may a hub read %s? %s", name, out)
		}
	}
	out, _ := p.hosting.TryKubectl("auth", "can-i", "get", "secret/culvert-hub-self-authority", "-n", "team-self", "--as=system:serviceaccount:team-remote:culvert-hub-remote")
	if !strings.HasPrefix(out, "no") {
		t.Errorf("may a hub read another tenant's authority? %s", out)
	}
}
