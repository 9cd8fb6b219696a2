package mux

import (
	"errors"
	"io"
	"net"
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
