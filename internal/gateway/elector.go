package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/internal/store"
)

// leases is where the gateway's Lease is.
type leases interface {
	Lease(context.Context) (store.Lease, error)
	SaveLease(context.Context, types.UID, store.Lease, time.Duration) (store.Lease, error)
}

// elector runs an election: it reads and writes the Lease culvert-NAME, greets the other
// pods while it holds it, and answers them.
type elector struct {
	leases  leases
	pod     string
	log     *slog.Logger
	greeter *http.Client
	port    string // that the other pods serve HTTP on
	// vouch says until when an IKE daemon that outlives this process may hold SAs; zero:
	// always. Nil: there is none.
	vouch   func(until time.Time) error
	changed chan struct{}
	nudge   chan struct{}

	mu       sync.Mutex // guards what follows
	election *election
	owner    types.UID // of the VPNGateway; empty: not known yet
	others   map[string][]netip.Addr
	taking   bool   // the Lease of another is being written
	trouble  string // with the Lease, as logged
	was      bool   // active, as announced
}

// How long one word may take.
const (
	leaseTimeout = time.Second
	helloTimeout = 400 * time.Millisecond
	helloPath    = "/v1/hello"
	tick         = 50 * time.Millisecond
)

// newElector is for a pod of which others of the gateway serve HTTP on a port, too.
func newElector(pod, port string, l leases, log *slog.Logger) *elector {
	return &elector{
		leases: l, pod: pod, log: log, port: port,
		greeter: &http.Client{Timeout: helloTimeout, Transport: &http.Transport{MaxIdleConnsPerHost: 1, DialContext: (&net.Dialer{Timeout: helloTimeout}).DialContext}},
		changed: make(chan struct{}, 1), nudge: make(chan struct{}, 1),
		election: newElection(pod), others: map[string][]netip.Addr{},
	}
}

// among says what the VPNGateway is, how many pods it is to have, and where the others are.
func (e *elector) among(owner types.UID, replicas int, others map[string][]netip.Addr) {
	e.mu.Lock()
	defer e.mu.Unlock()
	names := make([]string, 0, len(others))
	for name, addrs := range others {
		names = append(names, name)
		if fmt.Sprint(e.others[name]) != fmt.Sprint(addrs) { // another pod of that name
			delete(e.election.others, name)
		}
	}
	first := e.owner == ""
	was := *e.election
	e.election.among(replicas, names, time.Now())
	if e.election.alone != was.alone || e.election.surplus != was.surplus || first {
		wake(e.nudge)
	}
	e.owner, e.others = owner, others
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// active reports whether this pod is to work; known is false until that is decided.
func (e *elector) active() (active, known bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.election.active(time.Now()), e.election.known
}

// contested reports whether another pod would go on with what this one leaves.
func (e *elector) contested() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.election.alone && e.election.contested(time.Now())
}

// run takes part until ctx ends. changed is told when this pod is to work, or no more.
func (e *elector) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { e.keep(ctx) })
	wg.Go(func() { e.greet(ctx) })
	wg.Go(func() { e.announce(ctx) })
	wg.Wait()
	e.greeter.CloseIdleConnections()
}

// How often, and for how long, a pod that works vouches for its IKE daemon. When it dies
// without a word, the daemon has stopped before another pod takes over.
const (
	vouchEvery = 200 * time.Millisecond
	vouchFor   = time.Second
)

// stoodDown says that there is nothing to vouch for.
func (e *elector) stoodDown() {
	if e.vouch != nil {
		e.troubled(e.vouch(time.Time{}))
	}
}

func (e *elector) troubled(err error) {
	if err != nil {
		e.log.Warn("cannot say whether this pod works", "error", err)
	}
}

// announce tells what time alone has changed, too.
func (e *elector) announce(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	decided, alone := false, false
	var vouched time.Time
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return
		case now = <-t.C:
		}
		active, known := e.active()
		e.mu.Lock()
		news := active != e.was || known && !decided
		e.was, decided = active, known
		several := !e.election.alone
		e.mu.Unlock()
		switch {
		case known && !several && !alone:
			e.stoodDown() // there is nobody who could take its place
		case active && several && e.vouch != nil && now.Sub(vouched) > vouchEvery:
			vouched = now
			e.troubled(e.vouch(now.Add(vouchFor)))
		}
		alone = known && !several
		if news {
			if several {
				e.log.Info("the gateway's pods have elected", "this pod works", active)
			}
			wake(e.changed)
		}
	}
}

// keep reads the Lease while another pod holds it, and writes it while this one does.
func (e *elector) keep(ctx context.Context) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		case <-e.nudge:
		}
		pause.Reset(e.turn(ctx))
	}
}

// idle is how often a pod looks around that nobody competes with.
const idle = time.Minute

