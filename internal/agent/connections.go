package agent

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

// connections are those to the API server. When the node gets another address, those from the
// old one lead nowhere, and it takes TCP and HTTP/2 most of a minute to notice: meanwhile the
// agent would not hear of its Node's new address.
type connections struct {
	mu   sync.Mutex
	open map[*connection]bool
}

// connection is an open one.
type connection struct {
	net.Conn
	of *connections
}

func newConnections() *connections { return &connections{open: map[*connection]bool{}} }

const dialTimeout = 10 * time.Second

func (c *connections) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	k := &connection{conn, c}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[k] = true
	return k, nil
}

// Close implements net.Conn.
func (k *connection) Close() error {
	k.of.mu.Lock()
	delete(k.of.open, k)
	k.of.mu.Unlock()
	return k.Conn.Close()
}

// prune closes those whose own address the host does not have any more.
func (c *connections) prune() {
	have, err := net.InterfaceAddrs()
	if err != nil {
		return
	}
	local := map[netip.Addr]bool{}
	for _, a := range have {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			local[p.Addr().Unmap().WithZone("")] = true
		}
	}
	c.closeUnless(local)
}

func (c *connections) closeUnless(local map[netip.Addr]bool) {
	var lost []*connection
	c.mu.Lock()
	for k := range c.open {
		a, ok := k.LocalAddr().(*net.TCPAddr)
		if ok && !a.IP.IsLoopback() && !local[a.AddrPort().Addr().Unmap().WithZone("")] {
			lost = append(lost, k)
		}
	}
	c.mu.Unlock()
	for _, k := range lost {
		_ = k.Close()
	}
}
