// Package front tests the front with real hubs, spokes and an egress, each a process of
// the small program, between network namespaces: the remote cluster lies behind NAT and
// has a route to the front and to nothing else.
package front

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// program is the small binary under test.
var program string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // every test skips
	}
	dir, err := os.MkdirTemp("", "front")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program = filepath.Join(dir, "culvert-tunnel")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "../../cmd/culvert-tunnel")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build culvert-tunnel: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// Addresses of the network.
const (
	public = "198.18.7.1" // of the control plane, where the fronts are
	nat    = "198.18.7.2" // what it sees of the remote cluster
	node   = "10.77.0.10" // in the remote cluster
	frontA = public + ":8443"
	frontB = public + ":8444"
)

// network is a control plane and a remote cluster behind NAT.
type network struct {
	t                    *testing.T
	control, nat, remote *labtest.Host
	dir                  string
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	l := labtest.New(t, "nft")
	n := &network{t: t, control: l.Host("control"), nat: l.Host("nat"), remote: l.Host("remote"), dir: t.TempDir()}
	l.Connect(n.control, "eth0", public+"/24", n.nat, "wan", nat+"/24")
	l.Connect(n.nat, "lan", "10.77.0.1/24", n.remote, "eth0", node+"/24")
	n.remote.IP("route", "add", "default", "via", "10.77.0.1")
	n.nat.Sysctl("net/ipv4/ip_forward", "1")
	// From outside nothing gets in but answers; there is no route to it either.
	n.nat.Run("nft", "-f", n.file("nat.nft", `table ip nat {
	chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }
	chain forward { type filter hook forward priority filter; policy drop;
		ct state established,related accept
		iifname "lan" accept
	}
}
`))
	return n
}

func (n *network) file(name, text string) string {
	n.t.Helper()
	path := filepath.Join(n.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path+".new", []byte(text), 0o600), os.Rename(path+".new", path)); err != nil {
		n.t.Fatal(err)
	}
	return path
}

// tenant is one RemoteCluster with two hubs, one behind each front.
type tenant struct {
	*network
	name  string
	index int
	opts  tunnel.HubOptions
	names []string // server names of the hubs
}

func (n *network) tenant(name string, index int) *tenant {
	n.t.Helper()
	n.file(name+"/manifests/remote.yaml", fmt.Sprintf(`apiVersion: culvert.dev/v1alpha1
kind: RemoteCluster
metadata: {name: %s, namespace: default}
spec:
  front: {address: "%s"}
  targets:
  - cidrs: [10.77.0.0/24]
    ports: [{port: 8080}]
`, name, frontA))
	d := &tenant{network: n, name: name, index: index}
	d.opts = tunnel.HubOptions{
		Manifests: filepath.Join(n.dir, name, "manifests"), State: filepath.Join(n.dir, name, "state"),
		Clients: d.port(20), Addresses: []string{frontA, frontB}, ClientAddresses: []string{d.port(20), d.port(21)},
	}
	i := d.invite(pki.Spoke, "probe")
	for _, h := range i.Hubs {
		d.names = append(d.names, h.ServerName)
	}
	if len(d.names) != 2 {
		n.t.Fatalf("hubs: %+v", i.Hubs)
	}
	return d
}

// port is an address on the control plane's loopback.
func (d *tenant) port(k int) string { return fmt.Sprintf("127.0.0.1:%d", 9000+100*d.index+k) }

func (d *tenant) invite(role pki.Role, as string) *tunnel.Invitation {
	d.t.Helper()
	opts := d.opts
	opts.Name = "default/" + d.name
	i, err := tunnel.Invite(opts, role, as)
	if err != nil {
		d.t.Fatal(err)
	}
	return i
}

func (d *tenant) invitation(role pki.Role, as string) string {
	d.t.Helper()
	b, err := yaml.Marshal(d.invite(role, as))
	if err != nil {
		d.t.Fatal(err)
	}
	return d.file(d.name+"/"+as+".yaml", string(b))
}

func (d *tenant) startHubs() {
	for i := range 2 {
		d.background(d.control, "hub", "--manifests", d.opts.Manifests, "--state", d.opts.State, "--replica", fmt.Sprint(i),
			"--listen-spokes", d.port(10+i), "--listen-clients", d.port(20+i), "--http", d.port(30+i), "--proxy-protocol-from", "127.0.0.0/8",
			"--address", frontA, "--address", frontB, "--client-address", d.port(20), "--client-address", d.port(21))
	}
}

func (d *tenant) startSpoke(as string, index int) (state string) {
	state = filepath.Join(d.dir, d.name, as)
	d.background(d.remote, "spoke", "--join", d.invitation(pki.Spoke, as), "--state", state, "--http", fmt.Sprintf("127.0.0.1:%d", 9000+100*d.index+40+index))
	return state
}

