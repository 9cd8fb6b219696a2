package front

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	proxyproto "github.com/pires/go-proxyproto"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}

// From a trusted proxy a header is demanded and believed; from others none is.
func TestProxyHeaderIn(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	trusting := start(t, Options{ProxyFrom: loopback, MaxConnectionsPerSource: 1}, routeTo("a.example.com", a))
	for i, header := range []string{
		"PROXY TCP4 192.0.2.7 198.51.100.1 1234 443\r\n",
		"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x08\xc6\x33\x64\x01\x04\xd2\x01\xbb",
	} {
		conn := dial(t, trusting.address)
		_, _ = io.WriteString(conn, header)
		secure, _, err := ca.hello(conn, "a.example.com")
		if err != nil {
			t.Fatal(err)
		}
		// The limit is that of the source behind the proxy, not of the proxy.
		again := dial(t, trusting.address)
		_, _ = io.WriteString(again, header)
		if _, _, err := ca.hello(again, "a.example.com"); err == nil {
			t.Error("a second connection of the same source")
		}
		_ = secure.Close()
		source := fmt.Sprintf("192.0.2.%d:1234", 7+i)
		trusting.record(func(r map[string]any) bool {
			return r["source"] == source && r["proxy"] == conn.LocalAddr().String() && r["verdict"] == "relayed"
		})
	}
	for _, text := range []string{string(helloFor(t, "a.example.com")), connectTo("a.example.com:443", "a.example.com"), "PROXY TCP4 nonsense\r\n"} {
		conn := dial(t, trusting.address)
		_, _ = io.WriteString(conn, text)
		if got, err := io.ReadAll(conn); len(got) > 0 {
			t.Errorf("%.20q without a header is answered: %q, %v", text, got, err)
		}
	}
	local := dial(t, trusting.address) // a load balancer's own check
	_, _ = io.WriteString(local, "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00")
	if _, _, err := ca.hello(local, "a.example.com"); err != nil {
		t.Errorf("LOCAL: %v", err)
	}
	trusting.record(func(r map[string]any) bool {
		return r["source"] == local.LocalAddr().String() || r["verdict"] == "relayed"
	})

	// One that trusts others only.
	wary := start(t, Options{ProxyFrom: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}, routeTo("a.example.com", a))
	if conn, _, err := ca.try(wary.address, "a.example.com"); err != nil {
		t.Errorf("a client that is no proxy: %v", err)
	} else {
		_ = conn.Close()
	}
	before := a.connections.Load()
	for _, header := range []string{"PROXY TCP4 192.0.2.7 198.51.100.1 1234 443\r\n", "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"} {
		conn := dial(t, wary.address)
		_, _ = io.WriteString(conn, header)
		if _, _, err := ca.hello(conn, "a.example.com"); err == nil {
			t.Errorf("%q is believed", header)
		}
	}
	if n := a.connections.Load(); n != before {
		t.Errorf("%d connections reached the backend", n-before)
	}
}

// A backend that wants a header gets one with the client's addresses; with version 2 the
// server name too. With a proxy in front of the front it gets those that the proxy said.
func TestProxyHeaderOut(t *testing.T) {
	for version, proxy := range map[byte]ProxyProtocol{1: ProxyV1, 2: ProxyV2} {
		for _, protocol := range []string{protocolTLS, protocolConnect} {
			t.Run(string(proxy)+protocol, func(t *testing.T) {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				r := Route{ServerName: "a.example.com", Backends: []Backend{{Address: l.Addr().String(), ProxyProtocol: proxy}}}
				f := start(t, Options{ProxyFrom: loopback}, r)
				hello := helloFor(t, "a.example.com")
				conn := dial(t, f.address)
				_, _ = io.WriteString(conn, "PROXY TCP6 2001:db8::7 2001:db8::1 1234 443\r\n")
				if protocol == protocolConnect {
					if status, _, err := connect(conn, connectTo("a.example.com:443", "a.example.com")); status != 200 {
						t.Fatal(err)
					}
				}
				_, _ = conn.Write(hello)
				accepted, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				defer accepted.Close()
				_ = accepted.SetDeadline(time.Now().Add(5 * time.Second))
				backend := proxyproto.NewConn(accepted)
				got := make([]byte, len(hello))
				if _, err := io.ReadFull(backend, got); err != nil || string(got) != string(hello) {
					t.Fatalf("%d bytes, %v", len(got), err)
				}
				h := backend.ProxyHeader()
				if h == nil || h.Version != version || h.SourceAddr.String() != "[2001:db8::7]:1234" || h.DestinationAddr.String() != "[2001:db8::1]:443" {
					t.Errorf("%+v", h)
				}
				if version == 2 {
					tlvs, err := h.TLVs()
					if err != nil || len(tlvs) != 1 || tlvs[0].Type != proxyproto.PP2_TYPE_AUTHORITY || string(tlvs[0].Value) != "a.example.com" {
						t.Errorf("%v, %v", tlvs, err)
					}
				}
			})
		}
	}
}

