package reverse

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/dial"
	"github.com/culvert-vpn/culvert/internal/reverse/front"
	"github.com/culvert-vpn/culvert/internal/reverse/hub"
	"github.com/culvert-vpn/culvert/internal/reverse/spoke"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// frontProcess is a front that can be killed and started again at its address.
type frontProcess struct {
	t     *testing.T
	at    string
	index byte
	front *front.Front
	done  chan struct{}
}

func (f *frontProcess) start(table front.Table) {
	f.t.Helper()
	l, err := net.Listen("tcp", f.at)
	if err != nil {
		f.t.Fatal(err)
	}
	f.at = l.Addr().String()
	f.front = front.New(front.Options{})
	if _, err := f.front.Set(context.Background(), table); err != nil {
		f.t.Fatal(err)
	}
	done := make(chan struct{})
	f.done = done
	go func(x *front.Front) {
		_ = x.Serve(context.Background(), l.(*net.TCPListener))
		close(done)
	}(f.front)
}

// dial is toLoopback, from an address that tells behind which front a spoke is.
func (f *frontProcess) dial(ctx context.Context, network, address string) (net.Conn, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, f.index)}}
	return d.DialContext(ctx, network, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), ap.Port()).String())
}

// kill cuts everything, without a word.
func (f *frontProcess) kill() {
	_ = f.front.Close()
	<-f.done
}

// fleet is many spokes of one hub, each behind one of some fronts.
type fleet struct {
	*tenant
	fronts []*frontProcess
	table  front.Table
}

// newFleet has so many spokes at the first front, at the second, and so on.
func newFleet(t *testing.T, spokes ...int) *fleet {
	t.Helper()
	x := &fleet{tenant: newTenant(t, "u1")}
	x.startHubs(1)
	hubAt := x.hubs[0].spokes.Addr().String()
	x.table = front.Table{Routes: []front.Route{{ServerName: wire.HubServerName("u1", 0, ""), Tenant: "u1", Backends: []front.Backend{{Address: hubAt}}}}}
	all := 0
	for i, count := range spokes {
		f := &frontProcess{t: t, at: "127.0.0.1:0", index: byte(10 + i)}
		f.start(x.table)
		t.Cleanup(f.kill)
		x.fronts = append(x.fronts, f)
		for range count {
			x.join(fmt.Sprintf("spoke-%d", all), f)
			all++
		}
	}
	x.await(all, 30*time.Second)
	return x
}

// join starts a spoke that dials through a front.
func (x *fleet) join(name string, by *frontProcess) {
	x.t.Helper()
	c := &conns{}
	links := x.links(x.holder(pki.Spoke, name), wire.ALPNSpoke, name, c)
	links.Most = 2
	links.Dialer.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, by.at)
		if err != nil {
			return nil, err
		}
		return c.add(conn), nil
	}
	s := spoke.New(spoke.Options{Links: links, Hubs: x.settings().Hubs, Logger: x.logger(), Dialer: dial.Dialer{Dial: by.dial, Lookup: lookup}})
	s.SetPolicy(&x.policy)
	x.start(s.Run, c)
}

