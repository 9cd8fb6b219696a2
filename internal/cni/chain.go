// Package cni puts a plug-in of ours behind the network plug-in of a node, so that no pod
// gets a network before the guard of the encryption between nodes stands: after a reboot
// pods may start before the agent does.
//
// The container runtime takes the file that comes first in the directory with network
// configurations (containernetworking's SPEC.md and libcni). Chain writes one that comes
// before the owner's: a copy of it, with our plug-in as the last one. The owner's file is
// never touched: it is followed when it changes, whatever rewrites it at boot cannot take the
// plug-in away, and without ours the runtime falls back to it.
package cni

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/fsnotify/fsnotify"
)

const (
	// File is the name of our network configuration.
	File = "0-culvert.conflist"
	// Plugin is the name of our plug-in's program, and its type in a configuration.
	Plugin = "culvert-cni"
)

// Options say where things are on the host.
type Options struct {
	// Root is the host's file system, say "/proc/1/root" of a container that sees the host's
	// processes; empty: "/".
	Root string
	// ConfigDir and BinDir are the runtime's directories with network configurations and
	// plug-ins, on the host; absolute. The owner's first plug-in must be in BinDir.
	ConfigDir, BinDir string
	// Program is the file of our plug-in, in the own file system.
	Program string
	// State is the directory of the agent, on the host: the plug-in looks there whether it has
	// to wait for a guard.
	State string
}

// Chain is our plug-in's place on a node. Its methods are for one goroutine.
type Chain struct {
	opts    Options
	changes chan struct{}
	watcher *fsnotify.Watcher
	once    sync.Once
	// compared are the programs, ours and the installed one, that were found to be the same.
	compared [2]fs.FileInfo
}

// New changes nothing.
func New(o Options) *Chain {
	if o.Root == "" {
		o.Root = "/"
	}
	return &Chain{opts: o, changes: make(chan struct{}, 1)}
}

// Changes reports that somebody changed a network configuration, while ours is wanted.
func (c *Chain) Changes() <-chan struct{} { return c.changes }

// Close stops looking for changes. What was written stays.
func (c *Chain) Close() error {
	if c.watcher == nil {
		return nil
	}
	return c.watcher.Close()
}

// Set puts our plug-in behind the owner's, or takes it away, and returns the number of
// changes: 0 when all was so. The program comes before what names it, and stays when that goes: a
// runtime may ask it to say farewell to pods that it has let in.
func (c *Chain) Set(want bool) (changed int, err error) {
	if !want {
		return c.remove()
	}
	changed, err = c.install()
	if err != nil {
		err = fmt.Errorf("put %s behind the node's network plug-in: %w", Plugin, err)
	}
	return changed, err
}

// open opens a directory of the host. Links that lead out of it are refused.
func (c *Chain) open(dir string) (*os.Root, error) {
	root, err := os.OpenRoot(c.opts.Root)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	return root.OpenRoot(strings.TrimPrefix(filepath.Clean(dir), "/"))
}

func (c *Chain) remove() (int, error) {
	dir, err := c.open(c.opts.ConfigDir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err == nil {
		defer func() { _ = dir.Close() }()
		err = dir.Remove(File)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("remove %s from %s: %w", File, c.opts.ConfigDir, err)
	}
	return 1, nil
}

func (c *Chain) install() (changed int, err error) {
	dir, err := c.open(c.opts.ConfigDir)
	if err != nil {
		return 0, fmt.Errorf("directory with network configurations: %w", err)
	}
	defer func() { _ = dir.Close() }()
	c.watch()
	owner, err := first(dir)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", c.opts.ConfigDir, err)
	}
	if owner == "" {
		// The network plug-in is gone, or not there yet: the runtime must not take ours for it.
		_ = dir.Remove(File)
		return 0, fmt.Errorf("%s has no network configuration: is it the container runtime's directory?", c.opts.ConfigDir)
	}
	if owner < File {
		return 0, fmt.Errorf("%s in %s comes before %s, so that the runtime would not read ours: rename it", owner, c.opts.ConfigDir, File)
	}
	want, mode, main, err := c.config(dir, owner)
	if err != nil {
		return 0, err // and what is there stays
	}
	wrote, err := c.program(main)
	if err != nil {
		_ = dir.Remove(File) // nothing may name a program that the runtime does not find
		return 0, err
	}
	if wrote {
		changed++
	}
	if have, err := dir.ReadFile(File); err == nil && holds(have, want) {
		return changed, nil
	}
	if err := replace(dir, File, bytes.NewReader(want), mode); err != nil {
		return changed, fmt.Errorf("write %s: %w", filepath.Join(c.opts.ConfigDir, File), err)
	}
	return changed + 1, nil
}

// watch looks for changes in the directory; where that is not possible, the next Set will
// see them.
func (c *Chain) watch() {
	c.once.Do(func() {
		w, err := fsnotify.NewWatcher()
		if err != nil {
			return
		}
		c.watcher = w
		go func() {
			for range w.Events {
				select {
				case c.changes <- struct{}{}:
				default:
				}
			}
		}()
	})
	if c.watcher != nil {
		_ = c.watcher.Add(filepath.Join(c.opts.Root, c.opts.ConfigDir)) // again, should it be a new one
	}
}

