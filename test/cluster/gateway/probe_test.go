package gateway_test

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// probe sends numbered datagrams to the echo of a test server, and notes which came back.
type probe struct {
	t    testing.TB
	what string
	conn *net.UDPConn
	stop chan struct{}
	done sync.WaitGroup

	mu   sync.Mutex
	sent []time.Time
	back []time.Time // by number; zero: not yet
}

// watch sends every interval from an address of a host, until outcome.
func watch(t testing.TB, h *lab.Host, source, to string, every time.Duration) *probe {
	t.Helper()
	p := &probe{t: t, what: source + " → " + to, stop: make(chan struct{})}
	local := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(source), 0))
	remote := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))
	err := h.Do(func() (err error) {
		p.conn, err = net.DialUDP("udp", local, remote)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p.done.Go(func() { p.receive() })
	p.done.Go(func() { p.send(every) })
	t.Cleanup(p.end)
	return p
}

func (p *probe) send(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-p.stop:
			return
		case now := <-tick.C:
			p.mu.Lock()
			n := len(p.sent)
			p.sent, p.back = append(p.sent, now), append(p.back, time.Time{})
			p.mu.Unlock()
			_, _ = fmt.Fprintf(p.conn, "#%d#", n)
		}
	}
}

func (p *probe) receive() {
	b := make([]byte, 2048)
	for {
		n, err := p.conn.Read(b)
		if err != nil {
			if strings.Contains(err.Error(), "use of closed") {
				return
			}
			continue // an ICMP error of one packet
		}
		parts := strings.Split(string(b[:n]), "#")
		if len(parts) < 3 {
			continue
		}
		number, err := strconv.Atoi(parts[len(parts)-2])
		p.mu.Lock()
		if err == nil && number < len(p.back) && p.back[number].IsZero() {
			p.back[number] = time.Now()
		}
		p.mu.Unlock()
	}
}

func (p *probe) end() {
	select {
	case <-p.stop:
		return
	default:
	}
	close(p.stop)
	time.Sleep(300 * time.Millisecond) // what is under way
	_ = p.conn.Close()
	p.done.Wait()
}

// outcome ends the probe and counts.
func (p *probe) outcome() (sent, lost int) {
	p.end()
	for i := range p.sent {
		if p.back[i].IsZero() {
			lost++
		}
	}
	return len(p.sent), lost
}

// unharmed ends the probe; a lost packet is an error.
func (p *probe) unharmed() {
	p.t.Helper()
	sent, lost := p.outcome()
	p.t.Logf("%s: %d of %d lost", p.what, lost, sent)
	if lost > 0 || sent < 10 {
		p.t.Errorf("%s: %d of %d lost, want 0", p.what, lost, sent)
	}
}

// awaitBack waits until packets sent after an event come back without a gap for a second,
// and returns when the first of them was sent, counted from the event.
func (p *probe) awaitBack(event time.Time, timeout time.Duration) time.Duration {
	p.t.Helper()
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if at, ok := p.steadySince(event); ok {
			return at.Sub(event)
		}
	}
	p.t.Fatalf("%s: not back within %s", p.what, timeout)
	return 0
}

func (p *probe) steadySince(event time.Time) (time.Time, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var since time.Time
	failed := false
	for i, at := range p.sent {
		switch {
		case at.Before(event):
		case p.back[i].IsZero() && time.Since(at) > 200*time.Millisecond:
			since, failed = time.Time{}, true
		case !p.back[i].IsZero() && since.IsZero():
			since = at
		}
	}
	return since, failed && !since.IsZero() && time.Since(since) > time.Second
}