// startEgress starts an egress and waits until it can do its work.
func (d *tenant) startEgress() (socket string) {
	d.t.Helper()
	socket = filepath.Join(d.dir, d.name+".sock")
	d.background(d.control, "egress", "--join", d.invitation(pki.Client, "api"), "--state", filepath.Join(d.dir, d.name, "egress"),
		"--socket", socket, "--http", d.port(50))
	return socket
}

// routes writes the fronts' table.
func (n *network) routes(tenants ...*tenant) string {
	n.t.Helper()
	type m = map[string]any
	var routes []m
	for _, d := range tenants {
		for i, name := range d.names {
			routes = append(routes, m{"serverName": name, "tenant": d.name, "backends": []m{{"address": d.port(10 + i), "proxyProtocol": "V2"}}})
		}
	}
	b, err := yaml.Marshal(m{"routes": routes})
	if err != nil {
		n.t.Fatal(err)
	}
	return n.file("routes.yaml", string(b))
}

// startFront starts the front on one of the two public addresses; its access log is in
// the file.
func (n *network) startFront(routes, address string, http int) (cmd *exec.Cmd, log string) {
	n.t.Helper()
	cmd, log = n.background(n.control, "front", "--routes", routes, "--listen", address, "--http", fmt.Sprintf("127.0.0.1:%d", http), "--drain-timeout", "1s")
	labtest.Eventually(n.t, 10*time.Second, "the front listens", func() error {
		conn, err := n.dial(n.control, address)
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	return cmd, log
}

// background starts a command of the program; when the test fails, its log is shown.
func (n *network) background(on *labtest.Host, args ...string) (cmd *exec.Cmd, log string) {
	n.t.Helper()
	cmd, log = on.Background(program, args...)
	n.t.Cleanup(func() {
		if text, err := os.ReadFile(log); n.t.Failed() && err == nil {
			n.t.Logf("culvert-tunnel %s:\n%s", args[0], text[max(0, len(text)-2000):])
		}
	})
	return cmd, log
}

func (n *network) dial(from *labtest.Host, address string) (conn net.Conn, err error) {
	err = from.Host.Do(func() error {
		conn, err = net.DialTimeout("tcp", address, 5*time.Second)
		return err
	})
	return conn, err
}

// serveTarget echoes in the remote cluster, and counts connections.
func (n *network) serveTarget() (count func() int) {
	n.t.Helper()
	var l net.Listener
	n.remote.Do(func() (err error) {
		l, err = net.Listen("tcp", node+":8080")
		return err
	})
	var mu sync.Mutex
	total := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			total++
			mu.Unlock()
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.(*net.TCPConn).CloseWrite()
				_ = conn.Close()
			}()
		}
	})
	n.t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return total
	}
}

// connect opens a connection to the target through an egress.
func connect(socket, target string) (net.Conn, error) {
	conn, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", target)
	r := bufio.NewReaderSize(conn, 16)
	response, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err == nil {
		_ = response.Body.Close() // it has none
		if response.StatusCode != http.StatusOK {
			err = errors.New(response.Status)
		}
	}
	if err == nil && r.Buffered() > 0 {
		err = errors.New("bytes along with the reply")
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func echo(conn net.Conn, size int) error {
	sent := make([]byte, size)
	_, _ = rand.Read(sent)
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		failed <- err
	}()
	got := make([]byte, size)
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if err := <-failed; err != nil {
		return err
	}
	if !bytes.Equal(got, sent) {
		return errors.New("other bytes came back")
	}
	return nil
}

// spokes is how many connections the hub has from spokes.
func (d *tenant) spokes(hub int) (total int, err error) {
	var body []byte
	err = d.control.Host.Do(func() error {
		client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
			return d.dial(d.control, d.port(30+hub))
		}}}
		response, err := client.Get("http://hub/v1/status")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err = io.ReadAll(response.Body)
		return err
	})
	if err != nil {
		return 0, err
	}
	var status tunnel.HubStatus
	if err := json.Unmarshal(body, &status); err != nil {
		return 0, fmt.Errorf("%w: %s", err, body)
	}
	for _, p := range status.Peers {
		if p.Role == pki.Spoke {
			if p.From != nat {
				d.t.Errorf("the hub sees %s at %s, not at the NAT's address: the PROXY header is not used", p.Name, p.From)
			}
			total += p.Connections
		}
	}
	return total, nil
}

