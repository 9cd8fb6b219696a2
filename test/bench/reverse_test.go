package bench

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
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
		return contender{name: name, ours: strings.HasPrefix(name, "Culvert"), start: func(t *testing.T, l *labtest.Lab) candidate { return newReversal(t, l, name, brief, up) }}
	}
	ssh, vpn := start("ssh -R", sshReversal), start("OpenVPN-TCP + CONNECT proxies", openvpnReversal)
	ssh.absent, vpn.absent = needs("/usr/sbin/sshd"), needs("openvpn")
	return &suite{
		name: "reverse", title: "Reversed tunnel: a control plane reaches a cluster that only dials out", against: "Culvert",
		metrics: []metric{
			{name: "open", unit: "ms", less: true}, {name: "open p99", unit: "ms", less: true}, {name: "open, 10 ms RTT", unit: "ms", less: true}, {name: "open, 40 ms RTT", unit: "ms", less: true}, {name: "100 at once, p99", unit: "ms", less: true},
			{name: "one stream", unit: "Gbit/s"}, {name: "eight", unit: "Gbit/s"}, {name: "CPU", unit: "s/GB", less: true}, {name: "echo", unit: "ms", less: true}, {name: "echo, one reader stalled", unit: "ms", less: true}, {name: "memory per idle connection", unit: "KiB", less: true},
		},
		contenders: []contender{start("Culvert", culvertReversal), start("Culvert, by the hub's own listener", listenerReversal), vpn, ssh, start("direct TLS 1.3", directReversal)},
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
	l := h.Listen(at)
	if r.tls != nil {
		l = tls.NewListener(l, r.tls)
	}
	labtest.Serve(l, func(c net.Conn) { answer(c, greeting) })
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

func (r *reversal) measure(t *testing.T) figures {
	t.Helper()
	out := figures{}
	n, size := 100, int64(256<<20)
	if r.brief {
		n, size = 10, 16<<20
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", r.name, err)
		}
	}
	opens := r.latencies(t, n)
	out["open"], out["open p99"] = median(opens), quantile(opens, 0.99)
	for _, rtt := range []int{10, 40} {
		r.way.delay(time.Duration(rtt) * time.Millisecond)
		out[fmt.Sprintf("open, %d ms RTT", rtt)] = median(r.latencies(t, 5))
	}
	r.way.delay(0)
	out["100 at once, p99"] = r.burst(t, n)
	passed, cpu := r.way.bytes(), processorTime(r.pids...)
	seconds, err := r.download(1, size)
	must(err)
	out["one stream"] = float64(size) * 8 / seconds / 1e9
	if len(r.pids) > 0 {
		out["CPU"] = (processorTime(r.pids...) - cpu) / (float64(size) / 1e9)
	}
	if moved := r.way.bytes() - passed; moved < size {
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

// latencies are how long n connections take that follow one another, in milliseconds.
func (r *reversal) latencies(t *testing.T, n int) []float64 {
	t.Helper()
	var took []float64
	for range n {
		begin := time.Now()
		c, err := r.open()
		if err != nil {
			t.Fatalf("%s: %v", r.name, err)
		}
		took = append(took, time.Since(begin).Seconds()*1e3)
		_ = c.Close()
	}
	return took
}

// connections is what n connections that follow one another take, and how many of eight clients get
// through in a second.
func (r *reversal) connections(t *testing.T, n int) figures {
	t.Helper()
	out := figures{"first byte": median(r.latencies(t, n))}
	const clients = 8
	errs := make([]error, clients)
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			for range n {
				c, err := r.open()
				if err != nil {
					errs[i] = err
					return
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("%s: %d clients: %v", r.name, clients, err)
	}
	out["new connections"] = float64(clients*n) / time.Since(begin).Seconds()
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
					var got int64
					got, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(struct{ io.Reader }{c}, size), buf)
					if err == nil && got != size {
						err = fmt.Errorf("%d bytes of %d came: %w", got, size, io.ErrUnexpectedEOF)
					}
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
