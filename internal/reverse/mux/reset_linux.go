package mux

import "golang.org/x/sys/unix"

// hungUp reports whether nothing goes through a socket any more, in either direction.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}} // POLLHUP need not be asked for
	n, err := uninterrupted(func() (int, error) { return unix.Poll(p, 0) })
	return err == nil && n == 1 && p[0].Revents&unix.POLLHUP != 0
}