// first is the configuration that the runtime would take without ours.
func first(dir *os.Root) (string, error) {
	list, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return "", err
	}
	for _, e := range list { // sorted
		if ext := filepath.Ext(e.Name()); slices.Contains([]string{".conf", ".conflist", ".json"}, ext) && e.Name() != File && !e.IsDir() {
			return e.Name(), nil
		}
	}
	return "", nil
}

// config is the owner's configuration, with our plug-in at the end; main is the program of
// its first plug-in.
func (c *Chain) config(dir *os.Root, owner string) (want []byte, mode fs.FileMode, main string, err error) {
	path := filepath.Join(c.opts.ConfigDir, owner)
	data, err := dir.ReadFile(owner)
	if err != nil {
		return nil, 0, "", err
	}
	info, err := dir.Stat(owner)
	if err != nil {
		return nil, 0, "", err
	}
	list := map[string]any{}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber() // large numbers stay as they are
	if err := decoder.Decode(&list); err != nil {
		return nil, 0, "", fmt.Errorf("%s is no network configuration: %w", path, err)
	}
	if _, single := list["type"]; single { // libcni's ConfListFromConf
		list = map[string]any{"cniVersion": list["cniVersion"], "name": list["name"], "plugins": []any{list}}
	}
	plugins, ok := list["plugins"].([]any)
	if !ok || len(plugins) == 0 {
		return nil, 0, "", fmt.Errorf("%s names no plug-ins", path)
	}
	if p, ok := plugins[0].(map[string]any); ok {
		main, _ = p["type"].(string)
	}
	// With what it is a copy of: so a plug-in that the owner took out is told from one that
	// somebody else put in.
	list["plugins"] = append(plugins, map[string]any{
		"type": Plugin, "stateDirectory": c.opts.State, "copyOf": fmt.Sprintf("%s sha256:%x", owner, sha256.Sum256(data)),
	})
	want, err = json.MarshalIndent(list, "", "  ")
	return append(want, '\n'), info.Mode().Perm(), main, err
}

// holds tells whether a file says what is wanted. Other plug-ins that somebody put in between
// are none of ours: taking them out would begin a quarrel.
func holds(have, want []byte) bool {
	var h, w map[string]any
	if json.Unmarshal(have, &h) != nil || json.Unmarshal(want, &w) != nil {
		return false
	}
	in, _ := h["plugins"].([]any)
	for _, p := range w["plugins"].([]any) {
		i := slices.IndexFunc(in, func(x any) bool { return reflect.DeepEqual(x, p) })
		if i < 0 {
			return false
		}
		in = in[i+1:]
	}
	h["plugins"], w["plugins"] = nil, nil
	return reflect.DeepEqual(h, w)
}

// program installs the plug-in's program beside the owner's, and nowhere else: a runtime that does
// not find ours would start no pod any more.
func (c *Chain) program(main string) (wrote bool, err error) {
	dir, err := c.open(c.opts.BinDir)
	if err != nil {
		return false, fmt.Errorf("directory with network plug-ins: %w", err)
	}
	defer func() { _ = dir.Close() }()
	if _, err := dir.Lstat(main); err != nil {
		return false, fmt.Errorf("%s has no program %q, which the network plug-in calls: it is not the container runtime's directory of plug-ins", c.opts.BinDir, main)
	}
	own, err := os.Open(c.opts.Program)
	if err != nil {
		return false, err
	}
	defer own.Close()
	info, err := own.Stat()
	if err != nil {
		return false, err
	}
	if there, err := dir.Open(Plugin); err == nil {
		same := c.same(own, info, there)
		there.Close()
		if same {
			return false, nil
		}
	}
	if _, err := own.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	if err := replace(dir, Plugin, own, 0o755); err != nil {
		return false, fmt.Errorf("install %s: %w", filepath.Join(c.opts.BinDir, Plugin), err)
	}
	return true, nil
}

// same tells whether the installed program is ours; what has not changed since it was read last
// is not read again.
func (c *Chain) same(own *os.File, info fs.FileInfo, there *os.File) bool {
	have, err := there.Stat()
	if err != nil || have.Mode().Perm()&0o111 == 0 {
		return false
	}
	if untouched(c.compared[0], info) && untouched(c.compared[1], have) {
		return true
	}
	a, err := digest(own)
	if err != nil {
		return false
	}
	b, err := digest(there)
	if err != nil || a != b {
		return false
	}
	c.compared = [2]fs.FileInfo{info, have}
	return true
}

func untouched(before, now fs.FileInfo) bool {
	return before != nil && os.SameFile(before, now) && before.Size() == now.Size() && before.ModTime().Equal(now.ModTime())
}

func digest(r io.Reader) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	_, err = io.Copy(h, r)
	h.Sum(sum[:0])
	return sum, err
}

// replace writes a file so that nobody ever sees a part of it, also after a crash.
func replace(dir *os.Root, name string, content io.Reader, mode fs.FileMode) error {
	temporary := "." + name + ".culvert-new"
	f, err := dir.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = dir.Rename(temporary, name)
	}
	if err != nil {
		return errors.Join(err, dir.Remove(temporary))
	}
	if d, err := dir.Open("."); err == nil {
		_ = d.Sync() // the entry too; not every file system can
		d.Close()
	}
	return nil
}
