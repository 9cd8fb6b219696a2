// Package guard applies netstate.Guard as one nftables table of its own, "inet
// culvert-guard", which keeps plain packets of a cluster off the network between its
// nodes.
//
// The table outlives the process, and is saved on disk so that a node that boots can have
// it before anything else runs there. It is removed by Remove only. Changes go through
// nft(8) (1.0.6 or later; Linux 5.10), each in one transaction, which touches no other
// table: counters go on counting, and there is no moment without rules.
//
// What is dropped is counted by kind:
//
//	in_pods      arrived in the clear with a pod's or site's source
//	in_nodes     arrived in the clear from a node for a pod
//	in_hosts     arrived in the clear from a node for a node (scope All)
//	in_overlay   a packet of the network plugin's overlay that arrived in the clear
//	in_unknown   for what is attached to a pod's link, to an address that is no pod's
//	out_pods     would have left in the clear for a pod or site
//	out_nodes    would have left in the clear from a pod for a node
//	out_overlay  a packet of an overlay network that would have left for a node; one of the network
//	             plugin's, for anybody
//	out_hosts    would have left in the clear for a node (scope All)
//	out_unknown  from a pod's link, with a source that is no pod's
package guard

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Table is the name of the table, of family inet.
const Table = "culvert-guard"

// FileName is where, in an agent's state directory, the guard is kept.
const FileName = "guard.json"

var meanings = map[string]string{
	"in_pods":     "arrived in the clear with a pod's or site's source",
	"in_nodes":    "arrived in the clear from a node for a pod",
	"in_hosts":    "arrived in the clear from a node for a node",
	"in_overlay":  "arrived in the clear in a packet of the overlay network",
	"in_unknown":  "for a pod's link, to an address that is no pod's",
	"out_pods":    "in the clear for a pod or site of another node",
	"out_nodes":   "in the clear from a pod for another node",
	"out_overlay": "of an overlay network, in the clear for another node",
	"out_hosts":   "in the clear for another node",
	"out_unknown": "from a pod's link, with a source that is no pod's",
}

// Describe says what packets of a kind are.
func Describe(kind string) string { return meanings[kind] }

// Options configure a Guard.
type Options struct {
	// Program is the path of nft(8); empty: found in PATH.
	Program string
	// File keeps the guard across restarts of the host; empty: nothing does.
	File string
	// Logger hears of a table that had to be replaced as a whole. Nil: nobody does.
	Logger *slog.Logger
}

// Guard applies a netstate.Guard in the network namespace of the calling thread. Its
// methods may be called from several goroutines.
type Guard struct {
	program string
	file    string
	log     *slog.Logger

	mu   sync.Mutex
	last *table // as last set by this process
}

// New looks for nft(8). It changes nothing.
func New(o Options) (*Guard, error) {
	if o.Program == "" {
		o.Program = "nft"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	path, err := exec.LookPath(o.Program)
	if err != nil {
		return nil, fmt.Errorf("find nft(8): %w", err)
	}
	return &Guard{program: path, file: o.File, log: o.Logger}, nil
}

// Set makes g the guard, in the kernel and on disk, and returns the number of changes: 0
// when it was in effect already. On disk first: a host that crashes in between comes back
// guarded. Nil is an error: a guard goes by Remove.
func (x *Guard) Set(ctx context.Context, g *netstate.Guard) (changed int, err error) {
	if g == nil {
		return 0, errors.New("set guard: there is none; Remove takes it away")
	}
	want, err := render(g)
	if err != nil {
		return 0, fmt.Errorf("set guard: %w", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	wrote, err := x.save(g)
	if err != nil {
		err = fmt.Errorf("set guard: %w", err) // and apply it nevertheless
	}
	if wrote {
		changed++
	}
	n, applyErr := x.apply(ctx, want)
	if applyErr != nil {
		applyErr = fmt.Errorf("set guard: %w", applyErr)
	}
	return changed + n, errors.Join(err, applyErr)
}

// apply brings the kernel's table to what is wanted.
func (x *Guard) apply(ctx context.Context, want *table) (int, error) {
	have, err := observe()
	if err != nil {
		return 0, err
	}
	if have.equal(want) {
		x.last = want
		return 0, nil
	}
	script := want.script()
	if x.last != nil && have.equal(x.last) {
		script = want.change(x.last)
	}
	if err := x.run(ctx, script); err != nil {
		if ctx.Err() != nil {
			return 0, err
		}
		x.log.Warn("replacing the nftables table as a whole", "table", Table, "cause", err)
		if err := x.run(ctx, fmt.Sprintf("add table inet %s\ndelete table inet %s\n", Table, Table)+want.script()); err != nil {
			return 0, err
		}
	}
	x.last = want
	return 1, nil
}

// Saved reads the guard on disk; nil: there is none.
func (x *Guard) Saved() (*netstate.Guard, error) {
	if x.file == "" {
		return nil, nil
	}
	return Load(x.file)
}

// Load reads a guard that Set has saved; nil: there is none.
func Load(file string) (*netstate.Guard, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the saved guard: %w", err)
	}
	g := &netstate.Guard{}
	if err := json.Unmarshal(data, g); err != nil {
		return nil, fmt.Errorf("read the saved guard %s: %w", file, err)
	}
	return g, nil
}

// Restore makes the guard on disk the kernel's, unless there is a table already; restored
// tells whether one stands now.
func (x *Guard) Restore(ctx context.Context) (standing bool, err error) {
	o, err := x.Observe()
	if err != nil || o.Present {
		return o.Present, err
	}
	g, err := x.Saved()
	if err != nil || g == nil {
		return false, err
	}
	_, err = x.Set(ctx, g)
	return err == nil, err
}

func (x *Guard) save(g *netstate.Guard) (wrote bool, err error) {
	if x.file == "" {
		return false, nil
	}
	data, err := json.MarshalIndent(g, "", "  ")
	if err != nil {
		return false, err
	}
	data = append(data, '\n')
	if have, err := os.ReadFile(x.file); err == nil && bytes.Equal(have, data) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(x.file), 0o700); err != nil {
		return false, fmt.Errorf("save: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(x.file), ".guard-*")
	if err != nil {
		return false, fmt.Errorf("save: %w", err)
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), x.file)
	}
	if err != nil {
		return false, errors.Join(fmt.Errorf("save: %w", err), os.Remove(f.Name()))
	}
	return true, nil
}

// Remove deletes the table and the file. What is not there is no error.
func (x *Guard) Remove(ctx context.Context) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.last = nil
	var err error
	if x.file != "" {
		if err = os.Remove(x.file); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	// "add" first: deleting a table that does not exist is an error.
	return errors.Join(err, x.run(ctx, fmt.Sprintf("add table inet %s\ndelete table inet %s\n", Table, Table)))
}

// run gives a transaction to nft(8): all of it happens, or nothing.
func (x *Guard) run(ctx context.Context, script string) error {
	cmd := exec.CommandContext(ctx, x.program, "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
		return fmt.Errorf("nft -f: %w: %s", err, line[:min(len(line), 300)])
	}
	return nil
}
