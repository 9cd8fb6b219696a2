//go:build !linux

package mux

import "syscall"

// receive reads, and holds nothing: what a closed socket's other end reads is known of Linux
// only.
func (h *Held) receive(fd int, b []byte) (int, error) { return syscall.Read(fd, b) }
