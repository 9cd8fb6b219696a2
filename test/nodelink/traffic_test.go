package nodelink

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

const port = 8080 // of all answerers

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func router(h *labtest.Host) {
	h.Sysctl("net/ipv4/ip_forward", "1")
	h.Sysctl("net/ipv6/conf/all/forwarding", "1")
}

func at(addr string) string { return net.JoinHostPort(addr, fmt.Sprint(port)) }

// answer serves TCP and UDP on addresses of a host until the test ends. A UDP packet is
// answered by "HOST ADDRESS": who answers, and from where the client was seen. Over TCP
// that comes first, then everything that the client sends until it is done, back.
func answer(t testing.TB, h *labtest.Host, addrs ...string) {
	t.Helper()
	for _, a := range addrs {
		h.Do(func() error {
			tcp, err := net.Listen("tcp", at(a))
			if err != nil {
				return err
			}
			udp, err := net.ListenPacket("udp", at(a))
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

func seen(name string, from net.Addr) string {
	host, _, _ := net.SplitHostPort(from.String())
	return name + " " + host
}

func answerTCP(name string, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			if _, err := io.WriteString(c, seen(name, c.RemoteAddr())+"\n"); err != nil {
				return
			}
			var all bytes.Buffer
			_, _ = io.Copy(&all, c)
			_, _ = io.Copy(c, &all)
		}()
	}
}

func answerUDP(name string, c net.PacketConn) {
	buf := make([]byte, 65536)
	for {
		_, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo([]byte(seen(name, from)), from)
		}
	}
}

func dial(h *labtest.Host, network, to string, timeout time.Duration) (c net.Conn, err error) {
	d := net.Dialer{Timeout: timeout}
	err = h.Host.Do(func() error { c, err = d.Dial(network, at(to)); return err })
	if err == nil {
		err = c.SetDeadline(time.Now().Add(timeout))
	}
	return c, err
}

// who asks an answerer who it is and as whom it sees the host.
func who(h *labtest.Host, network, to string, timeout time.Duration) (string, error) {
	c, err := dial(h, network, to, timeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if network == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return "", err
		}
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	return string(bytes.TrimSpace(buf[:n])), err
}

// reaches waits for a path: the answerer that is expected, seeing the host as expected.
func reaches(t testing.TB, h *labtest.Host, network, to, want string) {
	t.Helper()
	labtest.Eventually(t, 5*time.Second, fmt.Sprintf("%s reaches %s over %s", h.Name, to, network), func() error {
		got, err := who(h, network, to, time.Second)
		if err == nil && got != want {
			err = fmt.Errorf("answered %q, want %q", got, want)
		}
		return err
	})
}

// transfer sends size bytes there and gets the same back over TCP.
func transfer(h *labtest.Host, to string, size int64) error {
	c, err := dial(h, "tcp", to, 20*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	sent, got := sha256.New(), sha256.New()
	data := io.LimitReader(rand.NewChaCha8([32]byte{1, 2, 3}), size)
	if _, err := io.Copy(c, io.TeeReader(data, sent)); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	head := make([]byte, 1)
	for head[0] != '\n' {
		if _, err := io.ReadFull(c, head); err != nil {
			return fmt.Errorf("receive: %w", err)
		}
	}
	n, err := io.Copy(got, c)
	if err == nil && (n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil))) {
		err = fmt.Errorf("%d bytes of %d came back, or other ones", n, size)
	}
	return err
}
