package reverse

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// resident is what a process takes of memory, in bytes.
func resident(t *testing.T, p *exec.Cmd) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmRSS:\s+([0-9]+) kB`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("no VmRSS: %s", b)
	}
	kib, _ := strconv.Atoi(string(m[1]))
	return kib << 10
}

// memory: a hub that runs is small.
func (s *site) memory(t *testing.T, hubs []*exec.Cmd) {
	for i, h := range hubs {
		got := resident(t, h)
		t.Logf("hub %d: RSS %d KiB", i, got>>10)
		if got > 20_000_000 {
			t.Errorf("hub %d: RSS %d KiB, wanted at most 20 MB", i, got>>10)
		}
	}
}

// Idle connections of spokes to each hub: some that warm up what is needed once, and those
// that are weighed.
const (
	warmIdle    = 50
	weighedIdle = 300
)

// idle weighs an idle connection of a spoke: what the hub's process and that of the front before
// it grow by, together.
func (s *site) idle(t *testing.T, hubs []*exec.Cmd) {
	i, err := tunnel.ReadInvitation(s.path("spoke.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	routes := "routes:\n"
	for n, h := range i.Hubs {
		routes += fmt.Sprintf("- {serverName: %s, backends: [{address: %q}]}\n", h.ServerName, s.options.Addresses[n])
	}
	s.write("routes.yaml", routes)
	const at = "192.0.2.1:9443"
	front := s.start(s.control, "front", "--routes", s.path("routes.yaml"), "--listen", at, "--http", "127.0.0.1:9595", "--access-log=false")
	connect := s.connections(t, i, at)
	connect(warmIdle)
	sum := func() (atHubs, atFront int) {
		time.Sleep(2 * time.Second) // keepalives come and go
		for _, h := range hubs {
			atHubs += resident(t, h)
		}
		return atHubs, resident(t, front)
	}
	hubBefore, frontBefore := sum()
	connect(weighedIdle)
	hubAfter, frontAfter := sum()
	count := weighedIdle * len(hubs)
	atHub, atFront := (hubAfter-hubBefore)/count, (frontAfter-frontBefore)/count
	t.Logf("an idle connection of a spoke: %.1f KB at the hub, %.1f KB at the front", float64(atHub)/1e3, float64(atFront)/1e3)
	if atHub <= 0 || atFront <= 0 {
		t.Errorf("%d connections weigh nothing", count)
	}
	if atHub+atFront > 120_000 {
		t.Errorf("%d bytes at hub and front together, want at most 120 KB", atHub+atFront)
	}
}

// connections makes a function that holds so many more connections to each hub, through the
// front, as a spoke does; it returns when all are there. They end with the test.
func (s *site) connections(t *testing.T, i *tunnel.Invitation, at string) func(count int) {
	t.Helper()
	m, err := tunnel.FileKeeper{Dir: s.path("spoke")}.Load(t.Context())
	if err != nil || m == nil {
		t.Fatalf("membership: %v", err)
	}
	pair, err := tls.X509KeyPair([]byte(m.Pair), []byte(m.Pair))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(m.Authorities))
	if block == nil {
		t.Fatal("the membership has no authority")
	}
	authority, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	holder := &identity.Holder{}
	holder.Set(&identity.Credentials{UID: m.UID, Certificate: &pair, Authorities: []*x509.Certificate{authority}})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	dialer := &link.Dialer{
		Proxy: func(string) (*url.URL, error) { return nil, nil }, //nolint:nilnil // no proxy
		Dial: func(ctx context.Context, network, _ string) (c net.Conn, err error) {
			err = errors.Join(s.remote.Host.Do(func() (err error) {
				c, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, network, at)
				return err
			}))
			return c, err
		},
	}
	return func(count int) {
		t.Helper()
		l := link.NewLinks(i.Hubs, link.Options{
			Dialer: dialer, TLS: func(name string) *tls.Config { return identity.Dial(holder, name, wire.ALPNSpoke) },
			Hello: wire.Hello{Name: fmt.Sprintf("idle-%d", count)}, Least: count, Most: count, Logger: slog.New(slog.DiscardHandler),
		})
		wg.Go(func() { _ = l.Run(ctx) })
		labtest.Eventually(t, 30*time.Second, fmt.Sprintf("%d connections to each hub", count), func() error {
			if got := len(l.Members()); got != count*len(i.Hubs) {
				return fmt.Errorf("%d connections: %w", got, errors.Join(errors.New("not all"), l.Problem()))
			}
			return nil
		})
	}
}
