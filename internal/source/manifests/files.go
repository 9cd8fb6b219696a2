// Package manifests takes snapshots of objects from files.
//
// It decodes and nothing more: what the objects mean is internal/model's matter. It stands
// apart from package source so that the small program links no Kubernetes client.
package manifests

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/culvert-vpn/culvert/internal/model"
)

// Files reads the manifests (*.yaml, *.yml, *.json) of a directory, not of its
// subdirectories. A file that did not change is not decoded again.
type Files struct {
	dir   string
	cache map[string]*file
	count int // of objects, the last time
}

type file struct {
	info     os.FileInfo                // of the version that was decoded
	parts    map[[sha256.Size]byte]part // its documents without problems, by their text
	decoded  []model.Decoded
	problems []model.Problem
	stale    []model.Ref // of decoded: those that are from an earlier version of the file
}

// NewFiles reads from dir.
func NewFiles(dir string) *Files { return &Files{dir: dir, cache: map[string]*file{}} }

// Read takes a snapshot. A document that cannot be decoded is named in the problems, and
// where an earlier version of its file could be, the objects of that version that the
// new one does not hold stay in the snapshot. The error is about the directory itself.
func (f *Files) Read() (model.Objects, []model.Problem, error) {
	paths, err := f.list()
	if err != nil {
		return model.Objects{}, nil, err
	}
	var objects model.Objects
	var problems []model.Problem
	loaded := make([]*file, len(paths))
	failed := make([]error, len(paths))
	inParallel(len(paths), func(i int) { loaded[i], failed[i] = f.load(paths[i]) })
	objects.Grow(f.count)
	for i, path := range paths {
		entry, err := loaded[i], failed[i]
		if errors.Is(err, fs.ErrNotExist) { // gone since the listing
			delete(f.cache, path)
			continue
		}
		if err != nil {
			problems = append(problems, model.Problem{Origin: f.origin(path), Reason: "Unreadable", Message: err.Error()})
			entry = f.cache[path]
			if entry == nil {
				continue
			}
		}
		f.cache[path] = entry
		for _, d := range entry.decoded {
			objects.Add(d)
		}
		problems = append(problems, entry.problems...)
	}
	for path := range f.cache {
		if _, found := slices.BinarySearch(paths, path); !found {
			delete(f.cache, path)
		}
	}
	f.count = objects.Count()
	return objects, problems, nil
}

func (f *Files) list() ([]string, error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, fmt.Errorf("manifests: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if IsManifest(e.Name()) {
			paths = append(paths, filepath.Join(f.dir, e.Name()))
		}
	}
	slices.Sort(paths)
	return paths, nil
}

