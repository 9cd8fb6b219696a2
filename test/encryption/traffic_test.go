package encryption

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

const port = 8080 // of all answerers

// answer serves TCP and UDP on addresses of a host until the test ends: it says who it is
// and as whom it sees the client.
func answer(t testing.TB, h *labtest.Host, addrs ...string) {
	t.Helper()
	for _, a := range addrs {
		serve(t, h, net.JoinHostPort(a, fmt.Sprint(port)), nil)
	}
}

// serve does so on one address, and counts what arrives.
func serve(t testing.TB, h *labtest.Host, at string, arrived *atomic.Int64) {
	t.Helper()
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
		note := func() {
			if arrived != nil {
				arrived.Add(1)
			}
		}
		go func() {
			for {
				c, err := tcp.Accept()
				if err != nil {
					return
				}
				note()
				go func() {
					defer c.Close()
					_ = c.SetDeadline(time.Now().Add(time.Minute))
					_, _ = io.WriteString(c, seen(h.Name, c.RemoteAddr())+"\n")
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		go func() {
			buf := make([]byte, 65536)
			for {
				_, from, err := udp.ReadFrom(buf)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					note()
					_, _ = udp.WriteTo([]byte(seen(h.Name, from)+"\n"), from)
				}
			}
		}()
		return nil
	})
}

func seen(name string, from net.Addr) string {
	host, _, _ := net.SplitHostPort(from.String())
	return name + " " + host
}

// ask opens a connection, or sends a packet, and returns what is answered.
func ask(h *labtest.Host, network, at string, timeout time.Duration) (string, error) {
	var c net.Conn
	err := h.Host.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: timeout}).Dial(network, at)
		return err
	})
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(timeout))
	if _, err := c.Write([]byte("?\n")); err != nil {
		return "", err
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	line, _, _ := strings.Cut(string(buf[:n]), "\n")
	return line, err
}

// path is one way that traffic takes.
type path struct {
	from        *labtest.Host
	network, at string
	want        string // what the far end says; empty: anything
}

func at(addr string) string { return net.JoinHostPort(addr, fmt.Sprint(port)) }

// podPaths are those of pods: pod to pod, host to pod, pod to host, services.
func (c *cluster) podPaths() []path {
	var out []path
	last := c.nodes[len(c.nodes)-1]
	for _, a := range c.nodes {
		for _, b := range c.nodes {
			if a == b {
				continue
			}
			for f := range 2 {
				for _, network := range []string{"tcp", "udp"} {
					out = append(out,
						path{a.pod, network, at(b.podAddr(f)), b.pod.Name + " " + a.podAddr(f)},
						path{a.Host, network, at(b.podAddr(f)), b.pod.Name + " " + a.addr(f)},
						path{a.pod, network, at(b.addr(f)), b.Name + " " + a.podAddr(f)})
				}
			}
			if b == last {
				out = append(out,
					path{a.pod, "udp", service + ":53", b.pod.Name + " " + a.podAddr(0)},
					path{a.pod, "tcp", service + ":53", b.pod.Name + " " + a.podAddr(0)},
					path{a.Host, "tcp", service + ":53", b.pod.Name + " " + a.addr(0)})
			}
		}
	}
	return out
}

// hostPaths are those between nodes.
func (c *cluster) hostPaths() []path {
	var out []path
	for _, a := range c.nodes {
		for _, b := range c.nodes {
			if a == b {
				continue
			}
			for f := range 2 {
				for _, network := range []string{"tcp", "udp"} {
					out = append(out, path{a.Host, network, at(b.addr(f)), b.Name + " " + a.addr(f)})
				}
			}
			out = append(out, path{a.Host, "tcp", net.JoinHostPort(b.addr(0), "30080"), ""})
		}
	}
	return out
}

// reach waits until all paths exist.
func (c *cluster) reach(paths []path) {
	c.t.Helper()
	for _, p := range paths {
		labtest.Eventually(c.t, 10*time.Second, fmt.Sprintf("%s reaches %s over %s", p.from.Name, p.at, p.network), func() error {
			got, err := ask(p.from, p.network, p.at, time.Second)
			if err == nil && p.want != "" && got != p.want {
				err = fmt.Errorf("answered %q, want %q", got, p.want)
			}
			return err
		})
	}
}

// try uses all paths once, whether they exist or not, and returns how many do.
func (c *cluster) try(paths []path) (ok int) {
	var n atomic.Int64
	done := make(chan struct{})
	for _, p := range paths {
		go func() {
			if _, err := ask(p.from, p.network, p.at, 700*time.Millisecond); err == nil {
				n.Add(1)
			}
			done <- struct{}{}
		}()
	}
	for range paths {
		<-done
	}
	return int(n.Load())
}
