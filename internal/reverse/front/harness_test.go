package front

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if options := os.Getenv(childVariable); options != "" {
		if err := runChild(options); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// authority signs the certificates of a test's backends.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pool *x509.CertPool

	clientCertificate tls.Certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key, cert: cert, pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	a.clientCertificate = a.certificate(t, "spoke")
	return a
}

func (a *authority) certificate(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.key}
}

// server is a backend: it counts what reaches it, says its name, and echoes.
type server struct {
	name        string
	address     string
	connections atomic.Int64
	bytes       atomic.Int64
	stop        func()
}

// counted counts bytes before TLS sees them.
type counted struct {
	net.Conn
	n *atomic.Int64
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// newServer starts a backend; without a certificate it speaks plain TCP. handle nil: say
// the name in a line and echo.
func newServer(t testing.TB, name string, certificate *tls.Certificate, handle func(net.Conn)) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{name: name, address: l.Addr().String()}
	if handle == nil {
		handle = func(conn net.Conn) {
			fmt.Fprintf(conn, "%s\n", name)
			_, _ = io.Copy(conn, conn)
			if half, ok := conn.(interface{ CloseWrite() error }); ok {
				_ = half.CloseWrite()
			}
		}
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.connections.Add(1)
			mu.Lock()
			conns[conn] = true
			mu.Unlock()
			wg.Go(func() {
				defer func() {
					_ = conn.Close()
					mu.Lock()
					delete(conns, conn)
					mu.Unlock()
				}()
				if certificate == nil {
					handle(conn)
					return
				}
				secure := tls.Server(counted{conn, &s.bytes}, &tls.Config{Certificates: []tls.Certificate{*certificate}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert})
				if secure.HandshakeContext(context.Background()) == nil {
					handle(secure)
				}
			})
		}
	})
	s.stop = func() {
		_ = l.Close()
		mu.Lock()
		for conn := range conns {
			_ = conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	}
	t.Cleanup(s.stop)
	return s
}

// records is an access log that can be read.
type records struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *records) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(b)
}

// all are the records so far.
func (r *records) all(t testing.TB) []map[string]any {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []map[string]any
	for line := range strings.Lines(r.text.String()) {
		var record map[string]any
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		out = append(out, record)
	}
	return out
}

// started is a front in this process with its listener and log.
type started struct {
	*Front
	t       testing.TB
	address string
	log     *records
	stop    func() // stops accepting
}

func start(t testing.TB, opts Options, routes ...Route) *started {
	t.Helper()
	s := &started{t: t, log: &records{}}
	opts.Access = slog.New(slog.NewJSONHandler(s.log, nil))
	s.Front = New(opts)
	t.Cleanup(func() { _ = s.Close() })
	s.set(routes...)
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	s.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(s.stop)
	return s
}

func (s *started) set(routes ...Route) {
	s.t.Helper()
	if _, err := s.Set(context.Background(), Table{Routes: routes}); err != nil {
		s.t.Fatal(err)
	}
}

// record waits for the log's record of a connection that f accepts.
func (s *started) record(f func(r map[string]any) bool) map[string]any {
	s.t.Helper()
	var found map[string]any
	eventually(s.t, 5*time.Second, "a record in the access log", func() error {
		for _, r := range s.log.all(s.t) {
			if f(r) {
				found = r
				return nil
			}
		}
		return fmt.Errorf("none in %v", s.log.all(s.t))
	})
	return found
}

func reasonIs(reason Reason) func(map[string]any) bool {
	return func(r map[string]any) bool { return r["reason"] == string(reason) }
}

func eventually(t testing.TB, within time.Duration, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("not within %s: %s: %v", within, what, err)
}

func dial(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.TCPConn)
}

// hello does a TLS handshake over conn and reads the line that backends begin with.
func (a *authority) hello(conn net.Conn, name string) (*tls.Conn, string, error) {
	secure := tls.Client(conn, &tls.Config{ServerName: name, RootCAs: a.pool, MinVersion: tls.VersionTLS13})
	if err := secure.HandshakeContext(context.Background()); err != nil {
		return nil, "", err
	}
	line, err := readLine(secure)
	return secure, line, err
}

// try is hello over a connection of its own; one that is reset at once is an error too.
func (a *authority) try(address, name string) (*tls.Conn, string, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return nil, "", err
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	secure, line, err := a.hello(conn, name)
	if err != nil {
		_ = conn.Close()
	}
	return secure, line, err
}

// readLine reads a line and not a byte more.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := []byte{0}; ; {
		if _, err := io.ReadFull(r, b); err != nil {
			return string(line), err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
}

// connect sends a CONNECT request and returns the answer's status and reason; what comes
// after its head stays in conn.
func connect(conn net.Conn, request string) (status int, line string, err error) {
	if _, err := io.WriteString(conn, request); err != nil {
		return 0, "", err
	}
	var head bytes.Buffer
	for !bytes.HasSuffix(head.Bytes(), []byte("\r\n\r\n")) {
		if _, err := io.CopyN(&head, conn, 1); err != nil {
			return 0, head.String(), err
		}
	}
	response, err := http.ReadResponse(bufio.NewReader(&head), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return 0, head.String(), err
	}
	_ = response.Body.Close()
	return response.StatusCode, response.Status, nil
}

func connectTo(target, host string) string {
	return fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, host)
}

// echo sends bytes and wants them back.
func echo(conn io.ReadWriter, b []byte) error {
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Write(b)
		failed <- err
	}()
	got := make([]byte, len(b))
	if _, err := io.ReadFull(conn, got); err != nil {
		return errors.Join(err, <-failed)
	}
	if err := <-failed; err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return errors.New("other bytes came back")
	}
	return nil
}

func routeTo(name string, servers ...*server) Route {
	r := Route{ServerName: name}
	for _, s := range servers {
		r.Backends = append(r.Backends, Backend{Address: s.address})
	}
	return r
}

func writeFile(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	// In one step, as those do who take care.
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

func (r *records) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

func newTestLogger(w io.Writer) *slog.Logger { return slog.New(slog.NewJSONHandler(w, nil)) }
