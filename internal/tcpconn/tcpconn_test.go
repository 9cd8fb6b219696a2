package tcpconn_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

// pair is a TCP connection over loopback, both ends of it.
func pair(t *testing.T, address string) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(address)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	if far, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	return near, far
}

// writeUntil writes until the connection says that it is over.
func writeUntil(t *testing.T, c *tcpconn.Conn, want error) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := c.Write([]byte("x")); errors.Is(err, want) {
			return
		} else if err != nil || time.Now().After(deadline) {
			t.Fatalf("a write ends with %v, want %v", err, want)
		}
	}
}

// How a connection has ended of which a read finds the end, after a write was told why.
func TestEnded(t *testing.T) {
	type end struct {
		name  string
		far   func(far *net.TCPConn)
		write error // what a write finds; nil: nothing is written
		want  error
	}
	ends := []end{
		{"a reset", func(far *net.TCPConn) { tcpconn.Reset(far) }, syscall.ECONNRESET, syscall.ECONNRESET},
		{"an end", func(far *net.TCPConn) { _ = far.CloseWrite() }, nil, nil},
		{"an end, and then a reset", func(far *net.TCPConn) { _ = far.Close() }, syscall.EPIPE, nil},
	}
	for _, address := range []string{"127.0.0.1", "::1"} {
		for _, size := range []int{0, 1, 100_000} {
			for _, before := range slices.Compact([]int{0, size / 2, size}) { // read before there is a Conn
				for _, e := range ends {
					t.Run(fmt.Sprintf("%s/%s after %d bytes, %d read before", address, e.name, size, before), func(t *testing.T) {
						near, far := pair(t, address)
						go func() { _, _ = far.Write(make([]byte, size)) }()
						c := tcpconn.New(near)
						if before > 0 {
							if _, err := io.ReadFull(near, make([]byte, before)); err != nil {
								t.Fatal(err)
							}
							c = tcpconn.Resume(near)
						}
						if _, err := io.ReadFull(c, make([]byte, size-before)); err != nil {
							t.Fatal(err)
						}
						e.far(far)
						if e.write != nil {
							writeUntil(t, c, e.write)
						}
						if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
							t.Fatalf("a read: %d, %v", n, err)
						}
						if err := c.Ended(); !errors.Is(err, e.want) || (err == nil) != (e.want == nil) {
							t.Errorf("it has ended with %v, want %v", err, e.want)
						}
					})
				}
			}
		}
	}
}

// What was there when nobody counted is not mistaken for a reset.
func TestResumeAtTheEnd(t *testing.T) {
	near, far := pair(t, "127.0.0.1")
	if _, err := far.Write([]byte("all")); err != nil {
		t.Fatal(err)
	}
	_ = far.CloseWrite()
	if _, err := io.ReadFull(near, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	c := tcpconn.Resume(near)
	if b, err := io.ReadAll(struct{ io.Reader }{c}); string(b) != "l" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	if err := c.Ended(); err != nil {
		t.Errorf("an end that was there is taken for %v", err)
	}
}

// Of a connection of several paths the kernel counts what came over the first one, and its end is said by
// other means (RFC 8684, section 3.3.3). It is not mistaken for a reset.
func TestEndOfMultipath(t *testing.T) {
	var listen net.ListenConfig
	listen.SetMultipathTCP(true)
	l, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var dial net.Dialer
	dial.SetMultipathTCP(true)
	far, err := dial.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	multipath, err := near.(*net.TCPConn).MultipathTCP()
	t.Logf("multipath: %v, %v", multipath, err)
	c := tcpconn.New(near.(*net.TCPConn))
	if _, err := far.Write([]byte("all")); err != nil {
		t.Fatal(err)
	}
	_ = far.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(struct{ io.Reader }{c}); string(b) != "all" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	if err := c.Ended(); err != nil {
		t.Errorf("an end is taken for %v", err)
	}
}

// Both ends have ended: the kernel has forgotten the connection.
func TestBothEnded(t *testing.T) {
	near, far := pair(t, "127.0.0.1")
	c := tcpconn.New(near)
	_ = c.CloseWrite()
	_ = far.CloseWrite()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	if err := c.Ended(); err != nil {
		t.Errorf("an end of both is taken for %v", err)
	}
	_ = c.Close()
	if err := c.Ended(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed here: %v", err)
	}
}
