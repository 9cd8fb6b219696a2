package splice

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a TCP connection over loopback, both ends of it.
func pair(t *testing.T) (a, b *tcpconn.Conn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	far, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	return tcpconn.New(near), tcpconn.New(far)
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// What goes in comes out, whatever its size, and the end is passed on; pipes are taken
// for bulk only and given back.
func TestCopy(t *testing.T) {
	for name, size := range map[string]int{"nothing": 0, "a message": 100, "bulk": 20 << 20} {
		t.Run(name, func(t *testing.T) {
			var pool Pool
			client, in := pair(t)
			out, server := pair(t)
			sent := make([]byte, size)
			_, _ = rand.Read(sent)
			var moved atomic.Int64
			done := make(chan error, 1)
			go func() { done <- pool.Copy(out, in, func(n int) { moved.Add(int64(n)) }) }()
			go func() {
				_, _ = client.Write(sent)
				_ = client.CloseWrite()
			}()
			got, err := io.ReadAll(server)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if moved.Load() != int64(size) {
				t.Errorf("told of %d bytes, want %d", moved.Load(), size)
			}
			if pipes := pool.count; (pipes > 0) != (size > bulkSize) {
				t.Errorf("%d pipes for %d bytes", pipes, size)
			}
			pool.Close()
			if pool.count != 0 {
				t.Errorf("%d pipes are left", pool.count)
			}
		})
	}
}

// An idle connection holds no descriptor beside its two sockets, also after bulk.
func TestIdleHoldsNoPipe(t *testing.T) {
	var pool Pool
	client, in := pair(t)
	out, server := pair(t)
	done := make(chan error, 1)
	before := descriptors(t)
	go func() { done <- pool.Copy(out, in, func(int) {}) }()
	const size = 8 << 20
	go func() { _, _ = client.Write(make([]byte, size)) }()
	if _, err := io.CopyN(io.Discard, server, size); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); descriptors(t) > before; {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors, %d before", descriptors(t), before)
		}
		time.Sleep(10 * time.Millisecond)
		pool.Trim()
	}
	_ = client.CloseWrite()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A copy ends with an error when either side is reset or closed from elsewhere.
func TestCopyEndsWithEitherSide(t *testing.T) {
	for name, end := range map[string]func(client, in, out, server *tcpconn.Conn){
		"source reset":       func(client, _, _, _ *tcpconn.Conn) { _ = client.SetLinger(0); _ = client.Close() },
		"closed here":        func(_, in, _, _ *tcpconn.Conn) { _ = in.Close() },
		"destination closed": func(client, _, out, _ *tcpconn.Conn) { _ = out.Close(); _, _ = client.Write([]byte("x")) },
		"destination reset": func(client, _, _, server *tcpconn.Conn) {
			_ = server.SetLinger(0)
			_ = server.Close()
			time.Sleep(20 * time.Millisecond)
			_, _ = client.Write([]byte("x"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			var pool Pool
			defer pool.Close()
			client, in := pair(t)
			out, server := pair(t)
			done := make(chan error, 1)
			go func() { done <- pool.Copy(out, in, func(int) {}) }()
			time.Sleep(20 * time.Millisecond)
			end(client, in, out, server)
			select {
			case err := <-done:
				if err == nil {
					t.Error("ended as if the source had")
				}
			case <-time.After(5 * time.Second):
				t.Error("still copying")
			}
		})
	}
}

// A reset while both directions carry something is no end for either, whichever of them the kernel
// tells of it.
func TestResetIsNoEnd(t *testing.T) {
	for name, size := range map[string]int{"messages": 4, "bulk": 1 << 20} {
		t.Run(name, func(t *testing.T) {
			var pool Pool
			defer pool.Close()
			for range 200 {
				resetInTheMiddle(t, &pool, make([]byte, size))
			}
		})
	}
}

// resetInTheMiddle sends to a server that reads, answers by half, and resets.
func resetInTheMiddle(t *testing.T, pool *Pool, request []byte) {
	t.Helper()
	client, in := pair(t)
	out, server := pair(t)
	var wg sync.WaitGroup
	copying := func(dst, src *tcpconn.Conn) {
		if err := pool.Copy(dst, src, func(int) {}); err != nil {
			tcpconn.Reset(in)
			tcpconn.Reset(out)
		}
	}
	wg.Go(func() { copying(out, in) })
	wg.Go(func() { copying(in, out) })
	wg.Go(func() {
		for {
			if _, err := client.Write(request); err != nil {
				return
			}
		}
	})
	wg.Go(func() { _, _ = io.CopyN(io.Discard, server, int64(2*len(request))); tcpconn.Reset(server) })
	_, _ = server.Write([]byte("half"))
	_, err := io.ReadAll(struct{ io.Reader }{client})
	if err == nil { // the client's own write may have been told of the reset
		err = client.Ended()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("a reset is taken for an end (%v)", err)
	}
	_ = client.Close()
	wg.Wait()
}
