package bench

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// Where things are in the reversed suite: control can be dialled, remote cannot.
const (
	controlIP = "192.0.2.1"
	targetIP  = "10.50.0.1" // in the remote cluster
	entrance  = controlIP + ":9443"
)

var target = net.JoinHostPort(targetIP, "7000")

// reversal is a way from a control plane to a cluster that only dials out.
type reversal struct {
	*pair
	name    string
	way     *forwarder
	tls     *tls.Config // the target itself speaks TLS, and nobody is between
	connect func() (net.Conn, error)
	brief   bool
}

func reversed(brief bool) *suite {
	start := func(name string, up func(*reversal)) contender {
		return contender{name: name, ours: name == "Culvert", start: func(t *testing.T, l *labtest.Lab) candidate { return newReversal(t, l, name, brief, up) }}
	}
	ssh, vpn := start("ssh -R", sshReversal), start("OpenVPN-TCP + CONNECT proxies", openvpnReversal)
	ssh.absent, vpn.absent = needs("/usr/sbin/sshd"), needs("openvpn")
	return &suite{
		name: "reverse", title: "Reversed tunnel: a control plane reaches a cluster that only dials out", against: "Culvert",
		metrics: []metric{
			{"open", "ms", true}, {"open p99", "ms", true}, {"open, 10 ms RTT", "ms", true}, {"open, 40 ms RTT", "ms", true}, {"100 at once, p99", "ms", true},
			{"one stream", "Gbit/s", false}, {"eight", "Gbit/s", false}, {"CPU", "s/GB", true}, {"echo", "ms", true}, {"echo, one reader stalled", "ms", true}, {"memory per idle connection", "KiB", true},
		},
		contenders: []contender{start("Culvert", culvertReversal), vpn, ssh, start("direct TLS 1.3", directReversal)},
	}
}

func newReversal(t *testing.T, l *labtest.Lab, name string, brief bool, up func(*reversal)) *reversal {
	t.Helper()
	n := hosts.Add(1)
	r := &reversal{pair: &pair{t: t, a: l.Host(fmt.Sprintf("control%d", n)), b: l.Host(fmt.Sprintf("remote%d", n)), dir: shortDir(t)}, name: name, brief: brief}
	l.Connect(r.a, "eth0", controlIP+"/24", r.b, "eth0", "192.0.2.2/24")
	r.b.IP("addr", "add", targetIP+"/32", "dev", "lo")
	up(r)
	r.serve()
	labtest.Eventually(t, 30*time.Second, "a way to the target by "+name, func() error {
		c, err := r.open()
		if err == nil {
			err = c.Close()
		}
		return err
	})
	return r
}

// serve is the target.
func (r *reversal) serve() { r.serveAt(r.b, target, 'h') }

// serveAt says one byte, is asked for something, and does it: 'd' and a number: so many
// bytes; 'e': everything back.
func (r *reversal) serveAt(h *labtest.Host, at string, greeting byte) {
	r.t.Helper()
	var l net.Listener
	h.Do(func() (err error) {
		l, err = net.Listen("tcp", at)
		return err
	})
	r.t.Cleanup(func() { _ = l.Close() })
	if r.tls != nil {
		l = tls.NewListener(l, r.tls)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				answer(c, greeting)
			}()
		}
	}()
}

var zeros = make([]byte, 256<<10)

func answer(c net.Conn, greeting byte) {
	var ask [9]byte
	if _, err := c.Write([]byte{greeting}); err != nil {
		return
	}
	if _, err := io.ReadFull(c, ask[:]); err != nil {
		return
	}
	if ask[0] == 'e' {
		_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		return
	}
	for left := int64(binary.BigEndian.Uint64(ask[1:])); left > 0; {
		n, err := c.Write(zeros[:min(left, int64(len(zeros)))])
		if left -= int64(n); err != nil {
			return
		}
	}
}

// open connects, and returns when the target's first byte is there: a way that says yes at
// once gains nothing by that.
func (r *reversal) open() (net.Conn, error) {
	c, err := r.connect()
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil || b[0] != 'h' {
		return nil, errors.Join(fmt.Errorf("the target said %q: %w", b, err), c.Close())
	}
	return c, nil
}

