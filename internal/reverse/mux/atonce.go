package mux

import (
	"errors"
	"syscall"
)

// uninterrupted calls f until no signal interrupts it.
func uninterrupted(f func() (int, error)) (n int, err error) {
	for {
		if n, err = f(); !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}
