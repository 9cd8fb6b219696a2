package reverse

import (
	"crypto/tls"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/pki"
)

// pour listens inside a host, over TLS or not, and sends without end to whoever comes.
func (s *site) pour(h *labtest.Host, address string, config *tls.Config) {
	s.t.Helper()
	l := h.Listen(address)
	if config != nil {
		l = tls.NewListener(l, config)
	}
	labtest.Serve(l, func(c net.Conn) { _, _ = io.Copy(c, endless{}) })
}

// rate is how fast a connection delivers once it is under way, in Gbit/s.
func rate(t *testing.T, c net.Conn) float64 {
	t.Helper()
	defer c.Close()
	const warm, size = 10 << 20, 100 << 20
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.CopyN(io.Discard, c, warm); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := io.CopyN(io.Discard, c, size); err != nil {
		t.Fatal(err)
	}
	return size * 8 / time.Since(began).Seconds() / 1e9
}

// gigabit: where the network is the limit, a stream through egress, hub and spoke is as fast
// as a direct TLS connection.
func (s *site) gigabit(t *testing.T) {
	for _, h := range []*labtest.Host{s.control, s.remote} {
		h.Run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", "1gbit", "burst", "256kb", "latency", "20ms")
		defer h.Run("tc", "qdisc", "del", "dev", "eth0", "root")
	}
	n := newTenant(t, "u1")
	s.pour(s.remote, "10.50.0.1:7000", nil)
	s.pour(s.remote, "192.0.2.2:7001", &tls.Config{Certificates: []tls.Certificate{*n.holder(pki.Hub, "0").Get().Certificate}, MinVersion: tls.VersionTLS13})
	egress := &egressProcess{socket: s.path("e.sock")}
	var ratios []float64
	for range 3 {
		var raw net.Conn
		s.control.Do(func() (err error) {
			raw, err = net.Dial("tcp", "192.0.2.2:7001")
			return err
		})
		direct := rate(t, tls.Client(raw, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}))
		c, err := egress.connect("10.50.0.1:7000")
		if err != nil {
			t.Fatal(err)
		}
		through := rate(t, c)
		t.Logf("direct TLS %.2f Gbit/s, through the tunnel %.2f (%.2f×)", direct, through, through/direct)
		if direct > 1.1 {
			t.Fatalf("nothing holds the link to 1 Gbit/s")
		}
		ratios = append(ratios, through/direct)
	}
	if best, want := slices.Max(ratios), labtest.Goal(0.95, 0.6); best < want {
		t.Errorf("%.2f of a direct TLS connection's speed, wanted at least %.2f", best, want)
	}
}
