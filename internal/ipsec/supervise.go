package ipsec

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// How a supervised daemon that ended is started again, and how often its log is looked at.
const (
	restartAfter = 1200 * time.Millisecond
	lookForWord  = 100 * time.Millisecond
	lookAtLog    = 30 * time.Second
)

// Supervise runs an IKE daemon for others (Options.Socket of theirs is Socket of Dir), and
// starts it again when it ends, until ctx does; the daemon then sends a DELETE for every
// SA. It loads nothing: a daemon of its own, so that a restart of the program that
// configures it costs no SA. One that is running in Dir already is taken over. Fence, when
// not nil, takes down what else that program has left, when nobody vouches for it any more.
func Supervise(ctx context.Context, o Options, datapath netstate.IPsecDatapath, fence func() error) error {
	if o.Socket != "" {
		return errors.New("ipsec: a daemon with a Socket is supervised by others")
	}
	if o.Daemon == "" {
		o.Daemon = defaultDaemon
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	if o.Dir = dir; !safePath.MatchString(dir) || len(o.path(socketName)) > 107 {
		return fmt.Errorf("directory for the IKE daemon %q: an absolute path of at most %d letters, digits and _./+:@- is needed", dir, 107-1-len(socketName))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("directory for the IKE daemon: %w", err)
	}
	for ctx.Err() == nil {
		started := time.Now()
		if err := o.attend(ctx, datapath, fence); err != nil && ctx.Err() == nil && o.Logger != nil {
			o.Logger.Error("the IKE daemon", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(started.Add(restartAfter))):
		}
	}
	return nil
}

// attend starts the daemon, or takes it over, and stays until it ends, or stops it.
func (o *Options) attend(ctx context.Context, datapath netstate.IPsecDatapath, fence func() error) error {
	d, err := o.openDaemon(ctx, datapath)
	if err != nil {
		return err
	}
	if o.Logger != nil {
		o.Logger.Info("the IKE daemon runs", "pid", d.pid, "adopted", d.adopted, "datapath", string(datapath))
	}
	look := time.NewTicker(lookAtLog)
	defer look.Stop()
	word := time.NewTicker(lookForWord)
	defer word.Stop()
	for {
		select {
		case <-ctx.Done():
			return d.stop()
		case <-d.gone:
			d.disconnect()
			return fmt.Errorf("it ended: starting it again; last words in %s: %s", o.path(logName), o.lastLog())
		case now := <-word.C:
			if !o.lapsed(now) {
				continue
			}
			if fence != nil {
				err = fence()
			}
			return errors.Join(errors.New("nobody vouches for its SAs any more: starting it anew, without connections"), err, d.stop())
		case <-look.C:
			if err := o.trimLog(ctx, d); err != nil && o.Logger != nil {
				o.Logger.Warn("cannot trim the IKE daemon's log", "error", err)
			}
		}
	}
}
