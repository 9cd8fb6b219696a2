//go:build !linux

package mux

import "syscall"

// readAtOnce reads from a descriptor that does not wait.
func readAtOnce(fd int, b []byte) (int, error) {
	return uninterrupted(func() (int, error) { return syscall.Read(fd, b) })
}

// writeAtOnce writes to one.
func writeAtOnce(fd int, b []byte) (int, error) {
	return uninterrupted(func() (int, error) { return syscall.Write(fd, b) })
}