// turn does what is due, and says after what time something is due again.
func (e *elector) turn(ctx context.Context) time.Duration {
	e.mu.Lock()
	owner, known, holds := e.owner, e.election.known, e.election.holds()
	_, ever := e.election.writeIn(time.Now())
	e.mu.Unlock()
	switch {
	case owner == "": // there is nothing to be elected for
		return helloEvery
	case known && !ever:
		return idle
	case !known || !holds:
		err := e.read(ctx)
		if e.note(err); err != nil {
			return helloEvery
		}
	}
	if wait, ever := e.writeIn(); ever && wait <= 0 {
		err := e.write(ctx)
		if e.note(err); err != nil {
			return helloEvery
		}
	}
	wait, ever := e.writeIn()
	if !ever {
		return idle
	}
	return max(min(helloEvery, wait), tick)
}

func (e *elector) writeIn() (time.Duration, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.election.writeIn(time.Now())
}

// note logs once what is wrong with the Lease, and that it is no more.
func (e *elector) note(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	e.mu.Lock()
	was := e.trouble
	e.trouble = text
	e.mu.Unlock()
	switch {
	case text != "" && was == "":
		e.log.Warn("cannot take part in the election", "error", text)
	case text == "" && was != "":
		e.log.Info("takes part in the election again")
	}
}

// read looks at the Lease.
func (e *elector) read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	l, err := e.leases.Lease(ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil && (!e.election.alone || e.election.known) {
		return err
	}
	// Nobody competes with the only pod: an API server that is away must not keep it from
	// working.
	e.election.read(l.Holder, l.Version, time.Now())
	return nil
}

// write makes the Lease this pod's, or keeps it; nobody has written it since it was read.
func (e *elector) write(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	e.mu.Lock()
	to, owner := store.Lease{Holder: e.pod, Version: e.election.version}, e.owner
	e.taking = !e.election.holds()
	e.mu.Unlock()
	began := time.Now()
	l, err := e.leases.SaveLease(ctx, owner, to, takeAfter)
	e.mu.Lock()
	e.taking = false
	if err == nil {
		e.election.wrote(l.Version, began)
	}
	e.mu.Unlock()
	if err == nil {
		return nil
	}
	// Somebody was faster, or it was written and the answer was lost.
	return errors.Join(e.read(ctx), leaseTrouble(err))
}

func leaseTrouble(err error) error {
	if errors.Is(err, store.ErrLeaseChanged) {
		return nil
	}
	return err
}

// release gives up the Lease, so that another pod need not wait. It is for a pod that has
// taken down its tunnels.
func (e *elector) release() error {
	e.mu.Lock()
	holds, to, owner := e.election.holds(), store.Lease{Version: e.election.version}, e.owner
	e.mu.Unlock()
	if !holds || to.Version == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaseTimeout)
	defer cancel()
	_, err := e.leases.SaveLease(ctx, owner, to, takeAfter)
	return err
}

// greet has all other pods know that this one works.
func (e *elector) greet(ctx context.Context) {
	t := time.NewTicker(helloEvery)
	defer t.Stop()
	busy := map[string]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		e.mu.Lock()
		var to map[string][]netip.Addr
		if e.election.active(time.Now()) && !e.election.alone {
			to = e.others
		}
		e.mu.Unlock()
		for pod, addrs := range to {
			mu.Lock()
			skip := busy[pod] || len(addrs) == 0
			busy[pod] = !skip || busy[pod]
			mu.Unlock()
			if skip {
				continue
			}
			wg.Go(func() {
				e.hello(ctx, pod, addrs[0])
				mu.Lock()
				delete(busy, pod)
				mu.Unlock()
			})
		}
	}
}

// hello greets one pod.
func (e *elector) hello(ctx context.Context, pod string, addr netip.Addr) {
	began := time.Now()
	url := "http://" + net.JoinHostPort(addr.String(), e.port) + helloPath + "?pod=" + e.pod
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return
	}
	resp, err := e.greeter.Do(req)
	if err != nil {
		return
	}
	_ = resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusNoContent:
		e.mu.Lock()
		e.election.met(pod, began)
		e.mu.Unlock()
	case http.StatusConflict: // it works itself: see who is right
		e.note(e.read(ctx))
	}
}

// ServeHTTP answers a pod that works: 204 when this one does not, 409 when it does.
func (e *elector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	pod := r.URL.Query().Get("pod")
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	e.mu.Lock()
	defer e.mu.Unlock()
	known := false
	for _, a := range e.others[pod] {
		known = known || err == nil && a == from.Addr().Unmap()
	}
	now := time.Now()
	switch {
	case !known:
		w.WriteHeader(http.StatusForbidden)
	case e.election.active(now), e.taking:
		w.WriteHeader(http.StatusConflict)
	default:
		e.election.heard(pod, now)
		w.WriteHeader(http.StatusNoContent)
	}
}