// IsManifest reports whether a file of this name is read: *.yaml, *.yml or *.json, not
// hidden.
func IsManifest(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

func (f *Files) origin(path string) string { return filepath.Base(path) }

// load reads a file, unless the version in the cache is the present one. It does not
// change the cache.
func (f *Files) load(path string) (*file, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	old := f.cache[path]
	if old != nil && os.SameFile(old.info, st) && old.info.ModTime().Equal(st.ModTime()) && old.info.Size() == st.Size() {
		return old, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	entry := &file{info: st}
	var known map[[sha256.Size]byte]part
	if old != nil {
		known = old.parts
	}
	entry.parts = map[[sha256.Size]byte]part{}
	for _, p := range decode(data, f.origin(path), known) {
		entry.decoded = append(entry.decoded, p.decoded...)
		entry.problems = append(entry.problems, p.problems...)
		if len(p.problems) == 0 {
			entry.parts[p.sum] = p
		}
	}
	if old != nil && len(entry.problems) > 0 {
		entry.keep(old)
	}
	return entry, nil
}

// keep takes over the objects of an earlier version of the file that the new one does
// not hold: with a part of the file undecodable they cannot be said to be deleted.
func (e *file) keep(old *file) {
	have := map[model.Ref]bool{}
	for _, d := range e.decoded {
		have[d.Ref()] = true
	}
	for _, d := range old.decoded {
		if !have[d.Ref()] {
			e.decoded = append(e.decoded, d)
			e.stale = append(e.stale, d.Ref())
		}
	}
}

// Stale lists, by file name, the objects of the last snapshot that are from an earlier
// version of their file, since the present one cannot be decoded completely.
func (f *Files) Stale() map[string][]model.Ref {
	out := map[string][]model.Ref{}
	for path, entry := range f.cache {
		if len(entry.stale) > 0 {
			out[f.origin(path)] = entry.stale
		}
	}
	return out
}

// settle is how long a directory must be quiet before a change is reported: an editor
// and "kubectl cp" write a file in several steps.
const settle = 20 * time.Millisecond

// settleRename is settle after a file that is none became a manifest, in one step: it is
// complete. So write those that take care.
const settleRename = 2 * time.Millisecond

// poll catches what notifications miss, such as a directory on a network file system.
const poll = 10 * time.Second

// Watch reports changes of the directory until ctx ends; several at once are one report.
func (f *Files) Watch(ctx context.Context) (<-chan struct{}, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch manifests: %w", err)
	}
	if err := w.Add(f.dir); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("watch manifests %s: %w", f.dir, err)
	}
	changed := make(chan struct{}, 1)
	go func() {
		defer func() { _ = w.Close() }()
		watch(ctx, w, changed)
	}()
	return changed, nil
}

// hidden names are never read; "..data" is how Kubernetes swaps a volume's files.
func hidden(name string) bool {
	return strings.HasPrefix(name, ".") && !strings.HasPrefix(name, "..")
}

func watch(ctx context.Context, w *fsnotify.Watcher, changed chan<- struct{}) {
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	quiet := time.NewTimer(settle)
	quiet.Stop()
	defer quiet.Stop()
	var busy time.Time // until then somebody may be in the middle of writing
	wasNone := false   // the event before was the old name of a file that is no manifest
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-w.Events:
			if !ok {
				return
			}
			name := filepath.Base(e.Name)
			switch replaced := wasNone && e.Has(fsnotify.Create) && IsManifest(name); {
			case hidden(name): // not read, until it gets another name
			case replaced:
				quiet.Reset(max(settleRename, time.Until(busy)))
			case !IsManifest(name): // the same, but a manifest may be a link that leads there
				quiet.Reset(settle)
			default:
				busy = time.Now().Add(settle)
				quiet.Reset(settle)
			}
			wasNone = e.Has(fsnotify.Rename) && !IsManifest(name)
		case err, ok := <-w.Errors:
			if !ok {
				return
			}
			if err != nil { // an overflow: read everything
				quiet.Reset(settle)
			}
		case <-ticker.C:
			quiet.Reset(0)
		case <-quiet.C:
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}
}

// Load reads manifests once: files, directories, and standard input for "-".
func Load(paths []string, stdin io.Reader) (model.Objects, []model.Problem, error) {
	var objects model.Objects
	var problems []model.Problem
	add := func(data []byte, origin string) {
		decoded, p := Decode(data, origin)
		for _, d := range decoded {
			objects.Add(d)
		}
		problems = append(problems, p...)
	}
	for _, path := range paths {
		if path == "-" {
			data, err := io.ReadAll(stdin)
			if err != nil {
				return objects, nil, fmt.Errorf("read standard input: %w", err)
			}
			add(data, "stdin")
			continue
		}
		files, err := expand(path)
		if err != nil {
			return objects, nil, err
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				return objects, nil, fmt.Errorf("read manifests: %w", err)
			}
			add(data, f)
		}
	}
	return objects, problems, nil
}

// expand turns a directory into the manifests in it; a file is itself, whatever its name.
func expand(path string) ([]string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	if !st.IsDir() {
		return []string{path}, nil
	}
	return NewFiles(path).list()
}