func ask(c net.Conn, what byte, n int64) error {
	_, err := c.Write(binary.BigEndian.AppendUint64([]byte{what}, uint64(n)))
	return err
}

// dial connects on a host.
func dial(h *labtest.Host, network, address string) (c net.Conn, err error) {
	err = h.Host.Do(func() (err error) {
		c, err = net.DialTimeout(network, address, 10*time.Second)
		return err
	})
	return c, err
}

// through asks an HTTP proxy for the target.
func through(c net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err = fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	// Byte by byte: what follows is the target's.
	var head []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(head), "\r\n\r\n"); {
		if _, err := c.Read(b); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		head = append(head, b[0])
	}
	res, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(head))), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("CONNECT: %q", head), c.Close())
	}
	return c, nil
}

// culvertReversal is front, hub, spoke and egress, each a process.
func culvertReversal(r *reversal) {
	const uid = "6f1c2a54-0000-4000-8000-000000000001"
	program := strings.TrimSuffix(culvert, "culvert") + "culvert-tunnel"
	r.write("manifests/prod.yaml", `apiVersion: culvert.dev/v1alpha1
kind: RemoteCluster
metadata: {name: prod, namespace: default, uid: `+uid+`}
spec:
  hub: {replicas: 1}
  front: {address: "`+entrance+`", serverName: front.example.com}
  targets:
  - cidrs: [10.50.0.0/16]
    ports: [{port: 7000}]
`)
	r.write("routes.yaml", "routes: [{serverName: h0-"+uid+".front.example.com, tenant: prod, backends: [{address: \"127.0.0.1:8443\"}]}]\n")
	hub := []string{"--manifests", r.path("manifests"), "--state", r.path("hub")}
	r.program(r.a, program, "front", "--routes", r.path("routes.yaml"), "--listen", "127.0.0.1:8444", "--access-log=false")
	r.program(r.a, program, append([]string{"hub", "--listen-clients", "127.0.0.1:8132", "--listen-spokes", "127.0.0.1:8443"}, hub...)...)
	r.way = forward(r.t, r.a, entrance, "127.0.0.1:8444")
	join := func(file string, args ...string) {
		r.t.Helper()
		labtest.Eventually(r.t, 10*time.Second, "an invitation", func() error {
			out, err := exec.Command(culvert, append(append([]string{"join", "prod"}, hub...), args...)...).Output()
			if err == nil {
				r.write(file, string(out))
			}
			return err
		})
	}
	join("spoke.yaml")
	join("egress.yaml", "--role", "client")
	r.program(r.b, program, "spoke", "--join", r.path("spoke.yaml"), "--state", r.path("spoke"))
	r.program(r.a, program, "egress", "--join", r.path("egress.yaml"), "--state", r.path("egress"), "--socket", r.path("e.sock"))
	r.connect = func() (net.Conn, error) { return through(net.Dial("unix", r.path("e.sock"))) }
}

