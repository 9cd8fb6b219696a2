package reverse

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// opening opens connections through a tenant's egress all the time.
type opening struct {
	cancel   context.CancelFunc
	done     chan struct{}
	opened   int
	failures []failure
}

type failure struct {
	at  time.Time
	err error
}

func (p *plant) opening(x tenant, pause time.Duration) *opening {
	ctx, cancel := context.WithCancel(context.Background())
	o := &opening{cancel: cancel, done: make(chan struct{})}
	p.socket(x)
	go func() {
		defer close(o.done)
		for ctx.Err() == nil {
			at := time.Now()
			conn, err := p.connect(x, p.kubelet())
			if err != nil {
				o.failures = append(o.failures, failure{at, err})
			} else {
				o.opened++
				_ = conn.Close()
			}
			time.Sleep(pause)
		}
	}()
	return o
}

// stop ends it and returns what failed.
func (o *opening) stop() (opened int, failures []failure) {
	o.cancel()
	<-o.done
	return o.opened, o.failures
}

// testHubsUpdated: all hubs are replaced one by one, as by an upgrade, and the operator with
// them. No new connection fails, and those that are open go on while their hub waits. (The
// other tenant's kube-apiserver keeps connections, for which a hub waits a minute.)
func (p *plant) testHubsUpdated(t *testing.T) {
	x := p.selfTenant()
	p.connected(t, x)
	c := p.hosting.In(t)
	c.Wait("team-remote", "office")
	web := c.Kubectl("-n", "team-remote", "get", "pod", "office", "-o", "jsonpath={.status.podIP}")
	var open []net.Conn
	for range 8 { // of both hubs
		conn, err := p.connect(x, web+":8080")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		open = append(open, conn)
	}
	o := p.opening(x, 20*time.Millisecond)
	defer o.stop()
	began := time.Now()
	c.Kubectl("-n", "culvert-system", "delete", "pod", "-l", "app.kubernetes.io/component=operator", "--wait=false")
	c.Kubectl("-n", x.namespace, "rollout", "restart", "statefulset/culvert-hub-self")
	for i, conn := range open {
		if i == 0 { // the others wait meanwhile
			labtest.Eventually(t, 20*time.Second, "a hub is asked to stop", func() error {
				out, err := c.TryKubectl("-n", x.namespace, "get", "pod", "culvert-hub-self-1", "-o", "jsonpath={.metadata.deletionTimestamp}")
				if err == nil && out == "" {
					err = fmt.Errorf("not yet")
				}
				return err
			})
			time.Sleep(time.Second)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			t.Errorf("stream %d: %v", i, err)
			continue
		}
		if b, err := io.ReadAll(conn); err != nil || !strings.Contains(string(b), "pod=office") {
			t.Errorf("stream %d: %q, %v", i, b, err)
		}
		_ = conn.Close()
	}
	c.Kubectl("-n", x.namespace, "rollout", "status", "statefulset/culvert-hub-self", "--timeout=100s")
	p.connected(t, x)
	opened, failures := o.stop()
	t.Logf("both hubs were replaced within %s; %d connections were opened meanwhile", time.Since(began).Round(100*time.Millisecond), opened)
	for _, f := range failures {
		t.Errorf("a new connection failed %s after the update began: %v", f.at.Sub(began).Round(time.Millisecond), f.err)
	}
	if opened < 50 {
		t.Errorf("only %d connections were opened", opened)
	}
}

// office is what the other direction leads to: a web server in the hosting cluster.
const office = `
apiVersion: v1
kind: Pod
metadata: {name: office, namespace: team-remote, labels: {app: office}}
spec:
  terminationGracePeriodSeconds: 0
  securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: http
    image: culvert.dev/test:dev
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, readOnlyRootFilesystem: true}
---
apiVersion: v1
kind: Service
metadata: {name: office, namespace: team-remote}
spec:
  selector: {app: office}
  ports: [{port: 80, targetPort: 8080}]
`

