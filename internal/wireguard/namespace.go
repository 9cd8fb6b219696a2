package wireguard

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// namespace is a network namespace in which work is done, whichever thread asks.
type namespace struct {
	mu   sync.Mutex // of entering and closing
	file *os.File   // nil: the process's own namespace, nothing to enter
}

const threadNamespace = "/proc/thread-self/ns/net"

// home is the namespace that the process started in. The first thread's is no measure
// later: it may be lent to a namespace too.
var home, errHome = os.Stat(threadNamespace)

// currentNamespace is the calling thread's. Entering another one needs CAP_SYS_ADMIN, so
// nothing is entered when the thread is where the process is.
func currentNamespace() (*namespace, error) {
	if errHome != nil {
		return nil, fmt.Errorf("network namespace: %w", errHome)
	}
	f, err := os.Open(threadNamespace)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	t, err := f.Stat()
	if err == nil && os.SameFile(home, t) {
		return &namespace{}, f.Close()
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	return &namespace{file: f}, nil
}

// do runs f inside the namespace.
func (n *namespace) do(f func() error) error {
	if n.file == nil {
		return f()
	}
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := n.enter(); err != nil {
			result <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}

func (n *namespace) enter() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET)
}

func (n *namespace) close() error {
	if n.file == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.file.Close()
}
