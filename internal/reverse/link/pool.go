// Package link holds sessions: it dials hubs and keeps connections to them (Links), and it
// picks the session that a new stream takes (Pool). Hub, spoke and egress share it.
package link

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Time limits of every session and stream.
const (
	// Keepalive is how often a ping is sent; with DeadAfter, a path that is gone is noticed
	// within 8 s.
	Keepalive = 3 * time.Second
	DeadAfter = 8 * time.Second
	// DialTimeout is how long opening a stream may take, all in all: the client has its answer
	// before kube-apiserver gives up, which is after 10 s.
	DialTimeout = 9 * time.Second

	// quietAfter is when a session that should have been heard of is used only for want of
	// a better one.
	quietAfter = Keepalive + time.Second
	// hedgeAfter is when a stream is tried on another session, should the first one have
	// given no sign of life since.
	hedgeAfter = 400 * time.Millisecond
)

// Member is one session in a pool.
type Member struct {
	Session *mux.Session
	Peer    string // who is at the other end; several sessions may share it
}

// Pool is a set of sessions. The zero value is empty.
type Pool struct {
	mu      sync.Mutex
	members []*Member
	changed chan struct{} // closed at the next change
}

// Add adds a session; it leaves the pool when it ends or when remove is called.
func (p *Pool) Add(s *mux.Session, peer string) (remove func()) {
	m := &Member{Session: s, Peer: peer}
	p.mu.Lock()
	p.members = append(p.members, m)
	p.notify()
	p.mu.Unlock()
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i, x := range p.members {
			if x == m {
				p.members = append(p.members[:i:i], p.members[i+1:]...)
				p.notify()
				return
			}
		}
	}
}

func (p *Pool) notify() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// Changed is closed when the pool next changes.
func (p *Pool) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	return p.changed
}

// Members are the present ones.
func (p *Pool) Members() []*Member {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*Member(nil), p.members...)
}

// Ready reports whether a stream could be opened now.
func (p *Pool) Ready() bool { return p.pick(nil, nil) != nil }

// pick returns the session with the fewest streams; those of peers that are to be avoided
// and those that are quiet come last. Nil: none.
func (p *Pool) pick(tried map[*Member]bool, avoid map[string]bool) *Member {
	var best *Member
	bestCost := 0
	members := p.Members()
	offset := 0
	if len(members) > 1 {
		offset = rand.IntN(len(members))
	}
	for i := range members {
		m := members[(i+offset)%len(members)]
		if tried[m] || !m.Session.Usable() {
			continue
		}
		const worse = 1 << 20 // than any number of streams
		cost := m.Session.Streams()
		if time.Since(m.Session.Heard()) > quietAfter {
			cost += worse
		}
		if avoid[m.Peer] {
			cost += 2 * worse
		}
		if best == nil || cost < bestCost {
			best, bestCost = m, cost
		}
	}
	return best
}

// attempt is one try to open a stream, and what came of it.
type attempt struct {
	member  *Member
	began   time.Time
	stream  *mux.Stream
	answer  wire.Opened
	refusal *wire.Refusal
	retry   bool // nothing was reached: another session may do better
}

// Open opens a stream on the best session, and on another one when that one is lost, has
// no way on, or gives no sign of life. None is the reason for having no session at all.
func (p *Pool) Open(ctx context.Context, open wire.Open, none wire.Reason) (*mux.Stream, wire.Opened, *wire.Refusal) {
	ctx, cancel := context.WithTimeout(ctx, open.Timeout)
	defer cancel()
	h := &hedge{pool: p, ctx: ctx, open: open, results: make(chan *attempt), tried: map[*Member]bool{}, avoid: map[string]bool{}}
	return h.run(none)
}

// hedge is one Open.
type hedge struct {
	pool    *Pool
	ctx     context.Context
	open    wire.Open
	results chan *attempt
	tried   map[*Member]bool
	avoid   map[string]bool
	pending []*attempt
	last    *wire.Refusal
}

func (h *hedge) run(none wire.Reason) (*mux.Stream, wire.Opened, *wire.Refusal) {
	if !h.next() {
		return nil, wire.Opened{}, wire.Refuse(none, "%s", noneText[none])
	}
	timer := time.NewTimer(hedgeAfter)
	defer timer.Stop()
	for len(h.pending) > 0 {
		select {
		case a := <-h.results:
			h.drop(a)
			if a.refusal == nil || !a.retry {
				return a.stream, a.answer, a.refusal
			}
			h.last = a.refusal
			h.avoid[a.member.Peer] = true
			h.next()
		case <-timer.C:
			newest := h.pending[len(h.pending)-1]
			if s := newest.member.Session; !s.Heard().After(newest.began) && time.Since(newest.began) > 3*s.RTT() {
				h.avoid[newest.member.Peer] = true
				h.next()
			}
			timer.Reset(hedgeAfter)
		case <-h.ctx.Done():
			return nil, wire.Opened{}, timeoutOf(h.ctx, h.open)
		}
	}
	return nil, wire.Opened{}, h.last
}

var noneText = map[wire.Reason]string{
	wire.ReasonNoSpoke: "no spoke is connected: see that 'culvert spoke' runs in the remote cluster and reaches the front",
	wire.ReasonNoHub:   "no hub can be reached: see that 'culvert hub' runs and that its address is right",
}

func timeoutOf(ctx context.Context, open wire.Open) *wire.Refusal {
	if errors.Is(ctx.Err(), context.Canceled) {
		return wire.Refuse(wire.ReasonCancelled, "the client went away")
	}
	return wire.Refuse(wire.ReasonTimeout, "%s did not answer within %s", open.Target, open.Timeout)
}

// next starts an attempt on another session; false: there is none.
func (h *hedge) next() bool {
	m := h.pool.pick(h.tried, h.avoid)
	if m == nil {
		return false
	}
	h.tried[m] = true
	a := &attempt{member: m, began: time.Now()}
	h.pending = append(h.pending, a)
	go h.try(a)
	return true
}

func (h *hedge) drop(a *attempt) {
	for i, x := range h.pending {
		if x == a {
			h.pending = append(h.pending[:i], h.pending[i+1:]...)
			return
		}
	}
}

// try runs one attempt; when nobody waits for it any more the stream is closed.
func (h *hedge) try(a *attempt) {
	a.run(h.ctx, h.open)
	select {
	case h.results <- a:
	case <-h.ctx.Done():
		if a.stream != nil {
			_ = a.stream.Close()
		}
	}
}

func (a *attempt) run(ctx context.Context, open wire.Open) {
	if deadline, ok := ctx.Deadline(); ok {
		open.Timeout = time.Until(deadline)
	}
	st, err := a.member.Session.Open(open.Append(nil))
	if err != nil {
		a.refusal, a.retry = wire.Refuse(wire.ReasonLost, "%v", err), true
		return
	}
	a.member.Session.Ping() // so that a living one is heard of, however long the target takes
	answer, err := st.Answer(ctx)
	if err == nil {
		a.answer, err = wire.ParseOpened(answer)
	}
	if err == nil {
		a.stream = st
		return
	}
	_ = st.Close()
	var reset *mux.ResetError
	switch {
	case errors.As(err, &reset):
		a.refusal = wire.ParseRefusal(reset.Reason)
		a.retry = a.refusal.Reason == wire.ReasonNoSpoke || a.refusal.Reason == wire.ReasonLost || a.refusal.Reason == wire.ReasonBusy
	case ctx.Err() != nil:
		a.refusal = timeoutOf(ctx, open)
	default:
		a.refusal, a.retry = wire.Refuse(wire.ReasonLost, "%v before the target answered", err), true
	}
}
