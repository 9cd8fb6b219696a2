package mux

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// receive reads what has come and has not been handed out yet, and leaves the last byte of it in
// the kernel. It returns EAGAIN when there is nothing, and 0 when the other end sends no more.
//
// How much there is only has to be right when it is nothing: the first versions of Linux 6.17
// count a packet that has been read in part as if it were whole. Then nothing is held, and
// nothing else is wrong.
func (h *Held) receive(fd int, b []byte) (int, error) {
	for {
		there, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
		if err != nil {
			return 0, err
		}
		fresh := there - h.held
		if fresh <= 0 {
			if over, err := sendsNoMore(fd); !over || err != nil {
				return 0, err
			}
			if now, err := unix.IoctlGetInt(fd, unix.SIOCINQ); err == nil && now > there {
				continue
			}
			// It may have been closed with something of ours unread.
			if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
				return 0, syscall.Errno(code)
			}
			return 0, nil
		}
		if h.held > 0 {
			if n, err := readAtOnce(fd, h.skip[:]); n < 1 || err != nil {
				return 0, err
			}
			h.held = 0
		}
		n, err := h.take(fd, b, fresh)
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// take reads fresh bytes, at most as many as fit into b: all of them but the last, which it only
// looks at.
func (h *Held) take(fd int, b []byte, fresh int) (n int, err error) {
	most := min(len(b), fresh-1)
	if most > 0 {
		if n, err = readAtOnce(fd, b[:most]); n < most || err != nil {
			return max(n, 0), err
		}
	}
	if n == len(b) {
		return n, nil
	}
	k, err := uninterrupted(func() (int, error) {
		k, _, err := syscall.Recvfrom(fd, b[n:n+1], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return k, err
	})
	if k == 1 && err == nil {
		h.held = 1
		n++
	}
	return n, nil
}

// sendsNoMore reports whether the other end has ended its direction, or all; EAGAIN: it has
// not.
func sendsNoMore(fd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := uninterrupted(func() (int, error) { return unix.Poll(p, 0) })
	switch {
	case err != nil:
		return false, err
	case n == 0:
		return false, syscall.EAGAIN
	}
	return true, nil
}
