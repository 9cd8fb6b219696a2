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
	said string            // what was wrong with it last
}

// read returns the table when the file is not as it was read last.
func (f *file) read() (t Table, changed bool, err error) {
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
	pollFile = 5 * time.Second       // what notifications miss: network file systems
)

// watch calls look whenever the file may have changed, until ctx ends. It watches the
// directory, since editors replace files and Kubernetes replaces a link beside them.
func (f *file) watch(ctx context.Context, look func()) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.path, err)
	}
	defer func() { _ = w.Close() }()
	if err := w.Add(filepath.Dir(f.path)); err != nil {
		return fmt.Errorf("watch %s: %w", f.path, err)
	}
	tick := time.NewTicker(pollFile)
	defer tick.Stop()
	look() // what changed before the watch began
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		case <-w.Events:
			if !quiet(ctx, w.Events) {
				return ctx.Err()
			}
		case _, ok := <-w.Errors: // events were lost; the file itself is what counts
			if !ok {
				return fmt.Errorf("watch %s: %w", f.path, fsnotify.ErrClosed)
			}
		}
		look()
	}
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
