package gateway

import (
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/internal/store"
)

// parish is where electors live whose clock is the test's: an API server with one Lease, and
// wires, which can be cut.
type parish struct {
	t *testing.T

	mu      sync.Mutex
	lease   store.Lease
	version int
	deaf    map[string]bool // cannot reach the API server
	cut     map[[2]string]bool
	pods    map[string]*voter
}

// voter is a pod in a parish.
type voter struct {
	*elector
	parish *parish
	ip     netip.Addr
	end    context.CancelFunc
	done   chan struct{}
}

func newParish(t *testing.T) *parish {
	return &parish{t: t, deaf: map[string]bool{}, cut: map[[2]string]bool{}, pods: map[string]*voter{}}
}

// start starts a pod; replicas is what the VPNGateway says.
func (p *parish) start(pod string, replicas int) *voter {
	v := &voter{parish: p, ip: netip.AddrFrom4([4]byte{10, 244, 0, byte(ordinal(pod) + 1)}), done: make(chan struct{})}
	v.elector = newElector(pod, "9586", v, slog.New(slog.DiscardHandler))
	v.greeter = &http.Client{Timeout: helloTimeout, Transport: v}
	p.mu.Lock()
	p.pods[pod] = v
	p.mu.Unlock()
	p.introduce(replicas)
	ctx, cancel := context.WithCancel(context.Background())
	v.end = cancel
	go func() { v.run(ctx); close(v.done) }()
	return v
}

// introduce has all pods know of each other.
func (p *parish) introduce(replicas int) {
	for name, v := range p.pods {
		others := map[string][]netip.Addr{}
		for other, o := range p.pods {
			if other != name {
				others[other] = []netip.Addr{o.ip}
			}
		}
		v.among("uid", replicas, others)
	}
}

// kill ends a pod without a word.
func (p *parish) kill(pod string) {
	v := p.pods[pod]
	v.end()
	<-v.done
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.pods, pod)
}

// end kills all pods.
func (p *parish) end() {
	for pod := range maps.Clone(p.pods) {
		p.kill(pod)
	}
}

func (p *parish) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// reach is nil when a pod reaches the API server; else time passes.
func (v *voter) reach(ctx context.Context) error {
	v.parish.mu.Lock()
	deaf := v.parish.deaf[v.pod]
	v.parish.mu.Unlock()
	if deaf {
		<-ctx.Done()
		return ctx.Err()
	}
	time.Sleep(5 * time.Millisecond)
	return nil
}

// Lease implements leases.
func (v *voter) Lease(ctx context.Context) (store.Lease, error) {
	if err := v.reach(ctx); err != nil {
		return store.Lease{}, err
	}
	v.parish.mu.Lock()
	defer v.parish.mu.Unlock()
	return v.parish.lease, nil
}

// SaveLease implements leases.
func (v *voter) SaveLease(ctx context.Context, _ types.UID, to store.Lease, _ time.Duration) (store.Lease, error) {
	if err := v.reach(ctx); err != nil {
		return store.Lease{}, err
	}
	v.parish.mu.Lock()
	defer v.parish.mu.Unlock()
	if to.Version != v.parish.lease.Version {
		return store.Lease{}, store.ErrLeaseChanged
	}
	v.parish.version++
	to.Version = strconv.Itoa(v.parish.version)
	v.parish.lease = to
	return to, nil
}

