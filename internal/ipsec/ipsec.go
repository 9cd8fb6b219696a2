package ipsec

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Options say where the daemon is. The zero value of everything but Dir is usable.
type Options struct {
	// Dir holds the daemon's settings, socket and log, and what we remember about it
	// (0700; made when missing). It must be the same after a restart, for the running
	// daemon to be adopted. A short absolute path: Unix sockets allow 107 bytes.
	Dir string
	// Socket is the vici socket of a daemon that others run with DaemonConfig's settings;
	// empty: a daemon of our own, started with the first connection and stopped with the
	// last.
	Socket string
	// Daemon is the program; empty: /usr/sbin/charon-systemd.
	Daemon string
	// Start starts the prepared program; nil: (*exec.Cmd).Start. Tests start it in a
	// network namespace.
	Start func(*exec.Cmd) error
	// Logger reports restarts of the daemon and repairs that failed; nil: nothing.
	Logger *slog.Logger
}

// IPsec is the applier of netstate.IPsec. Its methods may be called from several
// goroutines.
type IPsec struct {
	opts   Options
	events chan struct{}
	wake   chan struct{} // the watcher looks again
	cancel context.CancelFunc
	done   chan struct{} // the watcher has ended

	set       sync.Mutex // one change at a time; taken before mu
	mu        sync.Mutex // what follows
	daemon    *daemon
	desired   map[string]*connection // accepted ones
	refused   map[string]Failure     // connections that could not be applied
	memory    memory
	loaded    map[blob]bool // certificates and CRLs in the daemon
	log       *logReader
	kernel    *netlink.Handle
	selectors selectorAddresses
	retry     map[string]*attempt
	closed    bool
}

const defaultDaemon = "/usr/sbin/charon-systemd"

var safePath = regexp.MustCompile(`^/[A-Za-z0-9_./+:@-]+$`)

// ErrClosed is returned after Close.
var ErrClosed = errors.New("ipsec: closed")

