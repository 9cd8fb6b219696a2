// Package probe finds out whether a path is forwarding: it sends ICMP echo requests
// (RFC 792, RFC 4443) through it and watches for the answers.
//
// A handshake that once succeeded says little about a path; an answer that came through
// it does. The package knows addresses and links, not sites, peers or routes: what
// follows from a path going down is its caller's business.
package probe

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Options are how probing is done. The zero value of each field means its default.
type Options struct {
	// Interval is the time between two probes of one target. Default: 500 ms.
	Interval time.Duration
	// Losses is how many probes in a row stay unanswered until a target is down; it is
	// noticed when the next one is due. Default: 3, that is, at most 2 s after the path
	// broke. An answer may come later than Interval, but not later than Losses times it.
	Losses int
	// Answers is how many probes in a row must be answered until a target that was down is
	// up again, so that a path that loses some packets does not flap. Default: 6.
	Answers int
	// Changed is called with every transition, in their order, one at a time. Nil: nobody
	// is told.
	Changed func(Status)
}

// Target is one path to probe.
type Target struct {
	Name    string     // unique
	Address netip.Addr // who answers
	Source  netip.Addr // source address; zero: the kernel's choice, which prefers an address of Link
	// Link is the name of the link that the probes must leave by; empty: the routes decide.
	// For IPv6 it excludes Source: the kernel holds on to the link only for packets whose
	// source it chooses itself (Linux 6.18, ip6_route_output_flags).
	Link string
}

// Health is what is known about a target.
type Health int

// The states of a target. A new one is Unknown until the first answer, which makes it Up,
// or until too many losses, which make it Down.
const (
	Unknown Health = iota
	Up
	Down
)

// String is "unknown", "up" or "down".
func (h Health) String() string { return [...]string{"unknown", "up", "down"}[h] }

// Status is what is known about one target.
type Status struct {
	Target   Target
	Health   Health
	Since    time.Time     // of Health; zero while Unknown
	RTT      time.Duration // of the last answer; 0: none yet
	Answered time.Time     // when the last answer came; zero: never
	Sent     uint64        // probes
	Received uint64        // answers
	Err      error         // why the last probe could not be sent; nil: it was
}

// slots is how many parts an interval has: targets are spread over them, so that
// probes leave evenly.
const slots = 50

// Prober probes any number of targets through one socket per address family.
type Prober struct {
	options Options
	token   [8]byte // in every probe: tells our answers from others'
	v4, v6  *socket // nil: that family is not to be had, see err4, err6
	err4    error
	err6    error

	mu      sync.Mutex // guards what follows
	targets map[string]*target
	slots   [slots][]*target
	pending map[uint64]probe // by number
	next    uint64           // number of the next probe
	queue   []Status         // transitions that Options.Changed has not seen yet
	queued  chan struct{}    // there are some
}

type target struct {
	status  Status
	slot    int
	last    uint64 // count of the newest probe that was answered
	count   uint64 // probes sent
	answers int    // in a row
}

type probe struct {
	target *target
	count  uint64 // the target's count
	sent   time.Time
}

// New opens the sockets in the network namespace of the calling thread: unprivileged
// ping sockets when net.ipv4.ping_group_range lets this process have them, else raw
// ones, which take CAP_NET_RAW. It fails when neither is to be had for IPv4 and IPv6
// alike. Run or Close releases them.
func New(o Options) (*Prober, error) {
	o.Interval = cmp.Or(o.Interval, 500*time.Millisecond)
	o.Losses = cmp.Or(o.Losses, 3)
	o.Answers = cmp.Or(o.Answers, 6)
	if o.Interval < slots*100*time.Microsecond || o.Losses < 0 || o.Answers < 0 {
		return nil, fmt.Errorf("probe: interval %s, losses %d, answers %d: too small", o.Interval, o.Losses, o.Answers)
	}
	p := &Prober{options: o, targets: map[string]*target{}, pending: map[uint64]probe{}, queued: make(chan struct{}, 1)}
	_, _ = rand.Read(p.token[:]) // never fails (Go 1.24)
	p.v4, p.err4 = openSocket(false)
	p.v6, p.err6 = openSocket(true)
	if p.v4 == nil && p.v6 == nil {
		return nil, fmt.Errorf("probe: no ICMP sockets: set net.ipv4.ping_group_range to \"0 2147483647\" or grant CAP_NET_RAW: %w", errors.Join(p.err4, p.err6))
	}
	return p, nil
}

// Set replaces the targets. One that was there before with equal fields keeps its
// status. It returns how many came, went or changed. Errors name targets that cannot be
// probed; the others are.
func (p *Prober) Set(ctx context.Context, want []Target) (changed int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	keep := make(map[string]bool, len(want))
	for _, w := range want {
		if err := p.check(w, keep[w.Name]); err != nil {
			errs = append(errs, err)
			continue
		}
		keep[w.Name] = true
		if old := p.targets[w.Name]; old != nil {
			if old.status.Target == w {
				continue
			}
			p.drop(old)
		}
		p.add(w)
		changed++
	}
	for name, t := range p.targets {
		if !keep[name] {
			p.drop(t)
			changed++
		}
	}
	return changed, errors.Join(errs...)
}