// startHAProxy runs HAProxy until the end of the test, and waits for its port. Its only
// process is the one whose number is returned.
func startHAProxy(t *testing.T, address, config string) (pid int) {
	t.Helper()
	labtest.Require(t, "haproxy")
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("haproxy", "-db", "-q", "-f", file)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	eventually(t, 5*time.Second, "HAProxy listens", func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	return cmd.Process.Pid
}

const haproxyDefaults = `
global
	nbthread 2
defaults
	mode tcp
	timeout connect 5s
	timeout client 60s
	timeout server 60s
`

// HAProxy in front of the front and behind it, with both versions: the client's address
// arrives at the far end.
func TestProxyHeadersWithHAProxy(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, nil)
	for i, version := range []struct {
		name, send string
		proxy      ProxyProtocol
	}{{"v1", "send-proxy", ProxyV1}, {"v2", "send-proxy-v2", ProxyV2}} {
		t.Run(version.name, func(t *testing.T) {
			before, behind := freePort(t), freePort(t)
			// Behind: takes a header only, and sets the connection's source from it.
			log := filepath.Join(t.TempDir(), "log")
			socket := listenLog(t, log)
			startHAProxy(t, behind, haproxyDefaults+fmt.Sprintf("listen behind\n\tbind %s accept-proxy\n\tlog %s local0\n\toption tcplog\n\tserver a %s\n", behind, socket.path, a.address))
			f := start(t, Options{ProxyFrom: loopback}, Route{ServerName: "a.example.com", Backends: []Backend{{Address: behind, ProxyProtocol: version.proxy}}})
			startHAProxy(t, before, haproxyDefaults+fmt.Sprintf("listen before\n\tbind %s\n\tserver front %s %s\n", before, f.address, version.send))

			// From an address of its own, to be told from the proxies'.
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 7, 7, byte(1+i))}}
			conn, err := dialer.Dial("tcp", before)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			secure, greeting, err := ca.hello(conn, "a.example.com")
			if err != nil || greeting != "a" {
				t.Fatalf("%q, %v", greeting, err)
			}
			if err := echo(secure, make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
			_ = secure.Close()
			f.record(func(r map[string]any) bool {
				return r["source"] == conn.LocalAddr().String() && r["verdict"] == "relayed"
			})
			want := conn.LocalAddr().String()
			eventually(t, 5*time.Second, "HAProxy's log names "+want, func() error {
				if text := socket.text(); !strings.Contains(text, want) {
					return fmt.Errorf("it says %q", text)
				}
				return nil
			})
		})
	}
}

// logSocket takes what a program sends to syslog.
type logSocket struct {
	path string
	got  *records
}

func (l *logSocket) text() string { return l.got.String() }

func listenLog(t *testing.T, path string) *logSocket {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	l := &logSocket{path, &records{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 4096); ; {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			_, _ = l.got.Write(b[:n])
		}
	}()
	t.Cleanup(func() { _ = conn.Close(); <-done })
	return l
}

// curl speaks through the front as through any HTTP proxy: to names of the table only.
func TestCurl(t *testing.T) {
	labtest.Require(t, "curl")
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	a := newServer(t, "a", &cert, func(conn net.Conn) {
		_, _ = conn.Read(make([]byte, 4096))
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n")
	})
	f := start(t, Options{}, routeTo("a.example.com", a))
	curl := func(url string) (string, error) {
		out, err := exec.Command("curl", "-sSk", "-m", "10", "--proxy", "http://"+f.address, url).CombinedOutput()
		return string(out), err
	}
	if out, err := curl("https://a.example.com/"); out != "hello\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
	for url, status := range map[string]string{
		"https://b.example.com/":      "404",
		"https://a.example.com:8443/": "403",
		"https://" + a.address + "/":  "403",
	} {
		if out, err := curl(url); err == nil || !strings.Contains(out, status) {
			t.Errorf("%s: %q, %v; want %s", url, out, err, status)
		}
	}
}

// An unmodified OpenVPN reaches its server through the front as through any HTTP proxy,
// and comes back when it is cut off.
func TestOpenVPN(t *testing.T) {
	labtest.Require(t, "openvpn")
	ca := newAuthority(t)
	dir := t.TempDir()
	files := map[string][]byte{"ca.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})}
	key, err := x509.MarshalPKCS8PrivateKey(ca.key)
	if err != nil {
		t.Fatal(err)
	}
	files["key.pem"] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	for _, name := range []string{"server", "client"} {
		cert := ca.certificate(t, name+".example.com")
		files[name+".pem"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	}
	for name, text := range files {
		writeFile(t, dir, name, string(text))
	}
	address := freePort(t)
	_, listen, _ := net.SplitHostPort(address)
	openvpn := func(name string, args ...string) *records {
		log := &records{}
		// No tunnel device: what is tested ends where packets would begin.
		args = append([]string{"--dev", "null", "--verb", "3", "--ca", "ca.pem", "--cert", name + ".pem", "--key", "key.pem",
			"--connect-retry", "1", "2", "--ping", "1", "--ping-restart", "4"}, args...)
		cmd := exec.Command("openvpn", args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return log
	}
	completed := func(log *records, times int) {
		t.Helper()
		eventually(t, 30*time.Second, "the tunnel is up", func() error {
			if text := log.String(); strings.Count(text, "Initialization Sequence Completed") < times {
				return errors.New(text)
			}
			return nil
		})
	}
	r := Route{ServerName: "vpn.example.com", ConnectPort: 1194, Content: ContentTCP, Backends: []Backend{{Address: address}}}
	f := start(t, Options{}, r)
	host, proxy, _ := net.SplitHostPort(f.address)
	server := openvpn("server", "--tls-server", "--dh", "none", "--proto", "tcp-server", "--local", "127.0.0.1", "--lport", listen)
	client := openvpn("client", "--tls-client", "--nobind", "--proto", "tcp-client", "--remote", "vpn.example.com", "1194", "--http-proxy", host, proxy)
	completed(client, 1)
	completed(server, 1)
	f.set() // the table is empty: what is under way goes on
	time.Sleep(time.Second)
	if open, _ := f.Counts(); open != 1 {
		t.Errorf("%d connections", open)
	}
	f.set(r)
	for _, c := range f.relayed() { // cut off, it comes back
		c.end(Reset)
	}
	completed(client, 2)
	f.record(func(r map[string]any) bool {
		return r["protocol"] == protocolConnect && r["serverName"] == "vpn.example.com" && r["verdict"] == "relayed"
	})
}