// New prepares Options.Dir and opens netlink in the caller's network namespace, which
// must be the daemon's. The daemon is started, or adopted, by the first Set that needs
// it.
func New(o Options) (*IPsec, error) {
	if o.Daemon == "" {
		o.Daemon = defaultDaemon
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	// The path goes into the daemon's settings as it is.
	if o.Dir = dir; !safePath.MatchString(dir) || len(o.path(socketName)) > 107 {
		return nil, fmt.Errorf("directory for the IKE daemon %q: an absolute path of at most %d letters, digits and _./+:@- is needed", dir, 107-1-len(socketName))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory needs x
		return nil, err
	}
	kernel, err := netlink.NewHandle()
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	i := &IPsec{
		kernel: kernel, selectors: selectorAddresses{h: kernel},
		opts: o, cancel: cancel, done: make(chan struct{}),
		events: make(chan struct{}, 1), wake: make(chan struct{}, 1),
		desired: map[string]*connection{}, refused: map[string]Failure{},
		loaded: map[blob]bool{}, log: newLogReader(), retry: map[string]*attempt{},
	}
	if err := i.memory.read(o.path(memoryName)); err != nil {
		cancel()
		kernel.Close()
		return nil, err
	}
	go i.watch(ctx)
	return i, nil
}

// Events receives a value when something that Observe shows may have changed; several
// changes may be one value.
func (i *IPsec) Events() <-chan struct{} { return i.events }

func (i *IPsec) notify() {
	select {
	case i.events <- struct{}{}:
	default:
	}
}

func (i *IPsec) kick() {
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// Set makes the daemon's connections those of desired (nil: none, and no daemon of ours)
// and returns how many connections were loaded, reloaded or removed. A connection that
// is loaded as it should be is not touched; the SAs of a changed one are deleted and,
// if we initiate, made anew. One that cannot be applied is left as it was (not at all,
// if it is new), is named in the error and in Observe, and keeps none of the others from
// being applied.
func (i *IPsec) Set(ctx context.Context, desired *netstate.IPsec) (changed int, err error) {
	i.set.Lock()
	defer i.set.Unlock()
	if i.isClosed() {
		return 0, ErrClosed
	}
	if desired == nil {
		desired = &netstate.IPsec{}
	}
	errs := i.accept(desired)
	switch {
	case len(desired.Connections) > 0 || i.opts.Socket != "" && len(i.memory.Connections) > 0:
		changed, err = i.apply(ctx, desired.Datapath)
	case i.opts.Socket == "":
		changed, err = i.stopDaemon(ctx)
	}
	i.kick()
	if changed > 0 {
		i.notify()
	}
	return changed, errors.Join(append(errs, err)...)
}

func (i *IPsec) isClosed() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.closed
}

// accept checks the desired connections and keeps those that are in order. An incumbent
// whose new form is not keeps its old one.
func (i *IPsec) accept(desired *netstate.IPsec) []error {
	i.mu.Lock()
	defer i.mu.Unlock()
	next, refused := map[string]*connection{}, map[string]Failure{}
	refuse := func(name string, err error) error {
		refused[name] = Failure{Reason: ReasonInvalidConfiguration, Message: err.Error(), Time: time.Now()}
		if old := i.desired[name]; old != nil && next[name] == nil {
			next[name] = old
		}
		return fmt.Errorf("connection %s: %w", name, err)
	}
	var errs []error
	for _, c := range desired.Connections {
		if next[c.Name] != nil {
			errs = append(errs, refuse(c.Name, errors.New("two connections have this name")))
			continue
		}
		n, err := newConnection(c, desired.Datapath, i.memory.Key)
		if err != nil {
			errs = append(errs, refuse(c.Name, err))
			continue
		}
		next[c.Name] = n
	}
	for _, name := range i.sharedOwners(next) {
		err := errors.New("another connection with a different pre-shared key has the same remote identity, so either key would admit either peer: give them different remote identities")
		delete(next, name)
		errs = append(errs, refuse(name, err))
	}
	i.desired, i.refused = next, refused
	return errs
}

// stopDaemon ends a daemon of ours, also one that an earlier process left.
func (i *IPsec) stopDaemon(ctx context.Context) (int, error) {
	i.mu.Lock()
	d := i.daemon
	i.mu.Unlock()
	if d == nil {
		var err error
		if d, err = i.opts.adopt(ctx); err != nil {
			return 0, err
		}
	}
	changed := len(i.memory.Connections)
	var err error
	if d != nil {
		err = d.stop()
	}
	return changed, errors.Join(err, i.forgetDaemon(), i.setSelectors(""), i.opts.removeFiles())
}

// forgetDaemon drops everything that was true of the last daemon, and what it may have
// left in the kernel.
func (i *IPsec) forgetDaemon() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.daemon != nil {
		i.daemon.disconnect()
	}
	i.daemon = nil
	clear(i.loaded)
	clear(i.retry)
	i.kick()
	if i.opts.Socket != "" { // it may well be alive
		return nil
	}
	return flushXFRM(i.kernel, i.memory.clear())
}

// removeFiles removes what the daemon and we left in Dir, except its log.
func (o *Options) removeFiles() error {
	var errs []error
	for _, name := range []string{confName, socketName, memoryName} {
		if err := os.Remove(o.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Release ends this value and leaves the daemon with all its SAs to the next process, as
// when this one is killed. Close does nothing afterwards.
func (i *IPsec) Release() {
	i.cancel()
	<-i.done
	i.set.Lock()
	defer i.set.Unlock()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return
	}
	i.closed = true
	if i.daemon != nil {
		i.daemon.disconnect()
	}
	i.kernel.Close()
}

// Close takes down everything of ours: the SAs with a DELETE to each peer, our own
// daemon, its files. An external daemon keeps running without our connections. To leave
// the daemon running for the next process, call Release instead.
func (i *IPsec) Close() error {
	i.cancel()
	<-i.done
	i.set.Lock()
	defer i.set.Unlock()
	if i.isClosed() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*stopTimeout)
	defer cancel()
	i.mu.Lock()
	i.desired, i.refused = map[string]*connection{}, map[string]Failure{}
	i.mu.Unlock()
	var err error
	if i.opts.Socket != "" {
		if len(i.memory.Connections) > 0 {
			_, err = i.apply(ctx, "")
		}
		err = errors.Join(err, i.forgetDaemon(), i.setSelectors(""), i.opts.removeFiles())
	} else {
		_, err = i.stopDaemon(ctx)
	}
	for _, name := range []string{logName, logName + ".1"} {
		_ = os.Remove(i.opts.path(name))
	}
	_ = os.Remove(i.opts.Dir) // only when nothing of others is in it
	i.kernel.Close()
	i.mu.Lock()
	i.closed = true
	i.mu.Unlock()
	return err
}
