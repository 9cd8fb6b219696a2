package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// keeper holds the connections to one hub.
type keeper struct {
	links      *Links
	hub        wire.HubAddress
	ctx, alive context.Context

	mu       sync.Mutex
	sessions []*mux.Session
	extra    int                     // connections beyond the least number, or on their way
	spare    map[*mux.Session]*spare // those of them that are there
}

// spare is a connection beyond the least number.
type spare struct {
	leave   func()    // takes it out of the pool
	idle    time.Time // since when it carries no streams; zero: it does
	retired bool      // it ends when it carries none
}

// always keeps one connection.
func (k *keeper) always() {
	var p pace
	for k.ctx.Err() == nil {
		began := time.Now()
		err := k.connect(false)
		wait := p.next(err, time.Since(began))
		jittered := wait/2 + time.Duration(rand.Int64N(int64(wait)))
		select {
		case <-k.ctx.Done():
		case <-time.After(jittered):
		}
	}
}

// pace is how long to wait between two attempts to connect. The zero value is that of the
// first.
type pace struct {
	wait time.Duration // the last one
	busy time.Duration // the last one after errBusy
}

// next is the wait after an attempt that failed with err, or after a connection (nil) that ended;
// either took so long. A hub that is too busy for all who come at once is given time, or none
// of them would ever be served.
func (p *pace) next(err error, took time.Duration) time.Duration {
	if errors.Is(err, errBusy) {
		p.busy = min(max(2*p.busy, firstBusy), lastBusy)
		return p.busy
	}
	p.busy = 0
	p.wait = min(max(2*p.wait, firstRetry), lastRetry)
	if err == nil && took > lastRetry {
		p.wait = firstRetry
	}
	return p.wait
}

// once keeps one more connection until it is no longer needed.
func (k *keeper) once() {
	_ = k.connect(true) // one that is not to be had is tried again when it is needed
	k.mu.Lock()
	k.extra--
	k.mu.Unlock()
}

// grow reports whether one more connection is to be made: all carry streams. Of those beyond the
// least number it asks one that is idle to go.
func (k *keeper) grow() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	busy := 0
	for _, s := range k.sessions {
		x, idle := k.spare[s], s.Streams() <= 1 // one is the hello's
		if !idle {
			busy++
		}
		switch {
		case x == nil:
		case !idle:
			x.idle = time.Time{}
		case x.idle.IsZero():
			x.idle = time.Now()
		}
	}
	for s, x := range k.spare {
		if !x.retired && !x.idle.IsZero() && time.Since(x.idle) > shrinkAfter && len(k.sessions)-busy > 1 && s.Usable() {
			x.retired = true
			go k.retire(s, x.leave)
			return false
		}
	}
	if len(k.sessions) >= k.links.opts.Least && busy == len(k.sessions) && k.links.opts.Least+k.extra < k.links.opts.Most {
		k.extra++
		return true
	}
	return false
}

// retire ends a session once it carries nothing. It leaves the pool first, and a stream that was opened
// just before may last as long as it likes.
func (k *keeper) retire(s *mux.Session, leave func()) {
	leave()
	s.GoAway()
	drain(k.alive, s, forEver)
}

// replace ends a session that is off the list, and has it leave the pool, once another one has
// taken its place: all are renewed at once, and neither end must be without any meanwhile.
func (k *keeper) replace(s *mux.Session, leave func()) {
	defer leave()
	until := k.links.oldUntil()
	for time.Until(until) > 0 && !k.usable() {
		select {
		case <-s.Done():
			return
		case <-k.ctx.Done():
			until = time.Now()
		case <-time.After(20 * time.Millisecond):
		}
	}
	leave()
	s.GoAway()
	drain(k.alive, s, time.Until(k.links.oldUntil()))
}

// usable reports whether a session of the list takes streams.
func (k *keeper) usable() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.ContainsFunc(k.sessions, (*mux.Session).Usable)
}

const forEver = math.MaxInt64

// drain waits until a session carries no streams but the hello's, and ends it.
func drain(ctx context.Context, s *mux.Session, most time.Duration) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	timeout := time.NewTimer(most)
	defer timeout.Stop()
	quiet := 0
	for quiet < 2 { // a stream may have been opened before the go-away arrived
		select {
		case <-s.Done():
			return
		case <-ctx.Done():
			quiet = 2
		case <-timeout.C:
			quiet = 2
		case <-ticker.C:
			if s.Streams() > 1 {
				quiet = 0
			} else {
				quiet++
			}
		}
	}
	s.CloseWith("no longer needed")
}