// Everything joined: an egress reaches a target in a cluster that can only dial the
// fronts. A front that is killed costs the connections through it and no other; the spokes
// are back within 10 s of its restart.
func TestThroughTheFronts(t *testing.T) {
	n := newNetwork(t)
	count := n.serveTarget()
	d := n.tenant("alpha", 0)
	routes := n.routes(d)
	killed, log := n.startFront(routes, frontA, 9590)
	n.startFront(routes, frontB, 9591)
	d.startHubs()
	const spokes = 5
	for i := range spokes {
		d.startSpoke(fmt.Sprintf("spoke-%d", i), i)
	}
	allBack := func(hub int) func() error {
		return func() error {
			got, err := d.spokes(hub)
			if err == nil && got < spokes*2 {
				err = fmt.Errorf("%d connections of spokes to hub %d", got, hub)
			}
			return err
		}
	}
	labtest.Eventually(t, 30*time.Second, "the spokes joined and are at hub 0", allBack(0))
	labtest.Eventually(t, 30*time.Second, "the spokes are at hub 1", allBack(1))
	socket := d.startEgress()
	var first net.Conn
	labtest.Eventually(t, 20*time.Second, "a connection through it all", func() (err error) {
		first, err = connect(socket, node+":8080")
		return err
	})
	if err := echo(first, 20<<20); err != nil {
		t.Fatal(err)
	}
	// Many at once, each byte-exact.
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			conn, err := connect(socket, node+":8080")
			if err == nil {
				err = echo(conn, 100_000)
				_ = conn.Close()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := count(); got != 101 {
		t.Errorf("%d connections reached the target, want 101", got)
	}

	// The streams of both hubs; those of one front end with it.
	var streams []net.Conn
	for range 20 {
		conn, err := connect(socket, node+":8080")
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, conn)
	}
	if err := killed.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	alive := 0
	for _, conn := range streams {
		if echo(conn, 1000) == nil {
			alive++
		}
		_ = conn.Close()
	}
	conn, err := connect(socket, node+":8080")
	if err != nil {
		t.Errorf("a new connection a second after one front was killed: %v", err)
	} else {
		_ = conn.Close()
	}
	t.Logf("%d of 20 streams survived one of two fronts", alive)
	if alive == 0 || alive == 20 {
		t.Errorf("%d of 20 streams survived; the test wants some on each front", alive)
	}
	begin := time.Now()
	n.startFront(routes, frontA, 9590)
	labtest.Eventually(t, 10*time.Second, "all spokes are back", allBack(0))
	t.Logf("%d spokes are back %s after the front's restart", spokes, time.Since(begin).Round(time.Millisecond))
	text, err := os.ReadFile(log)
	if err != nil || !strings.Contains(string(text), "front is up") {
		t.Errorf("%v: %s", err, text)
	}
}

// SNI and certificate that disagree, in all combinations of two tenants, a foreign name
// and no certificate: refused by front or hub within a second, and no target is dialled.
func TestCertificatesThatDisagree(t *testing.T) {
	n := newNetwork(t)
	count := n.serveTarget()
	a, b := n.tenant("alpha", 0), n.tenant("beta", 1)
	routes := n.routes(a, b)
	n.startFront(routes, frontA, 9590)
	n.startFront(routes, frontB, 9591)
	certificates := map[string]*tls.Certificate{"none": nil}
	for _, d := range []*tenant{a, b} {
		d.startHubs()
		state := d.startSpoke("spoke", 0)
		labtest.Eventually(t, 30*time.Second, "the spoke joined", func() error {
			c, err := certificate(state)
			certificates[d.name] = c
			return err
		})
	}
	names := map[string]string{"alpha": a.names[0], "beta": b.names[0], "foreign": "h0-foreign.example.org"}
	for nameOf, name := range names {
		for certificateOf, c := range certificates {
			begin := time.Now()
			err := n.handshake(name, c)
			if ok := nameOf == certificateOf; (err == nil) != ok {
				t.Errorf("SNI of %s, certificate of %s: %v", nameOf, certificateOf, err)
			}
			if took := time.Since(begin); took > time.Second {
				t.Errorf("SNI of %s, certificate of %s: took %s", nameOf, certificateOf, took)
			}
		}
	}
	if got := count(); got != 0 {
		t.Errorf("%d connections reached the target", got)
	}
}

// handshake dials the front as a spoke does; nil means that the hub took it.
func (n *network) handshake(name string, c *tls.Certificate) error {
	conn, err := n.dial(n.remote, frontA)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	config := &tls.Config{
		ServerName: name, MinVersion: tls.VersionTLS13, NextProtos: []string{"culvert-spoke/1"},
		InsecureSkipVerify: true, // the hub is not what is tested
	}
	if c != nil {
		config.Certificates = []tls.Certificate{*c}
	}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(context.Background()); err != nil {
		return err
	}
	// With TLS 1.3 a refused certificate shows at the first read. A hub that took it waits
	// for more, or begins to speak.
	_ = secure.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	var timeout net.Error
	if _, err := secure.Read(make([]byte, 1)); err != nil && (!errors.As(err, &timeout) || !timeout.Timeout()) {
		return err
	}
	return nil
}
