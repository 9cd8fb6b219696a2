package bench

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

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

const uid = "6f1c2a54-0000-4000-8000-000000000001" // of the RemoteCluster

// listenerReversal is the same, but the client speaks TLS itself, as that of a direct connection does: to
// the hub, as kube-apiserver can (transport.tcp). It borrows the egress's certificate.
func listenerReversal(r *reversal) {
	culvertReversal(r)
	var m *tunnel.Membership
	labtest.Eventually(r.t, 10*time.Second, "a client's certificate", func() (err error) {
		if m, err = (tunnel.FileKeeper{Dir: r.path("egress")}).Load(context.Background()); err == nil && m == nil {
			err = errors.New("there is none yet")
		}
		return err
	})
	pair, err := tls.X509KeyPair([]byte(m.Pair), []byte(m.Pair))
	if err != nil {
		r.t.Fatal(err)
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM([]byte(m.Authorities)) {
		r.t.Fatal("no authorities")
	}
	config := &tls.Config{RootCAs: authorities, ServerName: "localhost", Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}
	r.connect = func() (net.Conn, error) {
		c, err := dial(r.a, "tcp", "127.0.0.1:8132")
		if err != nil {
			return nil, err
		}
		return through(tls.Client(c, config), nil)
	}
}

// culvertReversal is front, hub, spoke and egress, each a process.
func culvertReversal(r *reversal) {
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
	r.way = forward(r.a, entrance, "127.0.0.1:8444")
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
	r.way = forward(r.a, entrance, "127.0.0.1:2222")
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
	r.way = forward(r.a, entrance, "127.0.0.1:8444")
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
	labtest.Serve(l, func(c net.Conn) {
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
	})
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
	r.way = forward(r.a, entrance, target)
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
