package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// files are a State's, by name. What is changed in place must be replaced instead.
type files map[string][]byte

// backing is where a State's files are.
type backing interface {
	// change runs f over the files while nobody else changes them, and keeps what f changed,
	// unless it returned an error. f may be run several times.
	change(f func(files) error) error
	// where names a file in messages.
	where(name string) string
}

// directory is a backing for the hubs of one host.
type directory string

func (d directory) where(name string) string { return filepath.Join(string(d), name) }

func (d directory) change(f func(files) error) error {
	l, err := os.OpenFile(d.where("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer l.Close()
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("state directory %s: lock: %w", string(d), err)
	}
	have, err := d.read()
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	was := maps.Clone(have)
	if err := f(have); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if bytes.Equal(was[name], have[name]) {
			continue
		}
		if err := writeFile(d.where(name), have[name]); err != nil {
			return fmt.Errorf("state file %s: %w", d.where(name), err)
		}
	}
	return nil
}

func (d directory) read() (files, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	out := files{}
	for _, e := range entries {
		if e.Name() == "lock" || e.Name()[0] == '.' || !e.Type().IsRegular() {
			continue
		}
		b, err := os.ReadFile(d.where(e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[e.Name()] = b
	}
	return out, nil
}

// Secret is a Secret of an API server that a State is kept in.
type Secret interface {
	// Read returns the data and a version for Write; nil data: there is no Secret.
	Read(ctx context.Context) (data map[string][]byte, version string, err error)
	// Write replaces the data; version is that of Read, empty: the Secret is made. The error
	// is ErrConflict when somebody else was faster.
	Write(ctx context.Context, data map[string][]byte, version string) error
	// String names the Secret in messages: "Secret namespace/name".
	String() string
}

// ErrConflict means that somebody else has written a Secret in the meantime.
var ErrConflict = errors.New("somebody else has written it meanwhile")

// secretBacking is for hubs that share no host: whoever writes first wins, the others look
// again.
type secretBacking struct {
	secret Secret
	// known is the SHA-256 of an authority that the Secret must hold: without it the Secret
	// was lost, and another authority would lock everybody out. Empty: there was none yet.
	known func() string
	// last are the newest files that were seen here.
	last files
}

// secretTimeout is for one change, attempts included.
const secretTimeout = 30 * time.Second

func (b *secretBacking) where(name string) string { return b.secret.String() + ", " + name }

func (b *secretBacking) change(f func(files) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), secretTimeout)
	defer cancel()
	for {
		data, version, err := b.secret.Read(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", b.secret, err)
		}
		have := files(data)
		if have == nil {
			// Lost while this hub runs: put back what it knows.
			have = maps.Clone(b.last)
		}
		if have == nil {
			have = files{}
		}
		if known := b.known(); known != "" && !holdsAuthority(have, known) {
			return fmt.Errorf("%s: the authority that everybody trusts (SHA-256 %.16s…) is not in it: restore the Secret from a backup; to begin anew, with every spoke invited again, delete and make the RemoteCluster", b.secret, known)
		}
		was := maps.Clone(have)
		if err := f(have); err != nil {
			return err
		}
		if data != nil && maps.EqualFunc(was, have, bytes.Equal) {
			b.last = have
			return nil
		}
		err = b.secret.Write(ctx, have, version)
		if err == nil {
			b.last = have
			return nil
		}
		if !errors.Is(err, ErrConflict) || ctx.Err() != nil {
			return fmt.Errorf("%s: %w", b.secret, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
