package clustertest

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
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// Probe sends numbered datagrams to the echo of a test server, and notes which came back.
type Probe struct {
	t    testing.TB
	what string
	conn *net.UDPConn
	stop chan struct{}
	done sync.WaitGroup

	mu   sync.Mutex
	sent []time.Time
	back []time.Time // by number; zero: not yet
}

// Watch sends from an address of a host at a steady interval, until Outcome, Unharmed or the
// test's end.
func Watch(t testing.TB, h *lab.Host, source, to string, every time.Duration) *Probe {
	t.Helper()
	p := &Probe{t: t, what: source + " → " + to, stop: make(chan struct{})}
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

func (p *Probe) send(every time.Duration) {
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

func (p *Probe) receive() {
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

func (p *Probe) end() {
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

// Outcome ends the probe and counts; gap is the longest time between two packets, one after
// the other, that were answered.
func (p *Probe) Outcome() (sent, lost int, gap time.Duration) {
	p.end()
	if len(p.sent) == 0 {
		return 0, 0, 0
	}
	last := p.sent[0]
	for i := range p.sent {
		if p.back[i].IsZero() {
			lost++
			continue
		}
		gap, last = max(gap, p.sent[i].Sub(last)), p.sent[i]
	}
	return len(p.sent), lost, max(gap, p.sent[len(p.sent)-1].Sub(last))
}

// Unharmed ends the probe; a lost packet is an error.
func (p *Probe) Unharmed() {
	p.t.Helper()
	sent, lost, _ := p.Outcome()
	p.t.Logf("%s: %d of %d lost", p.what, lost, sent)
	if lost > 0 || sent < 10 {
		p.t.Errorf("%s: %d of %d lost, want 0", p.what, lost, sent)
	}
}

// AwaitBack waits until packets sent after an event come back without a gap for a second,
// and returns when the first of them was sent, counted from the event.
func (p *Probe) AwaitBack(event time.Time, timeout time.Duration) time.Duration {
	p.t.Helper()
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if at, ok := p.steadySince(event); ok {
			return at.Sub(event)
		}
	}
	p.t.Fatalf("%s: not back within %s", p.what, timeout)
	return 0
}

// Recovered waits until all packets of two seconds have come back, ends the probe, and returns
// when the first packet was sent that came back after the last that was lost, counted from an
// event; 0 when none was lost since.
func (p *Probe) Recovered(event time.Time, timeout time.Duration) time.Duration {
	p.t.Helper()
	defer p.end()
	const steady = 2 * time.Second
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if since, last := p.soundSince(event); last.Sub(since) > steady {
			return since.Sub(event)
		}
	}
	p.t.Fatalf("%s: not back within %s", p.what, timeout)
	return 0
}

// soundSince is when the first packet after the last lost one was sent, or the event, and when
// the last was that came back.
func (p *Probe) soundSince(event time.Time) (since, last time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	since = event
	lost := false
	for i, at := range p.sent {
		switch {
		case at.Before(event):
		case !p.back[i].IsZero():
			if last = at; lost {
				since, lost = at, false
			}
		case time.Since(at) > 300*time.Millisecond:
			lost = true
		}
	}
	if lost {
		last = since
	}
	return since, last
}

// AwaitAny waits until the first packet comes back, and ends the probe.
func (p *Probe) AwaitAny(timeout time.Duration) {
	p.t.Helper()
	defer p.end()
	labtest.Eventually(p.t, timeout, p.what, func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i := range p.back {
			if !p.back[i].IsZero() {
				return nil
			}
		}
		return fmt.Errorf("nothing of %d datagrams came back", len(p.sent))
	})
}

// AwaitSteady waits until all packets of so long have come back.
func (p *Probe) AwaitSteady(long, timeout time.Duration) {
	p.t.Helper()
	labtest.Eventually(p.t, timeout, p.what+" is steady", func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i := len(p.sent) - 1; i >= 0; i-- {
			age := time.Since(p.sent[i])
			switch {
			case age > long && !p.back[i].IsZero():
				return nil
			case age > 200*time.Millisecond && p.back[i].IsZero():
				return fmt.Errorf("a packet sent %s ago did not come back", age.Round(time.Millisecond))
			}
		}
		return fmt.Errorf("%d packets were sent only", len(p.sent))
	})
}

func (p *Probe) steadySince(event time.Time) (time.Time, bool) {
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
