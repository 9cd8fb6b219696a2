package netlab

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// What a client asks an answerer for, as its first byte. Over UDP, everything but askWho
// is echoed.
const (
	askWho      = 'w' // "HOST ADDRESS": who answers, and from where the client was seen
	askEcho     = 'e' // everything that follows, back
	askUpload   = 'u' // 8 bytes of length, data; answered by the data's SHA-256
	askDownload = 'd' // 8 bytes of length; answered by so much of stream
)

// answer serves TCP and UDP on addresses of a host until the test ends.
func answer(t testing.TB, h *labtest.Host, addrs ...string) {
	t.Helper()
	for _, a := range addrs {
		at := netip.AddrPortFrom(netip.MustParseAddr(a), port).String()
		h.Do(func() error {
			tcp, err := net.Listen("tcp", at)
			if err != nil {
				return err
			}
			udp, err := net.ListenPacket("udp", at)
			if err != nil {
				return errors.Join(err, tcp.Close())
			}
			t.Cleanup(func() { _ = tcp.Close(); _ = udp.Close() })
			go answerTCP(h.Name, tcp)
			go answerUDP(h.Name, udp)
			return nil
		})
	}
}

func answerTCP(name string, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
			_ = serveTCP(name, c)
		}()
	}
}

func serveTCP(name string, c net.Conn) error {
	ask := make([]byte, 1)
	if _, err := io.ReadFull(c, ask); err != nil {
		return err
	}
	switch ask[0] {
	case askWho:
		_, err := io.WriteString(c, seen(name, c.RemoteAddr()))
		return err
	case askEcho:
		_, err := io.Copy(c, struct{ io.Reader }{c})
		return err
	}
	var size int64
	if err := binary.Read(c, binary.BigEndian, &size); err != nil {
		return err
	}
	if ask[0] == askDownload {
		_, err := io.CopyN(c, stream(), size)
		return err
	}
	sum := sha256.New()
	if _, err := io.CopyN(sum, c, size); err != nil {
		return err
	}
	_, err := c.Write(sum.Sum(nil))
	return err
}

func seen(name string, from net.Addr) string {
	host, _, _ := net.SplitHostPort(from.String())
	return name + " " + host
}

func answerUDP(name string, c net.PacketConn) {
	buf := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		reply := buf[:n]
		if n == 1 && buf[0] == askWho {
			reply = []byte(seen(name, from))
		}
		_, _ = c.WriteTo(reply, from)
	}
}

// stream is the same endless random data every time.
func stream() io.Reader { return rand.NewChaCha8([32]byte{1, 2, 3}) }

// at joins an address and a port.
func at(addr string, port int) string { return net.JoinHostPort(addr, fmt.Sprint(port)) }

// dial connects from a host, from the given source address unless it is empty.
func dial(h *labtest.Host, network, source, to string, timeout time.Duration) (c net.Conn, err error) {
	d := net.Dialer{Timeout: timeout}
	if source != "" {
		local := net.ParseIP(source)
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{IP: local}
		} else {
			d.LocalAddr = &net.UDPAddr{IP: local}
		}
	}
	err = h.Host.Do(func() error { c, err = d.Dial(network, to); return err })
	return c, err
}

// who asks an answerer who it is and as whom it sees the host. UDP is asked twice, since
// a handshake may be due.
func who(h *labtest.Host, network, to string) (string, error) {
	return whoFrom(h, network, "", to, 2*time.Second)
}

func whoFrom(h *labtest.Host, network, source, to string, timeout time.Duration) (string, error) {
	c, err := dial(h, network, source, to, timeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	buf := make([]byte, 256)
	tries := 1
	if network == "udp" {
		tries = 2
	}
	for range tries {
		_ = c.SetDeadline(time.Now().Add(timeout / time.Duration(tries)))
		if _, err = c.Write([]byte{askWho}); err != nil {
			return "", err
		}
		var n int
		if n, err = c.Read(buf); err == nil {
			return string(buf[:n]), nil
		}
		if errors.As(err, new(syscall.Errno)) { // a refusal
			return "", err
		}
	}
	return "", err
}

// reaches waits for a path: the answerer that is expected, seeing the host as expected.
func reaches(t testing.TB, h *labtest.Host, network, to, want string, timeout time.Duration) time.Duration {
	t.Helper()
	return eventually(t, timeout, fmt.Sprintf("%s reaches %s over %s", h.Name, to, network), func() error {
		got, err := who(h, network, to)
		if err == nil && !strings.HasPrefix(got, want) {
			err = fmt.Errorf("answered %q, want %q", got, want)
		}
		return err
	})
}

// blocked sees that a path does not exist.
func blocked(t testing.TB, h *labtest.Host, network, to string) {
	t.Helper()
	if got, err := whoFrom(h, network, "", to, 700*time.Millisecond); err == nil {
		t.Errorf("%s reaches %s over %s: %q answered", h.Name, to, network, got)
	}
}

// transfer sends size bytes there and size bytes back over TCP, byte-exact.
func transfer(h *labtest.Host, source, to string, size int64, timeout time.Duration) (up, down time.Duration, err error) {
	start := time.Now()
	c, err := dial(h, "tcp", source, to, timeout)
	if err != nil {
		return 0, 0, fmt.Errorf("upload: %w", err)
	}
	defer c.Close()
	_ = c.SetDeadline(start.Add(timeout))
	want := sha256.New()
	head := binary.BigEndian.AppendUint64([]byte{askUpload}, uint64(size))
	if _, err = c.Write(head); err == nil {
		_, err = io.CopyN(io.MultiWriter(c, want), stream(), size)
	}
	sum := make([]byte, sha256.Size)
	if err == nil {
		_, err = io.ReadFull(c, sum)
	}
	if err == nil && !bytes.Equal(sum, want.Sum(nil)) {
		err = errors.New("other bytes arrived")
	}
	if err != nil {
		return 0, 0, fmt.Errorf("upload: %w", err)
	}
	up = time.Since(start)
	start = time.Now()
	d, err := dial(h, "tcp", source, to, timeout)
	if err != nil {
		return up, 0, fmt.Errorf("download: %w", err)
	}
	defer d.Close()
	_ = d.SetDeadline(start.Add(timeout))
	got := sha256.New()
	n := int64(0)
	head[0] = askDownload
	if _, err = d.Write(head); err == nil {
		n, err = io.Copy(got, d)
	}
	if err == nil && (n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil))) {
		err = fmt.Errorf("%d bytes arrived, or other ones", n)
	}
	if err != nil {
		return up, 0, fmt.Errorf("download: %w", err)
	}
	return up, time.Since(start), nil
}

