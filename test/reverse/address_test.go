package reverse

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
)

// names answers every question for an IPv4 address with one that may change, for all that
// resolve names in this process until the test's end.
func names(t *testing.T, first string) *atomic.Pointer[netip.Addr] {
	t.Helper()
	var at atomic.Pointer[netip.Addr]
	at.Store(new(netip.MustParseAddr(first)))
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", server.LocalAddr().String())
	}}
	t.Cleanup(func() { net.DefaultResolver = before; _ = server.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := resolve(buf[:n], *at.Load()); answer != nil {
				_, _ = server.WriteTo(answer, from)
			}
		}
	}()
	return &at
}

// resolve answers a query (RFC 1035, section 4) for an address.
func resolve(query []byte, a netip.Addr) []byte {
	const header, response, typeA = 12, 0x8180, 1
	end := header
	for end < len(query) && query[end] != 0 { // labels of the name
		end += int(query[end]) + 1
	}
	end += 5 // the root, type and class
	if end > len(query) {
		return nil
	}
	out := append([]byte(nil), query[:end]...)
	binary.BigEndian.PutUint16(out[2:], response)
	binary.BigEndian.PutUint32(out[8:], 0) // nothing more
	binary.BigEndian.PutUint16(out[6:], 0)
	if binary.BigEndian.Uint16(out[end-4:]) == typeA {
		binary.BigEndian.PutUint16(out[6:], 1)
		out = append(out, 0xc0, header, 0, typeA, 0, 1, 0, 0, 1, 0x2c, 0, 4) // for 300 s
		out = append(out, a.AsSlice()...)
	}
	return out
}

// balance is a load balancer at an address, in front of another one, until it is taken
// away.
func balance(t *testing.T, at, to string) (address string, remove func()) {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	c := &conns{ls: []net.Listener{l}}
	t.Cleanup(c.cut)
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			hub, err := net.Dial("tcp", to)
			if err != nil {
				_ = from.Close()
				continue
			}
			c.add(from)
			c.add(hub)
			go func() { _, _, _ = mux.Relay(from.(mux.Conn), hub.(mux.Conn)) }()
		}
	}()
	return l.Addr().String(), c.cut
}

// A load balancer comes, under a name: hubs tell their spokes, which change over. Then its
// address changes, and the spokes find it by the name, though that was to be believed for
// longer.
func TestLoadBalancerMoves(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	s := n.startSpoke("a")
	e := n.startEgress()
	name := names(t, "127.0.0.1")
	hub := n.hubs[0].spokes.Addr().String()
	first, remove := balance(t, "127.0.0.1:0", hub)
	settings := n.settings()
	_, port, _ := net.SplitHostPort(first)
	settings.Hubs[0].Address = "tunnel.example.com:" + port
	n.hubs[0].Set(settings)
	carries := func() error {
		c, err := e.connect(serve(t, echo))
		if err == nil {
			_, _ = io.WriteString(c, "x")
			_, err = io.ReadFull(c, make([]byte, 1))
			_ = c.Close()
		}
		return err
	}
	began := time.Now()
	whole := func() error {
		for _, p := range n.hubs[0].Peers() {
			if p.Role == pki.Spoke && (p.Connections != 2 || p.Since.Before(began)) {
				return errors.New("not through the load balancer alone")
			}
		}
		return errors.Join(s.Ready(), carries())
	}
	n.eventually("the spoke has changed over", whole)

	remove()
	_, _ = balance(t, "127.0.0.2:"+port, hub)
	name.Store(new(netip.MustParseAddr("127.0.0.2")))
	began = time.Now()
	n.eventually("the spoke is back at the new address", whole)
	t.Logf("back after %s", time.Since(began).Round(time.Millisecond))
}