// connect makes one connection and stays until it ends; an error: there was none. Extra is one beyond
// the least number.
func (k *keeper) connect(extra bool) error {
	l := k.links
	s, err := k.dial()
	if err != nil {
		if k.ctx.Err() == nil {
			k.failing(err)
		}
		return err
	}
	remove := l.Add(s, k.hub.ServerName)
	k.mu.Lock()
	k.sessions = append(k.sessions, s)
	if extra {
		k.spare[s] = &spare{leave: remove}
	}
	n := len(k.sessions)
	k.mu.Unlock()
	l.opts.Meter.Sessions(k.hub.ServerName, n)
	l.lmu.Lock()
	delete(l.failed, k.hub.ServerName)
	l.lmu.Unlock()
	l.opts.Logger.Debug("connected", "hub", k.hub.ServerName, "address", k.hub.Address, "connections", n)

	asked, renew := k.hold(s)
	n, retired := k.forget(s)
	asked = asked || retired
	if renew {
		go k.replace(s, remove)
	} else {
		remove()
	}
	l.opts.Meter.Sessions(k.hub.ServerName, n)
	if !asked {
		l.opts.Meter.Lost()
		l.opts.Logger.Warn("connection lost", "hub", k.hub.ServerName, "address", k.hub.Address, "connections", n, "error", s.Err())
	}
	if n == 0 && k.ctx.Err() == nil && !asked {
		l.lmu.Lock()
		l.failed[k.hub.ServerName] = s.Err().Error()
		l.lmu.Unlock()
	}
	return nil
}

// forget takes a session off the list. It returns how many are left, and whether this one was retired.
func (k *keeper) forget(s *mux.Session) (left int, retired bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sessions = slices.DeleteFunc(k.sessions, func(x *mux.Session) bool { return x == s })
	if x := k.spare[s]; x != nil {
		retired = x.retired
		delete(k.spare, s)
	}
	return len(k.sessions), retired
}

// failing notes and logs an error, once per kind.
func (k *keeper) failing(err error) {
	l := k.links
	k.mu.Lock()
	connected := len(k.sessions) > 0
	k.mu.Unlock()
	l.lmu.Lock()
	known := l.failed[k.hub.ServerName] == err.Error()
	if !connected {
		l.failed[k.hub.ServerName] = err.Error()
	}
	l.lmu.Unlock()
	if !known {
		l.opts.Logger.Warn("cannot connect", "hub", k.hub.ServerName, "address", k.hub.Address, "error", err)
	}
}

// hold stays until a session ends, or is to be replaced (renew); asked: one of the ends wanted it
// to.
func (k *keeper) hold(s *mux.Session) (asked, renew bool) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	stop := k.ctx.Done()
	renewed := k.links.onRenew()
	for {
		select {
		case <-s.Done():
			return asked || s.Draining(), false
		case <-renewed:
			return true, true
		case <-stop:
			asked, stop = true, nil
			s.GoAway()
			go drain(k.alive, s, DrainTimeout)
		case <-ticker.C:
			if !asked && s.Draining() && s.Err() == nil { // the hub is about to stop
				return true, false
			}
		}
	}
}

// dial connects and says hello.
func (k *keeper) dial() (*mux.Session, error) {
	l := k.links
	ctx, cancel := context.WithTimeout(k.ctx, handshakeTimeout)
	defer cancel()
	raw, err := l.opts.Dialer.DialContext(ctx, k.hub.Address)
	if err != nil {
		return nil, err
	}
	reached := time.Now()
	conn := tls.Client(mux.Cork(raw), l.opts.TLS(k.hub.ServerName))
	if err := handshake(ctx, conn); err != nil {
		_ = raw.Close()
		return nil, slow(err, reached)
	}
	s := mux.New(conn, mux.Config{Dialer: true, Accept: l.opts.Accept, Keepalive: Keepalive, DeadAfter: DeadAfter})
	if err := k.hello(ctx, s); err != nil {
		s.Close()
		return nil, slow(err, reached)
	}
	return s, nil
}

// errBusy is of a hub that can be reached but has not answered in time.
var errBusy = errors.New("it is reached, but does not answer in time: it, or the machine, may be too busy")

// slow makes an error that came late an errBusy: who cuts first, we or the front, is not told.
func slow(err error, reached time.Time) error {
	if time.Since(reached) < handshakeTimeout/2 {
		return err
	}
	return fmt.Errorf("%w (%w)", errBusy, err)
}

// handshake runs on a goroutine of its own: what its stack needs is given back at once.
func handshake(ctx context.Context, conn *tls.Conn) error {
	failed := make(chan error, 1)
	go func() { failed <- conn.HandshakeContext(ctx) }()
	return <-failed
}

// hello says who we are and waits for the hub's first answer: in TLS 1.3 a refused
// certificate is only seen then. Later messages are followed while the session lives.
func (k *keeper) hello(ctx context.Context, s *mux.Session) error {
	st, err := s.Open(wire.Open{Kind: wire.StreamHello}.Append(nil))
	if err != nil {
		return err
	}
	if _, err := st.Answer(ctx); err != nil {
		var reset *mux.ResetError
		if errors.As(err, &reset) {
			return wire.ParseRefusal(reset.Reason)
		}
		return err
	}
	if err := wire.WriteJSON(st, k.links.opts.Hello); err != nil {
		return err
	}
	var w wire.Welcome
	if err := wire.ReadJSON(st, &w); err != nil {
		return err
	}
	k.links.learn(w)
	go func() {
		for {
			var w wire.Welcome
			if err := wire.ReadJSON(st, &w); err != nil {
				return
			}
			k.links.learn(w)
		}
	}()
	return nil
}
