package reverse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// hammer opens connections all the time and counts what fails from a second after the
// fault on. It returns how many failed in the second before that.
func hammer(t *testing.T, e *egressProcess, to string, fault func()) (inFirstSecond int64) {
	t.Helper()
	var since atomic.Int64 // of the fault, nanoseconds
	var early, late, good atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				began := time.Now().UnixNano()
				c, err := e.connect(to)
				if err == nil {
					_, err = c.Write([]byte("x"))
					if err == nil {
						_, err = io.ReadFull(c, make([]byte, 1))
					}
					_ = c.Close()
				}
				f := since.Load()
				switch {
				case err == nil:
					good.Add(1)
				case f != 0 && began > f+int64(time.Second):
					late.Add(1)
					t.Errorf("%s after the fault: %v", time.Duration(began-f), err)
				case f == 0:
					t.Errorf("before the fault: %v", err)
				default:
					early.Add(1)
				}
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	since.Store(time.Now().UnixNano())
	fault()
	time.Sleep(4 * time.Second)
	cancel()
	wg.Wait()
	t.Logf("%d good; failed in the first second: %d, after it: %d", good.Load(), early.Load(), late.Load())
	if good.Load() < 100 {
		t.Errorf("only %d connections", good.Load())
	}
	return early.Load()
}

func TestHubKilled(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(2)
	n.startSpoke("a")
	n.startSpoke("b")
	e := n.startEgress()
	hammer(t, e, serve(t, echo), n.hubs[0].kill)
}

func TestSpokeKilled(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(2)
	a := n.startSpoke("a")
	n.startSpoke("b")
	e := n.startEgress()
	hammer(t, e, serve(t, echo), a.kill)
}

// Both spokes and the egress renew their certificates in the same moment: all connections
// are made anew, no new stream fails, and those that are open go on.
func TestAllRenewAtOnce(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(2)
	a, b := n.startSpoke("a"), n.startSpoke("b")
	e := n.startEgress()
	to := serve(t, echo)
	open, err := e.connect(to)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	began := time.Now()
	failed := hammer(t, e, to, func() {
		until := time.Now().Add(time.Minute)
		a.Renew(until)
		b.Renew(until)
		e.Renew(until)
	})
	if failed > 0 {
		t.Errorf("%d new streams failed", failed)
	}
	exchange(t, open)
	n.eventually("all connections are new", func() error {
		for i, h := range n.hubs {
			for _, p := range h.Peers() {
				if p.Since.Before(began) || p.Connections < 2 {
					return fmt.Errorf("hub %d: %+v", i, p)
				}
			}
		}
		return nil
	})
}

