package mux

import (
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// shortPair is a connection whose path is seen as short, which a busy machine may make longer.
func shortPair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	for range 50 {
		near, far = tcpPair(t)
		raw, err := near.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		short := false
		_ = raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			short = err == nil && time.Duration(info.Min_rtt)*time.Microsecond <= shortPath
		})
		if short {
			return near, far
		}
	}
	t.Fatalf("loopback takes longer than %s", shortPath)
	return nil, nil
}

// A target on a short path is kept close once it has much to say, and not before.
func TestBulkIsKeptClose(t *testing.T) {
	text, err := os.ReadFile("/proc/sys/net/core/rmem_max")
	if err != nil {
		t.Fatal(err)
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	near, far := shortPair(t)
	c := watch(near).(*target)
	room := func() (n int) {
		t.Helper()
		var failed error
		err := c.Raw.Control(func(fd uintptr) { n, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF) })
		if err != nil || failed != nil {
			t.Fatal(err, failed)
		}
		return n
	}
	read, written := io.Pipe()
	go func() {
		_, _ = pumpRaw(written, c.Raw, c.receive)
		_ = written.Close()
	}()
	bound := 2 * min(ahead, most)
	for _, x := range []struct {
		bytes int
		close bool
	}{{bulkFrom - 1, false}, {bulkFrom, true}, {4 * bulkFrom, true}} {
		go func() { _, _ = far.Write(make([]byte, x.bytes)) }()
		if _, err := io.CopyN(io.Discard, read, int64(x.bytes)); err != nil {
			t.Fatal(err)
		}
		if got := room(); (got == bound) != x.close {
			t.Errorf("after %d bytes more the kernel has room for %d, bound %d: %v", x.bytes, got, bound, x.close)
		}
	}
	_ = far.Close()
	if _, err := io.Copy(io.Discard, read); err != nil {
		t.Error(err)
	}
}