// testExports: a pod of the remote cluster reaches what the hosting side exports, by the
// Service that "culvert join" has made, and nothing any more once it is not exported.
func (p *plant) testExports(t *testing.T) {
	c := p.hosting.In(t)
	c.Wait("team-remote", "office")
	get := func() (string, error) {
		return p.remote.Exec("ground", "web", "/server", "get", "http://culvert-spoke-remote.culvert-spoke.svc:6080/")
	}
	labtest.Eventually(t, 30*time.Second, "the office answers", func() error {
		out, err := get()
		if err == nil && !strings.Contains(out, "pod=office") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	c.Kubectl("-n", "team-remote", "patch", "remotecluster", "remote", "--type=json", "-p", `[{"op": "remove", "path": "/spec/exports"}]`)
	labtest.Eventually(t, 30*time.Second, "the office is closed", func() error {
		if out, err := get(); err == nil {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// behindProxy takes the remote cluster's way to the front, and gives it a company's proxy
// instead. asked is how many connections went through it.
func (p *plant) behindProxy() (proxy string, asked func() int) {
	p.t.Helper()
	const address = "198.18.1.9"
	h := p.hosting.In(p.t).OutsideHost("proxy", address+"/15")
	router := p.remote.Router
	for _, err := range []error{
		router.IP("route", "replace", address+"/32", "dev", "up0", "src", uplinkAddress),
		router.IP("route", "replace", "unreachable", p.front.String()+"/32"),
	} {
		if err != nil {
			p.t.Fatal(err)
		}
	}
	var l net.Listener
	if err := h.Do(func() (err error) {
		l, err = net.Listen("tcp", address+":3128")
		return err
	}); err != nil {
		p.t.Fatal(err)
	}
	x := &httpProxy{host: h}
	server := &http.Server{Handler: x, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(l) }()
	p.t.Cleanup(func() { _ = server.Close() })
	return "http://" + l.Addr().String(), func() int {
		x.mu.Lock()
		defer x.mu.Unlock()
		return x.asked
	}
}

// httpProxy serves CONNECT (RFC 9110, section 9.3.6) from a host of the lab.
type httpProxy struct {
	host  *lab.Host
	mu    sync.Mutex
	asked int
}

// ServeHTTP implements http.Handler.
func (x *httpProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	hijacker, ok := w.(http.Hijacker)
	if r.Method != http.MethodConnect || !ok {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	var to net.Conn
	if err := x.host.Do(func() (err error) {
		to, err = net.DialTimeout("tcp", r.Host, 5*time.Second)
		return err
	}); err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer to.Close()
	x.mu.Lock()
	x.asked++
	x.mu.Unlock()
	from, buffered, err := hijacker.Hijack()
	if err != nil {
		return
	}
	defer from.Close()
	_, _ = io.WriteString(from, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		_, _ = io.Copy(to, buffered)
		_ = to.Close()
	}()
	_, _ = io.Copy(from, to)
}

// gatewayOfTwo is a gateway in a pod that holds tunnels to two others, which are not there.
const gatewayOfTwo = `
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: two, namespace: team-gateway}
spec: {clusterTraffic: {source: Masquerade}, expose: {type: None}}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: hosting, namespace: team-gateway}
spec:
  gatewayRef: {name: two}
  cidrs: [10.80.0.0/16]
  wireguard:
    publicKey: 5BmCrfFD7bm4FecLAFI/VNcztyIi/6Nc+JyPgUVE7GU=
    endpoint: 198.18.1.201:51820
    probe: {address: 192.168.128.1, localAddress: 192.168.128.2}
    alternatives:
    - publicKey: zV2VkPjd0RZgBmSyzcMcPQbTKFNXyKUDZcUNRmSBGXM=
      endpoint: 198.18.1.202:51820
      probe: {address: 192.168.132.1, localAddress: 192.168.132.2}
`

// testProbes: a gateway in a pod may ping through its tunnels.
func (p *plant) testProbes(t *testing.T) {
	sent := regexp.MustCompile(`(?m)^culvert_path_lost_probes_total\{interface="cvtwg[01]",.*\} [1-9]`)
	labtest.Eventually(t, 60*time.Second, "both tunnels are probed", func() error {
		out, err := p.hosting.TryKubectl("get", "--raw", "/api/v1/namespaces/team-gateway/pods/culvert-two-0:9586/proxy/metrics")
		if err == nil && len(sent.FindAllString(out, -1)) != 2 {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
}
