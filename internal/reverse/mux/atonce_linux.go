package mux

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on what never waits, without the scheduler's knowledge: with much to move they take longer than the
// 20 µs after which Go hands the processor to another thread, which then looks for work in
// vain, at the cost of those who have some.

// readAtOnce reads from a descriptor that does not wait.
func readAtOnce(fd int, b []byte) (int, error) {
	return atOnce(unix.SYS_READ, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b)) //nolint:gosec // as package syscall does
}

// writeAtOnce writes to one.
func writeAtOnce(fd int, b []byte) (int, error) {
	return atOnce(unix.SYS_WRITE, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b)) //nolint:gosec // the same
}

// writevAtOnce writes chunks to one, the first writevChunks of them.
func writevAtOnce(fd int, list []*chunk) (int, error) {
	var all [writevChunks]unix.Iovec
	n := 0
	for _, c := range list[:min(len(list), len(all))] {
		b := c.bytes()
		all[n].Base = unsafe.SliceData(b) //nolint:gosec // the same
		all[n].SetLen(len(b))
		n++
	}
	return atOnce(unix.SYS_WRITEV, fd, unsafe.Pointer(&all), n) //nolint:gosec // the same
}

func atOnce(call uintptr, fd int, p unsafe.Pointer, n int) (int, error) {
	for {
		r, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(p), uintptr(n))
		switch errno {
		case 0:
			return int(r), nil
		case syscall.EINTR:
			continue
		}
		return 0, errno
	}
}
