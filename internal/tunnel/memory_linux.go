package tunnel

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
)

// settleMemory gives back what starting up took: heap, and the pages of code that only ran
// then. There are many hubs on a node. Pages of code are clean: what is needed again comes
// back from the page cache. Read-only data is left alone, since a linker may relocate it.
func settleMemory() {
	debug.FreeOSMemory()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		var from, to uintptr
		if len(fields) < 6 || fields[1] != "r-xp" || fields[5] != self {
			continue
		}
		if n, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); n == 2 && err == nil {
			_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, from, to-from, syscall.MADV_DONTNEED)
		}
	}
}
