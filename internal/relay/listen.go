package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// socketKind is what there is one listening socket for.
type socketKind struct {
	protocol netstate.Protocol
	family   netstate.Family
}

// network is the name of the kind in package net.
func (k socketKind) network() string { return fmt.Sprintf("%s%d", k.protocol, k.family) }

// address is where TPROXY finds the socket.
func (k socketKind) address() netip.AddrPort {
	if k.family == netstate.IPv6 {
		return netip.AddrPortFrom(netip.IPv6Loopback(), netstate.RelayPort)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), netstate.RelayPort)
}

// listener is an open listening socket.
type listener struct {
	close func() error
	done  chan struct{} // closed when nothing reads from it any more
}

// listen opens the sockets that the table needs, closes the others, and counts both.
func (r *Relay) listen(ctx context.Context, t *table) (changed int, err error) {
	var errs []error
	need := t.kinds()
	for kind, l := range r.listeners {
		if need[kind] {
			continue
		}
		if err := l.close(); err != nil {
			errs = append(errs, err)
		}
		<-l.done
		delete(r.listeners, kind)
		changed++
	}
	for kind := range need {
		if r.listeners[kind] != nil {
			continue
		}
		l, err := r.open(ctx, kind)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		r.listeners[kind] = l
		changed++
	}
	if len(errs) > 0 {
		// In one line; the errors of package net name the operation and the address.
		return changed, fmt.Errorf("relay: %w", errs[0])
	}
	return changed, nil
}

// open opens one listening socket and starts to serve it.
func (r *Relay) open(ctx context.Context, kind socketKind) (*listener, error) {
	l := &listener{done: make(chan struct{})}
	var serve func()
	switch kind.protocol {
	case netstate.TCP:
		lc := net.ListenConfig{Control: listenControl, KeepAlive: -1} // what is accepted inherits it (socket_linux.go)
		lc.SetMultipathTCP(false)                                     // a plain socket: TPROXY and splice(2) know no other
		socket, err := lc.Listen(ctx, kind.network(), kind.address().String())
		if err != nil {
			return nil, err
		}
		tcp, _ := socket.(*net.TCPListener) // as package net says
		l.close, serve = tcp.Close, func() { r.acceptTCP(tcp) }
	case netstate.UDP:
		lc := net.ListenConfig{Control: listenControl}
		socket, err := lc.ListenPacket(ctx, kind.network(), kind.address().String())
		if err != nil {
			return nil, err
		}
		udp, _ := socket.(*net.UDPConn)
		l.close, serve = udp.Close, func() { r.receiveUDP(udp) }
	default:
		return nil, errors.ErrUnsupported
	}
	r.wg.Go(func() { defer close(l.done); serve() })
	return l, nil
}
