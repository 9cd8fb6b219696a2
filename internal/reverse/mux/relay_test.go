package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func unixPair(t testing.TB) (Conn, net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a.(*net.UnixConn), b
}

// Relay joins every pair of kinds of connection.
func TestRelayKinds(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	kinds := map[string]func() (Conn, net.Conn){
		"tcp":    func() (Conn, net.Conn) { a, b := tcpPair(t); return a, b },
		"tls":    func() (Conn, net.Conn) { a, b := tlsPair(t, true); return a, b },
		"unix":   func() (Conn, net.Conn) { return unixPair(t) },
		"stream": func() (Conn, net.Conn) { _, a, b := opened(t, Config{}); return a, b },
	}
	for left, l := range kinds {
		for right, r := range kinds {
			t.Run(left+"-"+right, func(t *testing.T) {
				a, client := l()
				b, server := r()
				done := make(chan error, 1)
				go func() {
					there, back, err := Relay(a, b)
					if there != int64(len(data)) || back != int64(len(data)) {
						err = errors.Join(err, fmt.Errorf("counted %d and %d of %d bytes", there, back, len(data)))
					}
					done <- err
				}()
				go func() { // the server sends back what it got, after its end
					got, _ := io.ReadAll(server)
					_, _ = server.Write(got)
					_ = server.(Conn).CloseWrite()
				}()
				go func() { _, _ = client.Write(data); _ = client.(Conn).CloseWrite() }()
				got, err := io.ReadAll(client)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
				_, _ = client.Close(), server.Close()
			})
		}
	}
}

// A target that sends its answer and then resets, while its client still talks: every
// byte that reached us before the reset arrives.
func TestAnswerBeforeAResetArrives(t *testing.T) {
	answer := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	for range 20 {
		relays := make(chan error, 2)
		target := make(chan *net.TCPConn, 1)
		s, _ := pair(t, Config{}, func(st *Stream) {
			a, b := tcpPair(t)
			target <- b
			_ = st.Accept(nil)
			_, _, err := Relay(a, st)
			relays <- err
		})
		st, err := s.Open(nil)
		if err != nil {
			t.Fatal(err)
		}
		a, client := unixPair(t)
		go func() { _, _, err := Relay(a, st); relays <- err }()
		server := <-target
		go func() { // the client never stops talking
			for {
				if _, err := client.Write([]byte("more")); err != nil {
					return
				}
				time.Sleep(100 * time.Microsecond)
			}
		}()
		_, _ = server.Write(answer)
		raw, err := server.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() (sent bool) { // and acknowledged
			_ = raw.Control(func(fd uintptr) {
				n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
				sent = err == nil && n == 0
			})
			return sent
		})
		_ = server.SetLinger(0)
		_ = server.Close()
		got := make([]byte, len(answer))
		if n, err := io.ReadFull(client, got); err != nil || !bytes.Equal(got, answer) {
			t.Fatalf("%d of %d bytes, %v", n, len(answer), err)
		}
		_ = client.Close()
		if first, second := <-relays, <-relays; first == nil && second == nil {
			t.Error("a reset is taken for an end")
		}
	}
}
