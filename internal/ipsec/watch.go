package ipsec

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

const (
	lookInterval  = 5 * time.Second // between looks at the SAs when nothing happens
	settle        = 100 * time.Millisecond
	firstRetry    = time.Second
	lastRetry     = 5 * time.Second
	logLimit      = 16 << 20 // bytes; then the log is moved away
	repairTimeout = 30 * time.Second
)

var subscribed = []string{"log", "ike-updown", "child-updown", "ike-rekey", "child-rekey"}

// attempt is the state of opening one connection.
type attempt struct {
	next  time.Time
	delay time.Duration
}

// watch keeps what Set has asked for: it follows the daemon's events, opens connections
// that are to be open, and restarts the daemon when it has died.
func (i *IPsec) watch(ctx context.Context) {
	defer close(i.done)
	for ctx.Err() == nil {
		i.mu.Lock()
		d := i.daemon
		i.mu.Unlock()
		if d == nil {
			select {
			case <-ctx.Done():
			case <-i.wake:
			}
			continue
		}
		i.follow(ctx, d)
		if ctx.Err() == nil {
			i.repair(ctx, d)
		}
	}
}

// follow watches one daemon until it is gone or replaced.
func (i *IPsec) follow(ctx context.Context, d *daemon) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events := make(chan vici.Event, 256)
	ended := make(chan struct{})
	sub, err := d.subscription(ctx)
	if err != nil {
		return
	}
	go func() {
		defer close(ended)
		defer func() { _ = sub.Close() }()
		for {
			e, err := sub.Next(ctx)
			if err != nil {
				return
			}
			select {
			case events <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	look := time.NewTimer(0)
	defer look.Stop()
	for i.current() == d {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			return
		case <-d.gone: // nil for an external daemon: never
			return
		case e := <-events:
			if i.handle(e) {
				look.Reset(settle)
			}
		case <-i.wake:
			look.Reset(0)
		case <-look.C:
			again, err := i.open(ctx, d)
			if err != nil {
				return
			}
			look.Reset(again)
		}
	}
}

// subscription is the one that was made with the daemon, or a new one when that broke.
func (d *daemon) subscription(ctx context.Context) (*vici.Subscription, error) {
	select {
	case sub := <-d.sub:
		return sub, nil
	default:
		return vici.Subscribe(ctx, d.socket, subscribed...)
	}
}

func (i *IPsec) current() *daemon {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.daemon
}

// handle takes in one event and reports whether SAs have come or gone.
func (i *IPsec) handle(e vici.Event) bool {
	if e.Name == "log" {
		i.mu.Lock()
		changed := i.log.line(e.Message, i.desired, time.Now())
		i.mu.Unlock()
		if changed {
			i.notify()
		}
		if i.narrowed(e.Message.Get("msg")) {
			if err := i.setSelectors(netstate.LibIPsec); err != nil {
				i.warn("cannot give kernel-libipsec an address", err)
			}
		}
		return false
	}
	if e.Name == "child-updown" && e.Message.Get("up") == "yes" {
		i.mu.Lock()
		for name := range e.Message.Sections() {
			delete(i.retry, name)
			i.log.forget(name)
		}
		i.mu.Unlock()
	}
	i.notify()
	return true
}

// open starts what is to be open and is neither open nor on its way, and returns when to
// look again. An error means that the daemon cannot be asked any more.
func (i *IPsec) open(ctx context.Context, d *daemon) (time.Duration, error) {
	if err := i.opts.trimLog(ctx, d); err != nil {
		i.warn("cannot trim the IKE daemon's log", err)
	}
	asking, cancel := context.WithTimeout(ctx, repairTimeout)
	defer cancel()
	sas, err := listSAs(asking, d.conn)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	again := lookInterval
	for name, children := range i.due(sas, now) {
		for _, child := range children {
			m := (&vici.Section{}).Set("ike", name).Set("child", child).Set("timeout", "-1").Set("init-limits", "no")
			if _, err := d.conn.Command(asking, "initiate", m); err != nil && ctx.Err() == nil {
				i.warn("cannot open the IPsec connection "+name, err)
			}
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, a := range i.retry {
		if wait := time.Until(a.next) + 10*time.Millisecond; wait < again {
			again = max(wait, settle)
		}
	}
	return again, nil
}

// due names the child SAs to be started now, by connection, and notes the attempt.
func (i *IPsec) due(sas map[string]*saState, now time.Time) map[string][]string {
	i.mu.Lock()
	defer i.mu.Unlock()
	out := map[string][]string{}
	for name, c := range i.desired {
		if c.Initiate != netstate.InitiateAlways || i.memory.Connections[name].Digest != c.digest {
			continue
		}
		var missing []string
		sa := sas[name]
		for _, child := range c.children {
			if sa == nil || !sa.busy[child] {
				missing = append(missing, child)
			}
		}
		if len(missing) == 0 {
			delete(i.retry, name)
			continue
		}
		a := i.retry[name]
		if a == nil {
			a = &attempt{delay: firstRetry}
			i.retry[name] = a
		}
		if now.Before(a.next) {
			continue
		}
		// The jitter keeps two ends that both initiate from meeting for ever.
		a.next = now.Add(a.delay*3/4 + rand.N(a.delay/2))
		if sa != nil && sa.moving {
			continue
		}
		a.delay = min(2*a.delay, lastRetry)
		out[name] = missing
	}
	return out
}

// repair starts a daemon that has died and gives it everything again.
func (i *IPsec) repair(ctx context.Context, d *daemon) {
	i.set.Lock()
	defer i.set.Unlock()
	if ctx.Err() != nil || i.current() != d {
		return
	}
	i.notify()
	ctx, cancel := context.WithTimeout(ctx, repairTimeout)
	defer cancel()
	i.mu.Lock()
	n := len(i.desired)
	i.mu.Unlock()
	if d.dead() {
		i.warn("the IKE daemon ended: starting it again", nil)
	}
	changed := 0
	var err error
	if n > 0 || i.opts.Socket != "" {
		changed, err = i.apply(ctx, d.datapath)
	}
	if changed > 0 {
		i.notify()
	}
	if err != nil {
		i.warn("cannot repair the IKE daemon", err)
	}
	// Without success, or when only the subscription broke, not in a hurry.
	if err != nil || i.current() == d {
		select {
		case <-ctx.Done():
		case <-time.After(firstRetry / 2):
		}
	}
}

func (i *IPsec) warn(msg string, err error) {
	if i.opts.Logger == nil {
		return
	}
	if err == nil {
		i.opts.Logger.Warn(msg)
		return
	}
	i.opts.Logger.Warn(msg, "error", err)
}

// trimLog moves a log of our own daemon that has become long aside; one old one is kept.
func (o *Options) trimLog(ctx context.Context, d *daemon) error {
	if o.Socket != "" || !o.logExceeds(logLimit) {
		return nil
	}
	if err := o.rotateLog(logLimit); err != nil {
		return err
	}
	if err := o.touchLog(); err != nil {
		return err
	}
	return d.command(ctx, "reload-settings")
}
