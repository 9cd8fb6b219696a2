package ipsec

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

const (
	startTimeout = 15 * time.Second
	stopTimeout  = 5 * time.Second
)

// daemon is a running IKE daemon: our child, one that an earlier process of ours
// started, or an external one.
type daemon struct {
	conn     *vici.Conn
	sub      chan *vici.Subscription // holds one, made before connections are loaded, until the watcher takes it
	socket   string
	datapath netstate.IPsecDatapath
	pid      int           // 0: external, not ours to stop
	gone     chan struct{} // closed when the process has ended; nil: external
	adopted  bool          // it was running before us, perhaps with connections loaded
	instance string        // tells an external one from its successor; empty: our own
}

// dead reports whether the daemon is known to have ended.
func (d *daemon) dead() bool {
	if d.gone == nil {
		return false
	}
	select {
	case <-d.gone:
		return true
	default:
		return false
	}
}

// openDaemon connects to the external daemon, adopts a running one of ours whose
// settings are the wanted ones, or starts one.
func (o *Options) openDaemon(ctx context.Context, datapath netstate.IPsecDatapath) (*daemon, error) {
	if o.Socket != "" {
		conn, err := vici.Dial(ctx, o.Socket)
		if err != nil {
			return nil, err
		}
		instance, err := instanceOf(o.Socket)
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return &daemon{conn: conn, socket: o.Socket, datapath: datapath, adopted: true, instance: instance}, nil
	}
	conf := DaemonConfig(filepath.Base(o.Daemon), o.Dir, datapath)
	d, err := o.adopt(ctx)
	if err != nil {
		return nil, err
	}
	if d != nil {
		if have, err := os.ReadFile(o.path(confName)); err == nil && string(have) == conf {
			d.datapath = datapath
			return d, nil
		}
		if err := d.stop(); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(o.path(confName), []byte(conf), 0o600); err != nil {
		return nil, err
	}
	return o.startDaemon(ctx, datapath)
}

// instanceOf names the daemon that made a socket: every one makes a new file. Its process
// may well be in another container, where nobody sees it.
func instanceOf(socket string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(socket, &st); err != nil {
		return "", fmt.Errorf("socket of the IKE daemon %s: %w", socket, err)
	}
	return fmt.Sprintf("%d-%d.%09d", st.Ino, st.Mtim.Sec, st.Mtim.Nsec), nil
}

// adopt returns the daemon that listens on our own socket, or nil.
func (o *Options) adopt(ctx context.Context) (*daemon, error) {
	socket := o.path(socketName)
	conn, err := vici.Dial(ctx, socket)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pid := conn.PeerPID()
	if pid <= 1 {
		_ = conn.Close()
		return nil, fmt.Errorf("the process that listens on %s cannot be found: stop it, or remove that file", socket)
	}
	gone, err := watchProcess(pid)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("watch the IKE daemon (pid %d): %w", pid, err)
	}
	return &daemon{conn: conn, socket: socket, pid: pid, gone: gone, adopted: true}, nil
}

// watchProcess returns a channel that closes when the process, not necessarily a child,
// has ended.
func watchProcess(pid int) (chan struct{}, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		defer func() { _ = unix.Close(fd) }()
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if err != unix.EINTR {
				return
			}
		}
	}()
	return gone, nil
}

func (o *Options) startDaemon(ctx context.Context, datapath netstate.IPsecDatapath) (*daemon, error) {
	if err := os.Remove(o.path(socketName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := errors.Join(o.rotateLog(0), o.touchLog()); err != nil {
		return nil, err
	}
	// The daemon outlives us on purpose: a process group of its own, and no signal at our death. Not
	// a session: Linux would schedule it as a group apart (autogroup), and ESP in user space
	// would switch between its threads for each packet, at half the speed.
	cmd := exec.Command(o.Daemon)
	cmd.Dir = "/"
	cmd.Env = []string{"STRONGSWAN_CONF=" + o.path(confName), "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	start := o.Start
	if start == nil {
		start = (*exec.Cmd).Start
	}
	if err := start(cmd); err != nil {
		return nil, fmt.Errorf("start the IKE daemon %s: %w", o.Daemon, err)
	}
	d := &daemon{socket: o.path(socketName), datapath: datapath, pid: cmd.Process.Pid, gone: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(d.gone)
	}()
	if err := d.awaitSocket(ctx); err != nil {
		_ = d.stop()
		return nil, fmt.Errorf("%w; last words in %s: %s", err, o.path(logName), o.lastLog())
	}
	if err := o.withoutSockets(); err != nil {
		_ = d.stop()
		return nil, fmt.Errorf("start the IKE daemon: %w", err)
	}
	return d, nil
}

// withoutSockets reads in the new log of the daemon that has just started why it has no
// sockets. It would go on without them, and never look again.
func (o *Options) withoutSockets() error {
	b, _ := os.ReadFile(o.path(logName))
	switch {
	case strings.Contains(string(b), "unable to bind socket: Address already in use"):
		return errors.New("UDP port 500 or 4500 is taken by another program (see 'ss -ulnp'), another IKE daemon perhaps: stop it ('systemctl disable --now strongswan')")
	case strings.Contains(string(b), "requires CAP_NET_BIND_SERVICE"):
		return errors.New("it may not listen on UDP ports 500 and 4500: give it the capability NET_BIND_SERVICE beside NET_ADMIN (a container: securityContext.capabilities.add)")
	}
	return nil
}

// awaitSocket connects as soon as the daemon listens and answers.
func (d *daemon) awaitSocket(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if conn, err := vici.Dial(ctx, d.socket); err == nil {
			if _, err = conn.Command(ctx, "version", nil); err == nil {
				d.conn = conn
				return nil
			}
			_ = conn.Close()
		}
		select {
		case <-d.gone:
			return errors.New("the IKE daemon ended while starting")
		case <-ctx.Done():
			return fmt.Errorf("the IKE daemon does not answer: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

// stop ends a daemon of ours (SIGTERM makes it send DELETE for every IKE SA) and waits
// for that; of an external one only the connection is closed.
func (d *daemon) stop() error {
	d.disconnect()
	if d.gone == nil {
		return nil
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if d.dead() {
			return nil
		}
		if err := syscall.Kill(d.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("stop the IKE daemon (pid %d): %w", d.pid, err)
		}
		select {
		case <-d.gone:
			return nil
		case <-time.After(stopTimeout):
		}
	}
	return fmt.Errorf("the IKE daemon (pid %d) does not end", d.pid)
}

func (d *daemon) disconnect() {
	if d.conn != nil {
		_ = d.conn.Close()
	}
	select {
	case sub := <-d.sub:
		_ = sub.Close()
	default:
	}
}

func (o *Options) path(name string) string { return filepath.Join(o.Dir, name) }

// logExceeds reports whether the log is longer than limit bytes.
func (o *Options) logExceeds(limit int64) bool {
	st, err := os.Stat(o.path(logName))
	return err == nil && st.Size() > limit
}

// rotateLog moves a log larger than limit bytes out of the way.
func (o *Options) rotateLog(limit int64) error {
	if !o.logExceeds(limit) {
		return nil
	}
	return os.Rename(o.path(logName), o.path(logName+".1"))
}

// touchLog makes the log, so that it is ours alone to read.
func (o *Options) touchLog() error {
	f, err := os.OpenFile(o.path(logName), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// lastLog is the last line of the daemon's log.
func (o *Options) lastLog() string {
	b, err := os.ReadFile(o.path(logName))
	if err != nil {
		return "(none)"
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}
