package mux

import "syscall"

// uninterrupted calls f until no signal interrupts it.
func uninterrupted(f func() (int, error)) (n int, err error) {
	for {
		if n, err = f(); err != syscall.EINTR { //nolint:errorlint // a system call's
			return n, err
		}
	}
}