// A spoke whose network dies without a word is worked around at once, and found out within
// 8 s.
func TestSpokeFallsSilent(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(2)
	n.delay = &delay{}
	n.startSpoke("a")
	path := n.delay
	n.delay = nil
	n.startSpoke("b")
	e := n.startEgress()
	hammer(t, e, serve(t, echo), func() { path.frozen.Store(true) })
	began := time.Now()
	for {
		if !strings.Contains(fmt.Sprint(n.hubs[0].Peers()), "{spoke a ") {
			break
		}
		if time.Since(began) > 5*time.Second { // 4 s have passed already
			t.Fatalf("the silent spoke is still taken for connected after 9 s: %v", n.hubs[0].Peers())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// A hub that stops in good order breaks no stream and fails no new connection.
func TestHubDrains(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(2)
	n.startSpoke("a")
	e := n.startEgress()
	to := serve(t, echo)
	var open []net.Conn
	for range 8 {
		c, err := e.connect(to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	done := make(chan struct{})
	hammer(t, e, to, func() {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			n.hubs[0].GoAway(ctx)
			close(done)
		}()
	})
	for i, c := range open {
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		_ = c.Close()
	}
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("the hub still waits though nothing is open")
	}
}

// A hub whose time to drain is over cuts what is still open.
func TestHubDrainsInTime(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	e := n.startEgress()
	st, _, refusal := e.Open(t.Context(), serve(t, echo))
	if refusal != nil {
		t.Fatal(refusal)
	}
	defer st.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	n.hubs[0].GoAway(ctx)
	_ = st.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, err := st.Read(make([]byte, 1))
	if cause := mux.Cause(err); err == nil || cause.Reason != wire.ReasonLost {
		t.Errorf("%v: %+v", err, cause)
	}
}

// A dial that is under way when its only spoke dies fails within a second.
func TestSpokeKilledInTheMiddleOfADial(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	s := n.startSpoke("a")
	e := n.startEgress()
	failed := make(chan error, 1)
	go func() {
		_, err := e.connect(blackhole + ":80")
		failed <- err
	}()
	time.Sleep(200 * time.Millisecond)
	s.kill()
	select {
	case err := <-failed:
		if err == nil || !strings.HasPrefix(err.Error(), "502 ") && !strings.HasPrefix(err.Error(), "503 no spoke") {
			t.Errorf("%v", err)
		}
	case <-time.After(time.Second):
		t.Error("still pending after 1 s")
	}
	// The next one succeeds on another spoke.
	n.startSpoke("b")
	c, err := e.connect(serve(t, echo))
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, c)
}

// A dial that is under way when its spoke dies goes to another one, if there is one, and the
// client does not notice.
func TestDialGoesToAnotherSpoke(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	a := n.startSpoke("a")
	e := n.startEgress()
	to := net.JoinHostPort(blackholeOnce, port(serve(t, echo)))
	dialledOnce.Store(false)
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		c, err := e.connect(to)
		done <- result{c, err}
	}()
	n.eventually("the first spoke dials", func() error {
		if !dialledOnce.Load() {
			return errors.New("not yet")
		}
		return nil
	})
	n.startSpoke("b")
	a.kill()
	select {
	case r := <-done:
		if r.err != nil {
			t.Fatal(r.err)
		}
		exchange(t, r.conn)
	case <-time.After(time.Second):
		t.Error("still pending 1 s after its spoke died")
	}
}

// 200 connections to a black hole: the others notice nothing, and those fail within 10 s, which is
// when kube-apiserver would give up without a reason.
func TestBlackHole(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	e := n.startEgress()
	to := serve(t, echo)
	began := time.Now()
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			_, err := e.connect(blackhole + ":80")
			if took := time.Since(began); err == nil || !strings.HasPrefix(err.Error(), "504 ") || took > 10*time.Second {
				t.Errorf("after %s: %v", took, err)
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	var worst time.Duration
	for time.Since(began) < 5*time.Second {
		b := time.Now()
		c, err := e.connect(to)
		if err != nil {
			t.Fatal(err)
		}
		worst = max(worst, time.Since(b))
		_ = c.Close()
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("worst of the others: %s", worst)
	if worst > 500*time.Millisecond {
		t.Errorf("another connection took %s", worst)
	}
	wg.Wait()
}

// 1,000 connections opened and closed leave no descriptor and no goroutine behind.
func TestNothingIsLeft(t *testing.T) {
	n := newTenant(t, "u1")
	n.most = 2
	n.startHubs(2)
	n.startSpoke("a")
	e := n.startEgress()
	to := serve(t, echo)
	cycle := func(count int) {
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				for range count / 10 {
					c, err := e.connect(to)
					if err != nil {
						t.Error(err)
						return
					}
					_, _ = c.Write([]byte("x"))
					_, _ = io.ReadFull(c, make([]byte, 1))
					_ = c.Close()
				}
			})
		}
		wg.Wait()
	}
	cycle(100)
	fds, goroutines := settled(t)
	cycle(1000)
	n.eventually("everything is given back", func() error {
		f, g := settled(t)
		if f > fds+fds/20+2 || g > goroutines+goroutines/20+2 {
			return fmt.Errorf("descriptors %d, before %d; goroutines %d, before %d", f, fds, g, goroutines)
		}
		return nil
	})
}

func settled(t *testing.T) (fds, goroutines int) {
	t.Helper()
	time.Sleep(300 * time.Millisecond)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries), runtime.NumGoroutine()
}
