package front

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// maxFile bounds a table's file, in bytes: some 50,000 routes.
const maxFile = 16 << 20

// ParseTable reads a table from YAML or JSON. Fields that it does not know, or that come
// twice, are errors, as is what Front.Set refuses; errors name the field.
func ParseTable(data []byte) (Table, error) {
	if len(data) > maxFile {
		return Table{}, fmt.Errorf("%d bytes are more than %d: split the table among several fronts", len(data), maxFile)
	}
	text, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return Table{}, oneLine(err)
	}
	var t Table
	strict, err := json.UnmarshalStrict(text, &t)
	if err := cmp.Or(err, errors.Join(strict...)); err != nil {
		return Table{}, oneLine(err)
	}
	return t.normal()
}

// oneLine is the error in one line.
func oneLine(err error) error {
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}

// file is a table's file that is followed.
type file struct {
	path string
	sum  [sha256.Size]byte // of what was read last, good or bad
}

// Read implements Source.
func (f *file) Read() (t Table, changed bool, err error) {
	data, err := os.ReadFile(f.path)
	if err != nil {
		f.sum = [sha256.Size]byte{} // when it is back it counts as changed
		return Table{}, true, err
	}
	sum := sha256.Sum256(data)
	if sum == f.sum {
		return Table{}, false, nil
	}
	f.sum = sum
	if t, err = ParseTable(data); err != nil {
		return Table{}, true, fmt.Errorf("%s: %w", f.path, err)
	}
	return t, true, nil
}

// How the file is followed.
const (
	settle   = 50 * time.Millisecond // an editor writes in several steps
	pollFile = 2 * time.Second       // what notifications miss: network file systems
)

// Watch implements Source. It watches the directory, since editors replace files and Kubernetes replaces a link beside them. On a
// host that grants no more inotify instances (fs.inotify.max_user_instances) it looks now
// and then.
func (f *file) Watch(ctx context.Context, look func()) error {
	events, lost, stop := f.notifications()
	defer stop()
	tick := time.NewTicker(pollFile)
	defer tick.Stop()
	for {
		look() // the first time: what changed before the watch began
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		case <-events:
			if !quiet(ctx, events) {
				return ctx.Err()
			}
		case _, ok := <-lost: // the file itself is what counts
			if !ok {
				return fmt.Errorf("watch %s: %w", f.path, fsnotify.ErrClosed)
			}
		}
	}
}

// notifications are those of the file's directory; nil channels when there are none to be
// had.
func (f *file) notifications() (events <-chan fsnotify.Event, lost <-chan error, stop func()) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, nil, func() {}
	}
	stop = func() { _ = w.Close() }
	if err := w.Add(filepath.Dir(f.path)); err != nil {
		stop()
		return nil, nil, func() {}
	}
	return w.Events, w.Errors, stop
}

// quiet waits until nothing happens for a moment; false means that ctx ended.
func quiet(ctx context.Context, events <-chan fsnotify.Event) bool {
	timer := time.NewTimer(settle)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-events:
			timer.Reset(settle)
		}
	}
}