// await waits until so many spokes have both their connections, and says how long it took.
func (x *fleet) await(spokes int, timeout time.Duration) time.Duration {
	x.t.Helper()
	begin := time.Now()
	for {
		whole := 0
		for _, p := range x.hubs[0].Peers() {
			if p.Role == pki.Spoke && p.Connections >= 2 {
				whole++
			}
		}
		if whole == spokes {
			return time.Since(begin)
		}
		if time.Since(begin) > timeout {
			x.t.Fatalf("%d of %d spokes are back after %s", whole, spokes, timeout)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// size is how many spokes a test has: a thousand where goals are to be shown.
func size() int {
	if os.Getenv("CULVERT_GOALS") != "" {
		return 1000
	}
	return 100
}

// A front is killed and restarted: its spokes are back within 10 s, and streams through the
// other front notice nothing (FAULTS 20).
func TestFrontRestarted(t *testing.T) {
	n := size()
	const part = 4 // of as many are at the front that is left alone
	x := newFleet(t, n, n/part)
	e := x.startEgress()
	to := serve(t, func(c *net.TCPConn) { // says behind which front the spoke is
		_, _ = c.Write([]byte{c.RemoteAddr().(*net.TCPAddr).IP.To4()[3]})
		echo(c)
	})
	quit := make(chan struct{})
	var flows sync.WaitGroup
	var unfinished, cut [256]atomic.Int32
	for range 40 {
		c, err := e.connect(to)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 8)
		if _, err := io.ReadFull(c, b[:1]); err != nil {
			t.Fatal(err)
		}
		index := b[0]
		unfinished[index].Add(1)
		flows.Go(func() {
			defer c.Close()
			for {
				select {
				case <-quit:
					unfinished[index].Add(-1)
					return
				case <-time.After(10 * time.Millisecond):
				}
				_ = c.SetDeadline(time.Now().Add(15 * time.Second))
				_, err := c.Write(b)
				if err == nil {
					_, err = io.ReadFull(c, b)
				}
				if err != nil {
					cut[index].Add(1)
					return
				}
			}
		})
	}
	dead, alive := x.fronts[0].index, x.fronts[1].index
	through := [2]int32{unfinished[dead].Load(), unfinished[alive].Load()}
	x.fronts[0].kill()
	time.Sleep(time.Second)
	x.fronts[0].start(x.table)
	took := x.await(n+n/part, 10*time.Second)
	close(quit)
	flows.Wait()
	t.Logf("%d spokes back %s after the front's restart; of %d and %d streams through it and the other one %d and %d were cut",
		n, took.Round(time.Millisecond), through[0], through[1], cut[dead].Load(), cut[alive].Load())
	if through[0] == 0 || through[1] == 0 {
		t.Errorf("%v streams: some through each front were to be expected", through)
	}
	if cut[alive].Load() > 0 || unfinished[alive].Load() > 0 {
		t.Errorf("%d streams through the front that was left alone were cut", cut[alive].Load())
	}
	if cut[dead].Load() != through[0] {
		t.Errorf("%d of %d streams through the killed front were cut", cut[dead].Load(), through[0])
	}
}

// All spokes lose their hub at once and come back when it does: none is forgotten, not all in
// the same instant, and nothing is left of the connections that were lost.
func TestSpokesComeBackAtOnce(t *testing.T) {
	n := size()
	x := newFleet(t, n)
	before := used()
	old := x.hubs[0]
	old.kill()
	time.Sleep(3 * time.Second) // by now they try at their slowest

	fresh := &hubProcess{holder: old.holder, conns: &conns{}}
	fresh.Hub = hub.New(hub.Options{Holder: fresh.holder, Logger: x.logger(), Dial: toLoopback})
	arrivals := &arrivals{Listener: listenAgain(t, fresh.conns, old.spokes.Addr().String())}
	fresh.spokes, fresh.clients = arrivals, listenAgain(t, fresh.conns, old.clients.Addr().String())
	x.hubs[0] = fresh
	fresh.Set(x.settings())
	x.run(fresh)
	took := x.await(n, 20*time.Second)
	after := used()
	most := arrivals.busiest(100 * time.Millisecond)
	t.Logf("%d spokes, %d connections: all back after %s, at most %d within 100 ms; memory of all parts %.1f → %.1f MB, goroutines %d → %d",
		n, arrivals.count(), took.Round(time.Millisecond), most, float64(before.heap)/1e6, float64(after.heap)/1e6, before.goroutines, after.goroutines)
	if took > 10*time.Second {
		t.Errorf("back after %s, want at most 10 s", took)
	}
	if most > arrivals.count()*3/4 {
		t.Errorf("%d of %d connections came within 100 ms: nothing spreads them", most, arrivals.count())
	}
	if after.goroutines > before.goroutines*5/4+50 || after.heap > before.heap*3/2+(8<<20) {
		t.Errorf("something is left of what was lost: %+v, then %+v", before, after)
	}
	// And they carry.
	e := x.startEgress()
	c, err := e.connect(serve(t, echo))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

func listenAgain(t *testing.T, c *conns, at string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	c.ls = append(c.ls, l)
	return cutListener{l, c}
}

// usage is what the process takes: all parts are in it.
type usage struct {
	heap       uint64
	goroutines int
}

func used() usage {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{m.HeapAlloc, runtime.NumGoroutine()}
}

// arrivals notes when connections come.
type arrivals struct {
	net.Listener
	mu sync.Mutex
	at []time.Time
}

// Accept implements net.Listener.
func (a *arrivals) Accept() (net.Conn, error) {
	c, err := a.Listener.Accept()
	if err == nil {
		a.mu.Lock()
		a.at = append(a.at, time.Now())
		a.mu.Unlock()
	}
	return c, err
}

func (a *arrivals) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.at)
}

// busiest is how many came within the window that had most.
func (a *arrivals) busiest(window time.Duration) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	most, from := 0, 0
	for i := range a.at {
		for a.at[i].Sub(a.at[from]) > window {
			from++
		}
		most = max(most, i-from+1)
	}
	return most
}
