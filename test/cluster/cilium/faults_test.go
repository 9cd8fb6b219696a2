package cilium_test

import (
	"context"
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

// probe sends ten numbered datagrams a second to an echo server, and notes when each came back.
type probe struct {
	what string
	conn *net.UDPConn
	stop chan struct{}
	done sync.WaitGroup

	mu   sync.Mutex
	sent []time.Time
	back map[int]time.Time
}

func startProbe(t *testing.T, h *lab.Host, source, target string) *probe {
	t.Helper()
	p := &probe{what: source + " → " + target, stop: make(chan struct{}), back: map[int]time.Time{}}
	err := h.Do(func() (err error) {
		p.conn, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(source), 0)),
			net.UDPAddrFromAddrPort(netip.MustParseAddrPort(target)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p.done.Go(p.send)
	p.done.Go(p.receive)
	t.Cleanup(func() { end(p) })
	return p
}

func (p *probe) send() {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.stop:
			return
		case now := <-tick.C:
			p.mu.Lock()
			n := len(p.sent)
			p.sent = append(p.sent, now)
			p.mu.Unlock()
			_, _ = fmt.Fprintf(p.conn, "#%d#", n)
		}
	}
}

func (p *probe) receive() {
	b := make([]byte, 2048)
	for {
		n, err := p.conn.Read(b)
		switch {
		case err == nil:
		case strings.Contains(err.Error(), "use of closed"):
			return
		default:
			continue // an ICMP error of one packet
		}
		parts := strings.Split(string(b[:n]), "#")
		if len(parts) < 3 {
			continue
		}
		if number, err := strconv.Atoi(parts[len(parts)-2]); err == nil {
			p.mu.Lock()
			p.back[number] = time.Now()
			p.mu.Unlock()
		}
	}
}

// end ends probes, all at once.
func end(probes ...*probe) {
	running := false
	for _, p := range probes {
		select {
		case <-p.stop:
		default:
			close(p.stop)
			running = true
		}
	}
	if running {
		time.Sleep(time.Second) // what is under way
	}
	for _, p := range probes {
		_ = p.conn.Close()
		p.done.Wait()
	}
}

// outcome ends the probe: how many were sent and lost, and the longest time between two
// that came back.
func (p *probe) outcome() (sent, lost int, gap time.Duration) {
	end(p)
	var last time.Time
	for i, at := range p.sent {
		if _, ok := p.back[i]; !ok {
			lost++
			continue
		}
		if !last.IsZero() {
			gap = max(gap, at.Sub(last))
		}
		last = at
	}
	if n := len(p.sent); n > 0 && !last.IsZero() {
		gap = max(gap, p.sent[n-1].Sub(last)) // still away
	}
	return len(p.sent), lost, gap
}

// probes watch both far sides' ways to the pods of both nodes.
func (w *world) probes(t *testing.T) []*probe {
	var out []*probe
	for _, n := range w.Nodes {
		echo := w.pods[n.Name][0] + ":8081"
		out = append(out, startProbe(t, w.site.Host, siteHost, echo), startProbe(t, w.device.Host, deviceIP, echo))
	}
	return out
}

func unharmed(t *testing.T, probes []*probe) {
	t.Helper()
	end(probes...)
	for _, p := range probes {
		sent, lost, _ := p.outcome()
		t.Logf("%s: %d of %d lost", p.what, lost, sent)
		if lost > 0 || sent < 20 {
			t.Errorf("%s: %d of %d lost, want 0", p.what, lost, sent)
		}
	}
}

// agentsRestart: Cilium's agents are killed, one after the other, and come back; nothing is lost. In
// place of kube-proxy nobody answers load balancers' health checks meanwhile: theirs has patience.
func (w *world) agentsRestart(t *testing.T) {
	probes := w.probes(t)
	time.Sleep(time.Second)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	for _, n := range w.Nodes {
		if err := n.RestartCilium(ctx); err != nil {
			t.Error(err)
		}
	}
	time.Sleep(2 * time.Second)
	unharmed(t, probes)
}

// relabelled: the gateway's pod and those that it leads to get new labels, and so other
// identities; nothing is lost.
func (w *world) relabelled(t *testing.T) {
	probes := w.probes(t)
	time.Sleep(time.Second)
	for _, value := range []string{"one", "two"} {
		w.Kubectl("-n", "vpn", "label", "pod", "culvert-hq-0", "test="+value, "--overwrite")
		w.Kubectl("-n", "apps", "label", "pod", "--all", "test="+value, "--overwrite")
		time.Sleep(4 * time.Second)
	}
	unharmed(t, probes)
}

// moved: the gateway's pod goes to the other node; all is back within ten seconds. What a neighbour
// on the machine has spoilt is tried again.
func (w *world) moved(t *testing.T) {
	const limit = 10 * time.Second
	best := time.Hour
	for range 3 {
		if best = min(best, w.move(t)); best <= limit {
			return
		}
	}
	t.Errorf("%s without an answer at best, want %s at most", best.Round(100*time.Millisecond), limit)
}

// move has the gateway's pod go to the other node, and returns the longest time that one of the probes
// had no answer.
func (w *world) move(t *testing.T) (longest time.Duration) {
	from := w.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.spec.nodeName}")
	w.Kubectl("cordon", from)
	defer w.Kubectl("uncordon", from)
	probes := w.probes(t)
	time.Sleep(time.Second)
	w.Kubectl("-n", "vpn", "delete", "pod", "culvert-hq-0", "--wait=false")
	works(t, 60*time.Second, w.flows())
	end(probes...)
	for _, p := range probes {
		sent, lost, gap := p.outcome()
		t.Logf("%s: %d of %d lost, %s without an answer", p.what, lost, sent, gap.Round(100*time.Millisecond))
		longest = max(longest, gap)
		if lost == sent {
			t.Errorf("%s: none of %d answered", p.what, sent)
		}
	}
	if now := w.Kubectl("-n", "vpn", "get", "pod", "culvert-hq-0", "-o", "jsonpath={.spec.nodeName}"); now == from {
		t.Errorf("the gateway is on %s as before", now)
	}
	return longest
}
