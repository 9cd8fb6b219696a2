package wireguard

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/tailscale/wireguard-go/conn"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// end is opened sockets, and what comes to them.
type end struct {
	sockets
	port uint16
	got  chan datagram
}

type datagram struct {
	data []byte
	from *endpoint
}

// newEnd receives into so many places at a time.
func newEnd(t *testing.T, places int) *end {
	t.Helper()
	e := &end{got: make(chan datagram, 4096)}
	receivers, port, err := e.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	e.port = port
	ended := make(chan error, len(receivers))
	for _, receive := range receivers {
		go func() { ended <- e.collect(receive, places) }()
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		for range receivers {
			select {
			case err := <-ended:
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("after Close, receiving ended with %v, want %v", err, net.ErrClosed)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("receiving goes on after Close")
			}
		}
	})
	return e
}

func (e *end) collect(receive conn.ReceiveFunc, places int) error {
	bufs, sizes, eps := make([][]byte, places), make([]int, places), make([]conn.Endpoint, places)
	for i := range bufs {
		bufs[i] = make([]byte, messageSize)
	}
	for {
		n, err := receive(bufs, sizes, eps)
		if err != nil {
			return err
		}
		for i := range n {
			e.got <- datagram{bytes.Clone(bufs[i][:sizes[i]]), eps[i].(*endpoint)}
		}
	}
}

func (e *end) next(t interface{ Fatalf(string, ...any) }) datagram {
	select {
	case d := <-e.got:
		return d
	case <-time.After(5 * time.Second):
		t.Fatalf("nothing came")
		return datagram{}
	}
}

// at is the endpoint of port on a loopback address.
func at(t *testing.T, address string, port uint16) *endpoint {
	t.Helper()
	ep, err := new(sockets).ParseEndpoint(net.JoinHostPort(address, strconv.Itoa(int(port))))
	if err != nil {
		t.Fatal(err)
	}
	return ep.(*endpoint)
}

// loopbacks are this host's, of both families where it has both.
func (e *end) loopbacks() []string {
	out := []string{"127.0.0.1"}
	if e.v6.Load() != nil {
		if c, err := net.ListenPacket("udp6", "[::1]:0"); err == nil {
			out = append(out, "::1")
			_ = c.Close()
		}
	}
	return out
}

// What is sent at once comes, in order and each by itself, however it was cut and joined on
// its way, and however few places the receiver has.
func TestSocketsCarryBatches(t *testing.T) {
	a := newEnd(t, 3)
	b := newEnd(t, conn.IdealBatchSize)
	for _, segments := range []bool{true, false} {
		for _, address := range b.loopbacks() {
			name := address
			if !segments {
				name += ", segmented by us"
			}
			t.Run(name, func(t *testing.T) {
				for _, e := range []*end{a, b} {
					e.v4.Load().segments.Store(segments)
					if u := e.v6.Load(); u != nil {
						u.segments.Store(segments)
					}
				}
				rapid.Check(t, func(t *rapid.T) {
					from, to := a, b
					if rapid.Bool().Draw(t, "back") {
						from, to = b, a
					}
					checkBatch(t, from, to, address)
				})
			})
		}
	}
}

// checkBatch sends up to what a Send may hold, in runs of equal sizes as streams have them.
func checkBatch(t *rapid.T, from, to *end, address string) {
	const offset = 16
	var bufs, want [][]byte
	runs := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) [2]int {
		return [2]int{rapid.IntRange(1, 90).Draw(t, "packets"), rapid.IntRange(1, 1500).Draw(t, "size")}
	}), 1, 4).Draw(t, "runs")
	for i, r := range runs {
		for range min(r[0], conn.IdealBatchSize-len(bufs)) {
			p := bytes.Repeat([]byte{byte(len(bufs)), byte(i)}, r[1])[:r[1]]
			want = append(want, p)
			bufs = append(bufs, append(make([]byte, offset), p...))
		}
	}
	peer := netip.AddrPortFrom(netip.MustParseAddr(address), to.port)
	if err := from.Send(bufs, &endpoint{to: peer}, offset); err != nil {
		t.Fatalf("send to %s: %v", peer, err)
	}
	for i, w := range want {
		d := to.next(t)
		if !bytes.Equal(d.data, w) {
			t.Fatalf("packet %d of %d: %d bytes came, %d were sent, or others", i, len(want), len(d.data), len(w))
		}
		if s := netip.AddrPortFrom(peer.Addr(), from.port); d.from.to != s {
			t.Fatalf("packet %d came from %s, want %s", i, d.from.to, s)
		}
	}
}

// A peer is answered from the address that it spoke to, until that address is forgotten or
// gone.
func TestSocketsAnswerFromWhereTheyWereAsked(t *testing.T) {
	ours, peer := newEnd(t, 1), newEnd(t, 1)
	if err := peer.Send([][]byte{{1}}, at(t, "127.0.0.2", ours.port), 0); err != nil {
		t.Fatal(err)
	}
	back := ours.next(t).from
	if want := netip.MustParseAddr("127.0.0.2"); back.SrcIP() != want {
		t.Errorf("the packet came to %s, want %s", back.SrcIP(), want)
	}
	answered := func(want string) {
		t.Helper()
		for _, bufs := range [][][]byte{{{2}}, {{3, 3}, {4, 4}}} {
			if err := ours.Send(bufs, back, 0); err != nil {
				t.Fatal(err)
			}
			for range bufs {
				if d := peer.next(t); d.from.DstIP() != netip.MustParseAddr(want) {
					t.Errorf("%d packets: answered from %s, want %s", len(bufs), d.from.DstIP(), want)
				}
			}
		}
	}
	answered("127.0.0.2")
	back.ClearSrc()
	answered("127.0.0.1")

	gone := ours.foreign(t, peer)
	if err := ours.Send([][]byte{{5}}, gone, 0); err != nil {
		t.Errorf("send from an address that is gone: %v", err)
	}
	if d := peer.next(t); d.data[0] != 5 || gone.SrcIP().IsValid() {
		t.Errorf("%v came, and the source is still %s", d.data, gone.SrcIP())
	}
}

// foreign is the peer's endpoint with a source that this host does not have.
func (e *end) foreign(t *testing.T, peer *end) *endpoint {
	t.Helper()
	if err := peer.Send([][]byte{{1}}, at(t, "127.0.0.3", e.port), 0); err != nil {
		t.Fatal(err)
	}
	gone := e.next(t).from
	copy(gone.control[unix.CmsgLen(4):], []byte{192, 0, 2, 1}) // ipi_spec_dst
	return gone
}

func TestSocketsOpen(t *testing.T) {
	var s sockets
	_, port, err := s.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Open(0); !errors.Is(err, conn.ErrBindAlreadyOpen) {
		t.Errorf("opened twice: %v", err)
	}
	if u := s.v6.Load(); u != nil && u.port() != s.v4.Load().port() {
		t.Errorf("IPv6 has port %d, IPv4 %d", u.port(), s.v4.Load().port())
	}
	var other sockets
	if _, _, err := other.Open(port); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("opened a port that is taken: %v", err)
	}
	if err := other.Send([][]byte{{1}}, at(t, "127.0.0.1", port), 0); !errors.Is(err, net.ErrClosed) {
		t.Errorf("sent with closed sockets: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, again, err := s.Open(port); err != nil || again != port {
		t.Errorf("opened again: port %d, %v; want %d", again, err, port)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ParseEndpoint("198.51.100.7"); err == nil {
		t.Error("an endpoint without a port was taken")
	}
}
