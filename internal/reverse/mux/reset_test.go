package mux

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// A target that resets while it is written to: whichever direction the kernel tells of it, nobody
// takes it for an end.
func TestResetWhileWriting(t *testing.T) {
	for range 20 {
		targets := make(chan *net.TCPConn, 1)
		relayed := make(chan error, 1)
		s, _ := pair(t, Config{}, func(st *Stream) {
			a, b := tcpPair(t)
			targets <- b
			_ = st.Accept(nil)
			_, _, err := Relay(a, st)
			relayed <- err
		})
		st, err := s.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				if _, err := st.Write([]byte("more")); err != nil {
					return
				}
			}
		}()
		far := <-targets
		_, _ = far.Write([]byte("half"))
		if _, err := io.ReadFull(st, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		_ = far.SetLinger(0)
		_ = far.Close()
		var reset *ResetError
		if _, err := st.Read(make([]byte, 1)); !errors.As(err, &reset) {
			t.Fatalf("a reset is taken for %v", err)
		}
		if err := <-relayed; Cause(err) == nil {
			t.Fatal("a reset is taken for an end")
		}
		_ = st.Close()
		s.Close()
	}
}

// How a connection has ended of which a read finds the end, after a write was told why.
func TestWhatAReadFindsBehindAWrite(t *testing.T) {
	await := func(t *testing.T, c *target, want error) {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			if _, err := c.Write([]byte("x")); errors.Is(err, want) {
				return
			} else if err != nil || time.Now().After(deadline) {
				t.Fatalf("a write ends with %v, want %v", err, want)
			}
		}
	}
	for name, x := range map[string]struct {
		end   func(far *net.TCPConn)
		write error // what a write finds; nil: nothing is written
		want  error
	}{
		"a reset":                  {func(far *net.TCPConn) { _ = far.SetLinger(0); _ = far.Close() }, syscall.ECONNRESET, syscall.ECONNRESET},
		"an end":                   {func(far *net.TCPConn) { _ = far.CloseWrite() }, nil, nil},
		"an end, and then a reset": {func(far *net.TCPConn) { _ = far.Close() }, syscall.EPIPE, nil},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := tcpPair(t)
			c := watch(near).(*target)
			x.end(far)
			if x.write != nil {
				await(t, c, x.write)
			}
			if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Fatalf("a read: %d, %v", n, err)
			}
			if err := c.ended(); !errors.Is(err, x.want) || (err == nil) != (x.want == nil) {
				t.Errorf("it has ended with %v, want %v", err, x.want)
			}
		})
	}
}
