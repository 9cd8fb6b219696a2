package wireguard

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// stream sends 1 KiB each 10 ms from the gateway to the peer through the tunnel and
// returns the longest gap between arrivals, and how many bytes arrived.
type stream struct {
	conn    net.Conn
	longest atomic.Int64
	arrived atomic.Int64
	broken  atomic.Bool
}

func newStream(t *testing.T, p *pair) *stream {
	t.Helper()
	s := &stream{}
	var ln net.Listener
	p.a.Do(func() (err error) { ln, err = net.Listen("tcp", "10.9.0.2:7777"); return err })
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 64<<10)
		for last := time.Now(); ; {
			n, err := c.Read(b)
			if err != nil {
				s.broken.Store(!errors.Is(err, io.EOF))
				return
			}
			s.arrived.Add(int64(n))
			now := time.Now()
			s.longest.Store(max(s.longest.Load(), int64(now.Sub(last))))
			last = now
		}
	}()
	p.h.Do(func() (err error) { s.conn, err = net.DialTimeout("tcp", "10.9.0.2:7777", 5*time.Second); return err })
	t.Cleanup(func() { _ = s.conn.Close() })
	go func() {
		b := make([]byte, 1024)
		for {
			if _, err := s.conn.Write(b); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	return s
}

// told waits 300 ms, tells the other side, and returns how much longer that took.
func told(tell func()) (late time.Duration) {
	began := time.Now()
	time.Sleep(300 * time.Millisecond)
	tell()
	return time.Since(began) - 300*time.Millisecond
}

// gap checks that the longest one was a second, but for what the test itself was late.
func (s *stream) gap(t *testing.T, what string, late time.Duration) {
	t.Helper()
	before := s.arrived.Load()
	time.Sleep(200 * time.Millisecond)
	if s.arrived.Load() == before || s.broken.Load() {
		t.Errorf("%s: the connection is broken", what)
	}
	gap := time.Duration(s.longest.Swap(0)).Round(time.Millisecond)
	t.Logf("%s: longest gap %s", what, gap)
	if gap > time.Second+late {
		t.Errorf("%s: gap %s, want at most 1 s", what, gap)
	}
}

// TestKeyRotation (fault 10): our key, then a peer's, changes while a TCP stream runs; the
// other side is told 300 ms later.
func TestKeyRotation(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		s := newStream(t, p)
		time.Sleep(300 * time.Millisecond)
		s.longest.Store(0)

		old, next := p.d.PublicKey, newKeys(t)
		p.d.PrivateKey, p.d.PublicKey = next.secret(), next.public
		set(t, p.w, 1, p.d)
		late := told(func() {
			p.a.wg("peer", old.String(), "remove", "peer", next.public.String(), "allowed-ips", "10.9.0.0/24", "endpoint", gatewayAt)
		})
		time.Sleep(1500 * time.Millisecond)
		s.gap(t, "our key", late)

		fresh := newKeys(t)
		p.a.private, p.a.public = fresh.private, fresh.public
		p.d.Peers[0].PublicKey = fresh.public
		set(t, p.w, 2, p.d)
		late = told(func() { p.a.wg("private-key", p.a.file(fresh.private.String())) })
		time.Sleep(1500 * time.Millisecond)
		s.gap(t, "the peer's key, we first", late)

		fresh = newKeys(t)
		p.a.private, p.a.public = fresh.private, fresh.public
		p.a.wg("private-key", p.a.file(fresh.private.String()))
		late = told(func() {
			p.d.Peers[0].PublicKey = fresh.public
			set(t, p.w, 2, p.d)
		})
		time.Sleep(1500 * time.Millisecond)
		s.gap(t, "the peer's key, the peer first", late)
	})
}

// TestInitiate: a peer that dialled in is greeted by a restarted gateway, and until it
// answers about once a second.
func TestInitiate(t *testing.T) {
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		p := newPair(t, kind)
		at := map[netstate.Key]int{}
		for _, x := range observe(t, p.w).Peers {
			for i := range p.d.Peers {
				if p.d.Peers[i].PublicKey == x.PublicKey {
					p.d.Peers[i].Endpoint, p.d.Peers[i].Initiate = x.Endpoint, true
					at[x.PublicKey] = i
				}
			}
		}
		if err := p.w.Close(); err != nil {
			t.Fatal(err)
		}
		// The first peer cannot answer for a while.
		p.a.Run("nft", "add table inet f; add chain inet f i { type filter hook input priority 0; }; add rule inet f i iifname eth0 udp sport 51820 counter drop")
		p.w = newWireGuard(t, p.h, kind)
		set(t, p.w, -1, p.d)
		if err := p.h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for p.sessions(t)[p.b.public].IsZero() {
			if time.Since(began) > 2*time.Second {
				t.Fatal("no session with the peer that can answer after 2 s")
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Logf("first session after %s", time.Since(began).Round(time.Millisecond))
		time.Sleep(2500 * time.Millisecond)
		t.Log(p.a.Run("nft", "list", "chain", "inet", "f", "i"))
		p.a.Run("nft", "delete", "table", "inet", "f")
		began = time.Now()
		for p.sessions(t)[p.a.public].IsZero() {
			if time.Since(began) > 2*time.Second {
				t.Fatal("no session 2 s after the peer can answer again")
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Logf("session %s after the peer can answer again", time.Since(began).Round(time.Millisecond))
		set(t, p.w, 0, p.d)
	})
}
