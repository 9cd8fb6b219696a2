package mux

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bulkFrom is after how many bytes a target has much to say.
	bulkFrom = 1 << 20
	// shortPath is up to which round trip a path counts as short: what may be ahead is enough for
	// 10 Gbit/s then.
	shortPath = 250 * time.Microsecond
	// ahead is how much may come ahead of what is read; the kernel takes twice as much memory.
	ahead = 256 << 10
)

// keepClose bounds what a target on a short path sends ahead of what is read. The kernel would let it
// have many MiB under way there, which only wait, and have left the processor's caches when it is their
// turn.
func keepClose(fd int) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err == nil && time.Duration(info.Min_rtt)*time.Microsecond <= shortPath {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, ahead) // or it stays as it is
	}
}
