package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// ListenUnix listens on a Unix socket with the given permissions (0600, 0660; the group
// is the process's, or the directory's when that is set-group-ID). The socket is bound
// under another name and then renamed: whoever finds it at path can connect, and never
// with wider permissions. One that a dead process left is replaced; that of a living one
// is an error, as is anything else at path. Closing the listener removes the socket,
// unless another has taken its place meanwhile.
func ListenUnix(ctx context.Context, path string, mode fs.FileMode) (net.Listener, error) {
	l, err := listenUnix(ctx, path, mode)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

func listenUnix(ctx context.Context, path string, mode fs.FileMode) (net.Listener, error) {
	if err := free(ctx, path); err != nil {
		return nil, err
	}
	// In a directory that only this process can enter, so that nobody connects before the
	// permissions are set.
	dir, err := os.MkdirTemp(filepath.Dir(path), ".s")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	hidden := filepath.Join(dir, "s")
	if limit := len(syscall.RawSockaddrUnix{}.Path) - 1; len(path) > limit || len(hidden) > limit {
		return nil, fmt.Errorf("the path is too long: Unix sockets allow %d bytes, and %d more than the directory's are needed", limit, len(hidden)-len(filepath.Dir(path)))
	}
	var c net.ListenConfig
	l, err := c.Listen(ctx, "unix", hidden)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("not a Unix socket: %T", l), l.Close())
	}
	u.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(hidden, mode), os.Rename(hidden, path)); err != nil {
		return nil, errors.Join(err, u.Close())
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, u.Close())
	}
	return &unixListener{UnixListener: u, path: path, info: info}, nil
}

// free returns nil when path may be bound: nothing is there, or a dead process's socket.
func free(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("something that is no socket is there: remove it or choose another path")
	}
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return errors.Join(errors.New("another process listens there: stop it or choose another path"), conn.Close())
	case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("another process may listen there: %w", err)
}

// unixListener removes its socket when it is closed.
type unixListener struct {
	*net.UnixListener
	path string
	info fs.FileInfo
}

// Addr is the path, not the name that the socket was bound under.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close removes the socket and stops listening.
func (l *unixListener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.info) {
		// First, so that nobody finds a socket that refuses.
		if err := os.Remove(l.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(err, l.UnixListener.Close())
		}
	}
	return l.UnixListener.Close()
}
