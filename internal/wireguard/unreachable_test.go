package wireguard

import (
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestUnreachablePeersCostLittle: what is sent to peers that do not answer is dropped in the
// end instead of kept, and a peer with a session loses nothing of its own.
func TestUnreachablePeersCostLittle(t *testing.T) {
	inUserSpace(t, func(t *testing.T) {
		p := newPair(t, UserSpace)
		const peers, packets = 150, 200
		for i, m := range manyPeers(peers) {
			m.AllowedIPs = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(i)}), 32)}
			m.Endpoint = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.200"), uint16(1000+i))
			p.d.Peers = append(p.d.Peers, m)
		}
		set(t, p.w, peers, p.d)
		// While this process collects garbage nobody reads the link: what overflows its queue
		// is not what is tested.
		p.h.IP("link", "set", "cvtwg0", "txqueuelen", "10000")
		pings := make(chan string, 1)
		go func() {
			out, _ := p.a.Try("ping", "-q", "-i0.01", "-c250", "-W2", "10.9.0.1")
			pings <- out
		}()
		before := heap()
		var c *net.UDPConn
		p.h.Do(func() (err error) { c, err = net.ListenUDP("udp4", nil); return err })
		defer c.Close()
		b := make([]byte, 1000)
		most := uint64(0)
		for n := range packets {
			for i := range peers {
				if i%20 == 0 {
					time.Sleep(time.Millisecond)
				}
				_, _ = c.WriteToUDPAddrPort(b, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(i)}), 9))
			}
			if n%50 == 49 {
				most = max(most, heap())
			}
		}
		kept := int64(most) - int64(before)
		t.Logf("%d packets to peers that do not answer: %d MiB more", peers*packets, kept>>20)
		// The library alone keeps 128 per peer, 1,200 MiB.
		if limit := int64(unsentMax) * 64 << 10 * 3 / 2; kept > limit {
			t.Errorf("%d MiB are kept, want at most %d", kept>>20, limit>>20)
		}
		if s := <-pings; !strings.Contains(s, " 0% packet loss") {
			t.Error(s)
		}
	})
}

// heap is what is in use, garbage aside.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