// sshReversal is OpenSSH with a forwarded port, as its manual has it.
func sshReversal(r *reversal) {
	for _, name := range []string{"host", "client"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", r.path(name)).CombinedOutput(); err != nil {
			r.t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		r.t.Fatal(err)
	}
	conf := r.write("sshd.conf", "Port 2222\nListenAddress 127.0.0.1\nHostKey "+r.path("host")+"\nAuthorizedKeysFile "+r.path("client.pub")+
		"\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nMaxSessions 1000\nMaxStartups 1000\nPidFile none\n")
	r.program(r.a, "/usr/sbin/sshd", "-D", "-e", "-f", conf)
	r.way = forward(r.t, r.a, entrance, "127.0.0.1:2222")
	time.Sleep(200 * time.Millisecond) // ssh gives up when nobody listens
	r.program(r.b, "ssh", "-N", "-i", r.path("client"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ExitOnForwardFailure=yes",
		"-o", "ConnectionAttempts=10", "-p", "9443", "-R", "127.0.0.1:9000:"+target, "root@"+controlIP)
	r.connect = func() (net.Conn, error) { return dial(r.a, "tcp", "127.0.0.1:9000") }
}

// openvpnReversal is what the reversed cluster VPN of Gardener is made of: OpenVPN over TCP,
// through an HTTP CONNECT proxy, with a CONNECT proxy behind it.
func openvpnReversal(r *reversal) {
	prints := [2]string{r.certificate("server"), r.certificate("client")}
	common := []string{"--dev", "tun0", "--data-ciphers", "AES-256-GCM", "--cipher", "AES-256-GCM", "--verb", "1", "--disable-dco", "--tcp-nodelay", "--connect-retry", "1"}
	r.program(r.a, "openvpn", append(common, "--ifconfig", "10.8.0.1", "10.8.0.2", "--proto", "tcp-server", "--port", "1194", "--tls-server", "--dh", "none",
		"--cert", r.path("server.crt"), "--key", r.path("server.key"), "--peer-fingerprint", prints[1])...)
	r.write("routes.yaml", "routes: [{serverName: vpn.front.example.com, tenant: prod, content: TCP, connectPort: 1194, backends: [{address: \"127.0.0.1:1194\"}]}]\n")
	r.program(r.a, strings.TrimSuffix(culvert, "culvert")+"culvert-tunnel", "front", "--routes", r.path("routes.yaml"), "--listen", "127.0.0.1:8444", "--access-log=false")
	r.way = forward(r.t, r.a, entrance, "127.0.0.1:8444")
	r.program(r.b, "openvpn", append(common, "--ifconfig", "10.8.0.2", "10.8.0.1", "--proto", "tcp-client", "--remote", "vpn.front.example.com", "1194", "--http-proxy", controlIP, "9443",
		"--tls-client", "--nobind", "--cert", r.path("client.crt"), "--key", r.path("client.key"), "--peer-fingerprint", prints[0])...)
	labtest.Eventually(r.t, 20*time.Second, "OpenVPN's link", func() error {
		_, err := r.b.Try("ip", "addr", "show", "dev", "tun0", "to", "10.8.0.2")
		return err
	})
	labtest.Eventually(r.t, 5*time.Second, "the proxy behind OpenVPN", func() error { return r.proxy("10.8.0.2:3128") })
	r.connect = func() (net.Conn, error) { return through(dial(r.a, "tcp", "10.8.0.2:3128")) }
}

// proxy is a plain CONNECT proxy in the remote cluster.
func (r *reversal) proxy(at string) error {
	var l net.Listener
	err := r.b.Host.Do(func() (err error) {
		l, err = net.Listen("tcp", at)
		return err
	})
	if err != nil {
		return err
	}
	r.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				req, err := http.ReadRequest(bufio.NewReaderSize(c, 4096))
				if err != nil || req.Method != http.MethodConnect {
					return
				}
				d, err := dial(r.b, "tcp", req.Host)
				if err != nil {
					return
				}
				defer d.Close()
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
				go func() { _, _ = io.Copy(d, c); _ = d.Close() }()
				_, _ = io.Copy(c, d)
			}()
		}
	}()
	return nil
}

// directReversal dials the target, which no control plane can here: the ceiling.
func directReversal(r *reversal) {
	r.certificate("target")
	pair, err := tls.LoadX509KeyPair(r.path("target.crt"), r.path("target.key"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.tls = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}
	r.a.IP("route", "add", targetIP+"/32", "via", "192.0.2.2")
	r.way = forward(r.t, r.a, entrance, target)
	// Its own certificate, known beforehand: a proof of identity as the others have it.
	client := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, VerifyConnection: func(s tls.ConnectionState) error {
		if !slices.Equal(s.PeerCertificates[0].Raw, pair.Certificate[0]) {
			return errors.New("another certificate")
		}
		return nil
	}}
	r.connect = func() (net.Conn, error) {
		c, err := dial(r.a, "tcp", entrance)
		if err != nil {
			return nil, err
		}
		s := tls.Client(c, client)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		return s, s.HandshakeContext(ctx)
	}
}

