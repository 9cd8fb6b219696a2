package agent

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

// A connection whose own address is gone is closed, and no other one.
func TestConnectionsFromGoneAddresses(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := newConnections()
	open := func(at string) net.Conn {
		t.Helper()
		conn, err := c.dial(t.Context(), "tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		k, ok := conn.(*connection)
		if !ok {
			t.Fatalf("%T", conn)
		}
		k.Conn = from{k.Conn, &net.TCPAddr{IP: net.ParseIP(at), Port: 1}}
		return conn
	}
	kept, lost, lost6 := open("192.0.2.1"), open("192.0.2.9"), open("2001:db8::9")
	c.closeUnless(map[netip.Addr]bool{netip.MustParseAddr("192.0.2.1"): true, netip.MustParseAddr("2001:db8::1"): true})
	if _, err := kept.Write([]byte("x")); err != nil {
		t.Errorf("from an address that is there: %v", err)
	}
	for _, conn := range []net.Conn{lost, lost6} {
		if _, err := conn.Write([]byte("x")); err == nil {
			t.Errorf("a connection from %s is open", conn.LocalAddr())
		}
	}
	if len(c.open) != 1 {
		t.Errorf("%d connections are known, want 1", len(c.open))
	}
	// Those of loopback, as here, are never taken for lost.
	mine, err := c.dial(t.Context(), "tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	c.prune()
	_ = mine.SetDeadline(time.Now().Add(time.Second))
	if _, err := mine.Write([]byte("x")); err != nil {
		t.Error(err)
	}
}

// from is a connection that says it is from another address.
type from struct {
	net.Conn
	at net.Addr
}

func (f from) LocalAddr() net.Addr { return f.at }
