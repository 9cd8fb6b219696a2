//go:build !linux

package mux

import "io"

// direct says that everything is written by who waits in WriteTo.
func direct(io.Writer) func([]*chunk) (int, error) { return nil }
