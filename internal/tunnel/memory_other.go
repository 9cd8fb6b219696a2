//go:build !linux

package tunnel

import "runtime/debug"

func settleMemory() { debug.FreeOSMemory() }