// probe sends numbered packets at a steady pace to an answerer, which echoes them.
type probe struct {
	t    testing.TB
	what string
	conn net.Conn
	quit chan struct{}
	done chan struct{}

	mu   sync.Mutex
	sent []time.Time
	back []time.Time // zero: no answer
}

// watch starts a probe from a host.
func watch(t testing.TB, h *labtest.Host, to string, every time.Duration) *probe {
	t.Helper()
	return watchFrom(t, h, "", to, every)
}

// watchFrom starts a probe from an address of a host.
func watchFrom(t testing.TB, h *labtest.Host, source, to string, every time.Duration) *probe {
	t.Helper()
	c, err := dial(h, "udp", source, to, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	p := &probe{t: t, what: h.Name + " → " + to, conn: c, quit: make(chan struct{}), done: make(chan struct{})}
	t.Cleanup(func() { _ = c.Close() })
	go p.send(every)
	go p.receive()
	return p
}

func (p *probe) send(every time.Duration) {
	defer close(p.done)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-p.quit:
			return
		case <-tick.C:
		}
		p.mu.Lock()
		seq := len(p.sent)
		p.sent, p.back = append(p.sent, time.Now()), append(p.back, time.Time{})
		p.mu.Unlock()
		_, _ = p.conn.Write(binary.BigEndian.AppendUint64([]byte("probe"), uint64(seq))) // refusals show as losses
	}
}

func (p *probe) receive() {
	buf := make([]byte, 64)
	for {
		n, err := p.conn.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n != 13 {
			continue
		}
		seq := binary.BigEndian.Uint64(buf[5:])
		p.mu.Lock()
		if seq < uint64(len(p.back)) && p.back[seq].IsZero() {
			p.back[seq] = time.Now()
		}
		p.mu.Unlock()
	}
}

// awaitBack waits until a probe that was sent after the event is answered, and returns
// how long after the event that was.
func (p *probe) awaitBack(event time.Time, timeout time.Duration) time.Duration {
	p.t.Helper()
	var after time.Duration
	eventually(p.t, time.Until(event.Add(timeout)), p.what+" is back", func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i := len(p.sent) - 1; i >= 0 && p.sent[i].After(event); i-- {
			if b := p.back[i]; !b.IsZero() && (after == 0 || b.Sub(event) < after) {
				after = b.Sub(event)
			}
		}
		if after == 0 {
			return errors.New("no answer")
		}
		return nil
	})
	return after
}

// lastAnswer is when the last answered probe was sent.
func (p *probe) lastAnswer() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := len(p.sent) - 1; i >= 0; i-- {
		if !p.back[i].IsZero() {
			return p.sent[i]
		}
	}
	return time.Time{}
}

// outcome is what a probe found.
type outcome struct {
	sent, lost int
	gap        time.Duration // longest time without an answered packet
}

func (o outcome) String() string {
	return fmt.Sprintf("%d of %d lost, longest gap %d ms", o.lost, o.sent, o.gap.Milliseconds())
}

// stop ends the probe; answers may take another second.
func (p *probe) stop() outcome {
	close(p.quit)
	<-p.done
	deadline := time.Now().Add(time.Second)
	for {
		o := p.outcome()
		if o.lost == 0 || time.Now().After(deadline) {
			_ = p.conn.Close()
			return o
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p *probe) outcome() outcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := outcome{sent: len(p.sent)}
	if o.sent == 0 {
		return o
	}
	last := p.sent[0]
	for i, b := range p.back {
		if b.IsZero() {
			o.lost++
			continue
		}
		o.gap = max(o.gap, p.sent[i].Sub(last))
		last = p.sent[i]
	}
	o.gap = max(o.gap, p.sent[len(p.sent)-1].Sub(last))
	return o
}

// unharmed ends the probe and sees that it lost nothing.
func (p *probe) unharmed() {
	p.t.Helper()
	o := p.stop()
	p.t.Logf("%s: %s", p.what, o)
	if o.lost > 0 || o.sent == 0 {
		p.t.Errorf("%s: %s, want none lost", p.what, o)
	}
}