// RoundTrip implements http.RoundTripper: the way to another pod.
func (v *voter) RoundTrip(r *http.Request) (*http.Response, error) {
	v.parish.mu.Lock()
	var to *voter
	for _, o := range v.parish.pods {
		if o.ip.String() == r.URL.Hostname() && !v.parish.cut[[2]string{v.pod, o.pod}] && !v.parish.cut[[2]string{o.pod, v.pod}] {
			to = o
		}
	}
	v.parish.mu.Unlock()
	if to == nil {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	time.Sleep(time.Millisecond)
	r.RemoteAddr = netip.AddrPortFrom(v.ip, 40000).String()
	w := httptest.NewRecorder()
	to.ServeHTTP(w, r)
	return w.Result(), nil
}

// active names the pod that works, or none; two are an error.
func (p *parish) active() string {
	name := ""
	for pod, v := range p.pods {
		if a, _ := v.elector.active(); a {
			if name != "" {
				p.t.Fatalf("%s and %s work at once", name, pod)
			}
			name = pod
		}
	}
	return name
}

// await waits until a pod works, and says how long that took.
func (p *parish) await(pod string, limit time.Duration) time.Duration {
	p.t.Helper()
	start := time.Now()
	for p.active() != pod {
		if time.Since(start) > limit {
			p.t.Fatalf("after %s pod %q works, want %q", limit, p.active(), pod)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(start)
}

// stays checks that a pod goes on working.
func (p *parish) stays(pod string, d time.Duration) {
	p.t.Helper()
	for start := time.Now(); time.Since(start) < d; time.Sleep(10 * time.Millisecond) {
		if got := p.active(); got != pod {
			p.t.Fatalf("after %s pod %q works, want %q", time.Since(start), got, pod)
		}
	}
}

// takeover is the promise of docs/operator.md.
const takeover = 2 * time.Second

func TestElection(t *testing.T) {
	for name, f := range map[string]func(*parish){
		"the holder dies": func(p *parish) {
			p.kill("edge-0")
			p.t.Logf("taken over after %s", p.await("edge-1", takeover))
			p.start("edge-0", 2)
			p.stays("edge-1", time.Minute)
		},
		"the holder gives up the Lease": func(p *parish) {
			v := p.pods["edge-0"]
			p.kill("edge-0")
			if err := v.release(); err != nil {
				p.t.Fatal(err)
			}
			if took := p.await("edge-1", takeover); took > 400*time.Millisecond {
				p.t.Errorf("taken over after %s", took)
			}
		},
		"the holder's container restarts": func(p *parish) {
			p.kill("edge-0")
			time.Sleep(700 * time.Millisecond)
			p.start("edge-0", 2)
			if took := p.await("edge-0", takeover); took > 300*time.Millisecond {
				p.t.Errorf("back after %s", took)
			}
		},
		"no API server": func(p *parish) {
			p.set(func() { p.deaf["edge-0"], p.deaf["edge-1"] = true, true })
			p.stays("edge-0", 5*time.Minute)
			p.set(func() { clear(p.deaf) })
			p.stays("edge-0", time.Minute)
		},
		"no API server after the other pod has been gone for long": func(p *parish) {
			p.kill("edge-1")
			p.stays("edge-0", 15*time.Second)
			p.set(func() { p.deaf["edge-0"] = true })
			p.stays("edge-0", 5*time.Minute)
		},
		"no API server for the holder": func(p *parish) {
			p.set(func() { p.deaf["edge-0"] = true })
			p.stays("edge-0", 5*time.Minute)
		},
		"no way between the pods": func(p *parish) {
			p.set(func() { p.cut[[2]string{"edge-0", "edge-1"}] = true })
			p.stays("edge-0", 5*time.Minute)
			p.kill("edge-0")
			p.await("edge-1", takeover)
		},
		"the holder is cut off": func(p *parish) {
			p.set(func() { p.deaf["edge-0"], p.cut[[2]string{"edge-0", "edge-1"}] = true, true })
			p.t.Logf("taken over after %s", p.await("edge-1", takeover+takeAfter-holdFor))
			p.set(func() { clear(p.deaf); clear(p.cut) })
			p.stays("edge-1", time.Minute)
		},
		"the other pod is cut off": func(p *parish) {
			p.set(func() { p.deaf["edge-1"], p.cut[[2]string{"edge-0", "edge-1"}] = true, true })
			p.stays("edge-0", time.Minute)
			p.set(func() { clear(p.deaf); clear(p.cut) })
			p.stays("edge-0", time.Minute)
		},
		"one pod is enough": func(p *parish) {
			p.introduce(1)
			p.stays("edge-0", time.Minute)
			p.kill("edge-1")
			p.introduce(1)
			p.set(func() { p.deaf["edge-0"] = true })
			p.stays("edge-0", time.Minute)
			p.set(func() { clear(p.deaf) })
			p.start("edge-1", 2)
			p.stays("edge-0", time.Minute)
		},
		"the pod that works is the one too many": func(p *parish) {
			p.kill("edge-0")
			p.await("edge-1", takeover)
			p.start("edge-0", 2)
			p.introduce(1)
			p.stays("edge-1", 5*time.Second)
			p.kill("edge-1")
			p.await("edge-0", takeover)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newParish(t)
				defer p.end()
				p.start("edge-0", 2)
				p.await("edge-0", time.Second)
				p.start("edge-1", 2)
				p.stays("edge-0", 15*time.Second)
				f(p)
			})
		})
	}
}

// The only pod works at once, whether it can ask or not, and costs no requests.
func TestElectionOfOne(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p := newParish(t)
			p.deaf["edge-0"] = deaf
			defer p.end()
			p.start("edge-0", 1)
			p.await("edge-0", leaseTimeout+time.Second)
			p.stays("edge-0", time.Hour)
			if p.version != 0 {
				t.Errorf("the Lease was written %d times", p.version)
			}
		})
	}
}

// Whatever is cut, and in whatever order, never two pods work; and when all is well, one does.
func TestElectionNeverTwo(t *testing.T) {
	for range 20 {
		seed := rand.Uint64()
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			p := newParish(t)
			names := []string{"edge-0", "edge-1", "edge-2"}
			for _, n := range names {
				p.start(n, len(names))
			}
			defer func() {
				p.end()
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			}()
			// Trouble never lasts as long as outAfter: that a pod which was away for so long is
			// back at the very time when the holder loses everybody is not covered.
			for range 20 {
				for end := time.Now().Add(outAfter - 3*time.Second); time.Now().Before(end); {
					a, b, cut := names[random.IntN(3)], names[random.IntN(3)], random.IntN(3) > 0
					if random.IntN(2) == 0 {
						p.set(func() { p.deaf[a] = cut })
					} else {
						p.set(func() { p.cut[[2]string{a, b}] = cut })
					}
					for end := time.Now().Add(time.Duration(random.IntN(2000)) * time.Millisecond); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
						p.active()
					}
				}
				p.set(func() { clear(p.deaf); clear(p.cut) })
				for range 300 {
					p.active()
					time.Sleep(10 * time.Millisecond)
				}
				if p.active() == "" {
					t.Error("nobody works, and nothing is wrong")
				}
			}
		})
	}
}

// Strangers cannot keep a pod from taking over.
func TestHelloOfStrangers(t *testing.T) {
	e := newElector("edge-1", "9586", nil, slog.New(slog.DiscardHandler))
	e.among("uid", 2, map[string][]netip.Addr{"edge-0": {netip.MustParseAddr("10.244.0.1")}})
	e.election.read("edge-0", "7", time.Now().Add(-time.Minute))
	before := e.election.seen
	for from, want := range map[string]int{"10.244.0.9:1": http.StatusForbidden, "10.244.0.1:1": http.StatusNoContent} {
		r := httptest.NewRequest(http.MethodPost, helloPath+"?pod=edge-0", http.NoBody)
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("from %s: %d, want %d", from, w.Code, want)
		}
		if moved := e.election.seen != before; moved != (want == http.StatusNoContent) {
			t.Errorf("from %s: its holder was last seen at %s, before that at %s", from, e.election.seen, before)
		}
		before = e.election.seen
	}
}
