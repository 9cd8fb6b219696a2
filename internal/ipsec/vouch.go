package ipsec

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// vouchName is the file of a supervised daemon's directory whose time of modification is
// until when the daemon may hold SAs. Without the file it always may.
const vouchName = "vouched-until"

// Vouch lets the daemon that Supervise runs in dir go on with its SAs until a time: to be
// repeated. When it is over, whoever configured the daemon has stopped without a word and
// somebody else has taken its place, so the daemon starts anew, without connections. The
// zero time ends this: the daemon needs nobody's word.
func Vouch(dir string, until time.Time) error {
	path := filepath.Join(dir, vouchName)
	if until.IsZero() {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("IKE daemon: %w", err)
		}
		return nil
	}
	err := os.Chtimes(path, time.Time{}, until)
	if errors.Is(err, fs.ErrNotExist) {
		var f *os.File
		if f, err = os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			err = errors.Join(f.Close(), os.Chtimes(path, time.Time{}, until))
		}
	}
	if err != nil {
		return fmt.Errorf("IKE daemon: %w", err)
	}
	return nil
}

// lapsed reports whether nobody vouches for the daemon any more, and forgets that: the next
// daemon has no SAs to vouch for. A clock that was set forward starts the daemon anew, too.
func (o *Options) lapsed(now time.Time) bool {
	st, err := os.Stat(o.path(vouchName))
	if err != nil || now.Before(st.ModTime()) {
		return false
	}
	_ = os.Remove(o.path(vouchName))
	return true
}
