package mux

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
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

// A client that is killed while it sends, between two records, has not said all that it had to say.
func TestTLSClientIsKilled(t *testing.T) {
	for name, x := range map[string]struct {
		end  func(client *tls.Conn)
		want error
	}{
		"an end":               {func(client *tls.Conn) { _ = client.Close() }, nil},
		"the end of a half":    {func(client *tls.Conn) { _ = client.CloseWrite() }, nil},
		"without close_notify": {func(client *tls.Conn) { _ = client.NetConn().Close() }, syscall.ECONNRESET},
	} {
		t.Run(name, func(t *testing.T) {
			targets := make(chan *net.TCPConn, 1)
			s, _ := pair(t, Config{}, func(st *Stream) {
				a, b := tcpPair(t)
				targets <- b
				_ = st.Accept(nil)
				_, _, _ = Relay(a, st)
			})
			defer s.Close()
			client, server := tlsPair(t, true)
			st, err := s.Open(nil)
			if err != nil {
				t.Fatal(err)
			}
			go func() { _, _, _ = Relay(server, st) }()
			target := <-targets
			if _, err := client.Write([]byte("half")); err != nil {
				t.Fatal(err)
			}
			x.end(client)
			got, err := io.ReadAll(target)
			if string(got) != "half" || !errors.Is(err, x.want) || (err == nil) != (x.want == nil) {
				t.Errorf("the target sees %q and %v, want %v", got, err, x.want)
			}
			_, _ = target.Close(), client.Close()
		})
	}
}