func (p *Prober) check(w Target, twice bool) error {
	switch {
	case twice:
		return fmt.Errorf("probe %s: two targets have this name", w.Name)
	case !w.Address.IsValid() || w.Address != w.Address.Unmap():
		return fmt.Errorf("probe %s: %s is not an IPv4 or IPv6 address", w.Name, w.Address)
	case w.Source.IsValid() && w.Source.Is4() != w.Address.Is4():
		return fmt.Errorf("probe %s: source %s and target %s are of different families", w.Name, w.Source, w.Address)
	case w.Address.Is6() && w.Source.IsValid() && w.Link != "":
		return fmt.Errorf("probe %s: source or link, not both for IPv6: give link %s the address %s", w.Name, w.Link, w.Source)
	case w.Address.Is4() && p.v4 == nil:
		return fmt.Errorf("probe %s: %w", w.Name, p.err4)
	case w.Address.Is6() && p.v6 == nil:
		return fmt.Errorf("probe %s: %w", w.Name, p.err6)
	}
	return nil
}

// add puts a target into the slot with the fewest.
func (p *Prober) add(w Target) {
	t := &target{status: Status{Target: w}}
	for i := range p.slots {
		if len(p.slots[i]) < len(p.slots[t.slot]) {
			t.slot = i
		}
	}
	p.slots[t.slot] = append(p.slots[t.slot], t)
	p.targets[w.Name] = t
}

func (p *Prober) drop(t *target) {
	delete(p.targets, t.status.Target.Name)
	p.slots[t.slot] = slices.DeleteFunc(p.slots[t.slot], func(x *target) bool { return x == t })
}

// Observe lists what is known about all targets, by name.
func (p *Prober) Observe() []Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]Status, 0, len(p.targets))
	for _, t := range p.targets {
		out = append(out, t.status)
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.Target.Name, b.Target.Name) })
	return out
}

// Close releases the sockets of a Prober that does not run.
func (p *Prober) Close() error { return errors.Join(p.v4.close(), p.v6.close()) }

// Run probes until ctx ends and releases the sockets; it returns ctx's error. It runs
// once.
func (p *Prober) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, s := range []*socket{p.v4, p.v6} {
		if s != nil {
			wg.Go(func() { s.receive(p.token, p.answer) })
		}
	}
	done := make(chan struct{})
	wg.Go(func() { p.tell(done) })
	tick := time.NewTicker(p.options.Interval / slots)
	defer tick.Stop()
	slot, begin := 0, time.Now()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			// The ticker drops ticks when this process is late: catch up by the clock, at most
			// one interval.
			due := int(time.Since(begin) / (p.options.Interval / slots))
			slot = max(slot, due-slots)
			for ; slot < due; slot++ {
				p.send(slot % slots)
			}
		}
	}
	close(done)
	err := p.Close()
	wg.Wait()
	return errors.Join(ctx.Err(), err)
}

// send judges and probes the targets of one slot.
func (p *Prober) send(slot int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.slots[slot] {
		if t.count-t.last >= uint64(p.options.Losses) && t.status.Health != Down {
			p.become(t, Down)
		}
		p.probe(t)
	}
}

// patience is how late an answer may come.
func (p *Prober) patience() time.Duration {
	return p.options.Interval * time.Duration(p.options.Losses)
}

// probe sends one probe. A probe that cannot be sent is one without an answer.
func (p *Prober) probe(t *target) {
	t.count++
	t.status.Sent++
	number := p.next
	p.next++
	body := binary.BigEndian.AppendUint64(slices.Clone(p.token[:]), number)
	s := p.v4
	if t.status.Target.Address.Is6() {
		s = p.v6
	}
	now := time.Now()
	p.pending[number] = probe{target: t, count: t.count, sent: now}
	t.status.Err = s.send(t.status.Target, uint16(number), body)
	if number%1024 == 0 {
		for n, q := range p.pending {
			if now.Sub(q.sent) > p.patience() {
				delete(p.pending, n)
			}
		}
	}
}

// answer takes an answer that came from an address.
func (p *Prober) answer(from netip.Addr, number uint64, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	q, ok := p.pending[number]
	if !ok || q.target.status.Target.Address != from {
		return
	}
	delete(p.pending, number)
	t, s := q.target, &q.target.status
	rtt := at.Sub(q.sent)
	if rtt > p.patience() || p.targets[s.Target.Name] != t {
		return
	}
	s.Received++
	s.RTT, s.Answered = rtt, at
	if q.count > t.last { // else it was overtaken by a later one
		if q.count > t.last+1 {
			t.answers = 0
		}
		t.last = q.count
		t.answers++
	}
	if s.Health == Unknown || s.Health == Down && t.answers >= p.options.Answers {
		p.become(t, Up)
	}
}

// become changes a target's health and has it told.
func (p *Prober) become(t *target, h Health) {
	t.status.Health, t.status.Since, t.answers = h, time.Now(), 0
	p.queue = append(p.queue, t.status)
	select {
	case p.queued <- struct{}{}:
	default:
	}
}

// tell calls Options.Changed until done is closed, without mu, since that may take its
// time.
func (p *Prober) tell(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-p.queued:
		}
		p.mu.Lock()
		queue := p.queue
		p.queue = nil
		p.mu.Unlock()
		if p.options.Changed == nil {
			continue
		}
		for _, s := range queue {
			p.options.Changed(s)
		}
	}
}