func (r *reversal) measure(t *testing.T) figures {
	t.Helper()
	out := figures{}
	n, size := 100, int64(128<<20)
	if r.brief {
		n, size = 10, 16<<20
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", r.name, err)
		}
	}
	latency := func(n int) []float64 {
		t.Helper()
		var took []float64
		for range n {
			begin := time.Now()
			c, err := r.open()
			must(err)
			took = append(took, time.Since(begin).Seconds()*1e3)
			_ = c.Close()
		}
		slices.Sort(took)
		return took
	}
	opens := latency(n)
	out["open"], out["open p99"] = median(opens), opens[len(opens)*99/100]
	for _, rtt := range []int{10, 40} {
		r.way.half.Store(int64(time.Duration(rtt) * time.Millisecond / 2))
		out[fmt.Sprintf("open, %d ms RTT", rtt)] = median(latency(5))
	}
	r.way.half.Store(0)
	out["100 at once, p99"] = r.burst(t, n)
	passed, cpu := r.way.bytes.Load(), processorTime(r.pids...)
	seconds, err := r.download(1, size)
	must(err)
	out["one stream"] = float64(size) * 8 / seconds / 1e9
	if len(r.pids) > 0 {
		out["CPU"] = (processorTime(r.pids...) - cpu) / (float64(size) / 1e9)
	}
	if moved := r.way.bytes.Load() - passed; moved < size {
		t.Errorf("%s: %d bytes were read, %d went over the path", r.name, size, moved)
	}
	seconds, err = r.download(8, size/8)
	must(err)
	out["eight"] = float64(size) * 8 / seconds / 1e9
	out["echo"] = r.echo(t, n)
	stalled, err := r.open()
	must(err)
	must(ask(stalled, 'd', 1<<30)) // and nobody reads
	time.Sleep(200 * time.Millisecond)
	out["echo, one reader stalled"] = r.echo(t, n)
	_ = stalled.Close()
	r.idle(t, out, n)
	return out
}

// burst opens n connections at once.
func (r *reversal) burst(t *testing.T, n int) float64 {
	t.Helper()
	took, errs := make([]float64, n), make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			begin := time.Now()
			c, err := r.open()
			took[i], errs[i] = time.Since(begin).Seconds()*1e3, err
			if err == nil {
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("%s: %d at once: %v", r.name, n, err)
	}
	slices.Sort(took)
	return took[n*99/100]
}

// download reads so many bytes on each of n streams, and says how long all took.
func (r *reversal) download(n int, size int64) (float64, error) {
	errs := make([]error, n)
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			c, err := r.open()
			if err == nil {
				defer c.Close()
				if err = ask(c, 'd', size); err == nil {
					buf := make([]byte, 256<<10)
					_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(struct{ io.Reader }{c}, size), buf)
				}
			}
			errs[i] = err
		})
	}
	wg.Wait()
	return time.Since(begin).Seconds(), errors.Join(errs...)
}

// echo is the median of a few bytes there and back, in milliseconds.
func (r *reversal) echo(t *testing.T, n int) float64 {
	t.Helper()
	c, err := r.open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := ask(c, 'e', 0); err != nil {
		t.Fatal(err)
	}
	var took []float64
	b := make([]byte, 64)
	for range n {
		begin := time.Now()
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatalf("%s: echo: %v", r.name, err)
		}
		took = append(took, time.Since(begin).Seconds()*1e3)
	}
	return median(took)
}

// idle is how much memory of the candidate's processes, all of them, an open connection
// takes that does nothing.
func (r *reversal) idle(t *testing.T, out figures, n int) {
	t.Helper()
	if len(r.pids) == 0 {
		return
	}
	total := func() (mb float64) {
		for _, pid := range family(r.pids) { // sshd has a child for each connection
			mb += resident(pid)
		}
		return mb
	}
	before := total()
	var open []net.Conn
	for range 2 * n {
		c, err := r.open()
		if err != nil {
			t.Fatalf("%s: idle connections: %v", r.name, err)
		}
		open = append(open, c)
	}
	out["memory per idle connection"] = max(0, (total()-before)*1e6/1024/float64(len(open)))
	for _, c := range open {
		_ = c.Close()
	}
}
