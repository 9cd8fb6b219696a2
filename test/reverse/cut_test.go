package reverse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/reverse/egress"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// logged is a log that is read while it is written.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// String implements fmt.Stringer.
func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// observed is an egress on a Unix socket and a TCP port, with its log and metrics.
type observed struct {
	*egressProcess
	listener net.Listener
	log      *logged
	metrics  *prometheus.Registry
}

func (n *tenant) startObserved() *observed {
	n.t.Helper()
	c := &conns{}
	o := &observed{log: &logged{}, metrics: prometheus.NewRegistry()}
	links := n.links(n.holder(pki.Client, "api"), wire.ALPNClient, "api", c)
	links.Logger = slog.New(slog.NewTextHandler(o.log, nil))
	e := egress.New(egress.Options{Links: links, Hubs: n.settings().ClientHubs, Meter: meter.New(o.metrics, "egress", "default/prod")})
	socket := filepath.Join(n.t.TempDir(), "e")
	l, err := process.ListenUnix(context.Background(), socket, 0o660)
	if err != nil {
		n.t.Fatal(err)
	}
	if o.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		n.t.Fatal(err)
	}
	o.egressProcess = &egressProcess{e, n.start(func(ctx context.Context) error {
		var wg sync.WaitGroup
		wg.Go(func() { _ = e.Serve(ctx, l) })
		wg.Go(func() { _ = e.Serve(ctx, o.listener) })
		err := e.Run(ctx)
		wg.Wait()
		return err
	}, c), socket}
	n.eventually("the egress is connected", e.Ready)
	return o
}

// metric is the value of a counter with one label.
func (o *observed) metric(t *testing.T, name, label string) float64 {
	t.Helper()
	families, err := o.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if f.GetName() == name && l.GetValue() == label {
					return m.GetCounter().GetValue()
				}
			}
		}
	}
	return 0
}

// Who loses a stream with its spoke is told at once, whatever the kind of connection, and the
// egress tells why.
func TestCutIsTold(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	s := n.startSpoke("a")
	e := n.startObserved()
	hold := make(chan struct{}) // else the connections would be collected, and closed
	defer close(hold)
	silent := serve(t, func(c *net.TCPConn) { <-hold; _ = c.Close() }) // neither reads nor writes
	unix := func(to string) net.Conn {
		t.Helper()
		c, err := e.connect(to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	tcp, err := net.Dial("tcp", e.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	if tcp, err = handshake(tcp, silent); err != nil {
		t.Fatal(err)
	}
	secure, err := n.connectTLS(n.holder(pki.Client, "curl"), silent)
	if err != nil {
		t.Fatal(err)
	}
	defer secure.Close()
	writing := unix(silent)
	_ = writing.SetWriteDeadline(time.Now().Add(time.Second))
	if sent, err := io.Copy(writing, endless{}); err == nil {
		t.Fatalf("%d bytes were taken by somebody who does not read", sent)
	}
	waiting := unix(silent) // it has sent its request and nothing else
	ended := unix(silent)
	if _, err := io.WriteString(ended, "all that it has to say"); err != nil {
		t.Fatal(err)
	}
	_ = ended.(*net.UnixConn).CloseWrite()
	before := e.metric(t, "culvert_tunnel_streams_cut_total", "lost")
	began := time.Now()
	s.kill()
	for _, x := range []struct {
		what string
		c    net.Conn
		want error
	}{
		{"TCP", tcp, syscall.ECONNRESET},
		{"TLS to the hub", secure, syscall.ECONNRESET},
		{"a socket that is written to", writing, syscall.ECONNRESET},
		{"a socket that only waits", waiting, syscall.ECONNRESET},
		{"a socket that only waits, and has ended its own direction", ended, syscall.ECONNRESET},
	} {
		_ = x.c.SetReadDeadline(began.Add(5 * time.Second))
		if _, err := x.c.Read(make([]byte, 1)); !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", x.what, err, x.want)
		}
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("after %s only", took)
	}
	n.eventually("the egress has said why", func() error {
		cut := e.metric(t, "culvert_tunnel_streams_cut_total", "lost") - before
		if lines := strings.Count(e.log.String(), "stream cut"); cut != 4 || lines != 4 || strings.Count(e.log.String(), "target="+silent+" reason=lost") != 4 {
			return fmt.Errorf("%v counted, log:\n%s", cut, e.log)
		}
		return nil
	})
}

// endless is a reader of zeros.
type endless struct{}

// Read implements io.Reader.
func (endless) Read(b []byte) (int, error) { return len(b), nil }
