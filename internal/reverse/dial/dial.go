// Package dial connects to targets, at the spoke and for exports at the hub: names are
// resolved once, and every address is checked again when it is dialled.
package dial

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Timeout is the longest dial.
const Timeout = 9 * time.Second

// Dialer dials targets. The zero value uses the system's resolver.
type Dialer struct {
	// Lookup resolves a name; nil: net.DefaultResolver.
	Lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	// Dial replaces net.Dialer, for tests; the addresses that it is given are checked.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// control checks an address at the last moment, whoever resolved it.
func control(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if refusal := policy.CheckAddr(ap.Addr()); refusal != nil {
		return refusal
	}
	return nil
}

// Target connects to a target that the policy allows, in no longer than timeout and
// Timeout. It returns how long the last connection took to be made.
func (d *Dialer) Target(ctx context.Context, t policy.Target, timeout time.Duration) (mux.Conn, time.Duration, *wire.Refusal) {
	timeout = min(timeout, Timeout)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	addrs, refusal := d.resolve(ctx, t)
	if refusal != nil {
		return nil, 0, refusal
	}
	var last error
	for i, a := range addrs {
		began := time.Now()
		one, stop := context.WithDeadline(ctx, share(ctx, len(addrs)-i))
		conn, err := d.dial(one, netip.AddrPortFrom(a, t.Port))
		stop()
		if err == nil {
			return conn, time.Since(began), nil
		}
		last = err
	}
	return nil, 0, explain(ctx, t, timeout, last)
}

// share gives each of the addresses that are left its part of the time that is left.
func share(ctx context.Context, left int) time.Time {
	deadline, _ := ctx.Deadline()
	return time.Now().Add(time.Until(deadline) / time.Duration(left))
}

func (d *Dialer) dial(ctx context.Context, a netip.AddrPort) (mux.Conn, error) {
	if refusal := policy.CheckAddr(a.Addr()); refusal != nil {
		return nil, refusal
	}
	dial := d.Dial
	if dial == nil {
		dial = (&net.Dialer{Control: control, KeepAlive: 30 * time.Second}).DialContext
	}
	c, err := dial(ctx, "tcp", a.String())
	if err != nil {
		return nil, err
	}
	both, ok := c.(mux.Conn)
	if !ok {
		return nil, errors.Join(errors.New("the connection cannot be half closed"), c.Close())
	}
	return both, nil
}

// resolve gives the addresses to dial: what the name resolves to, without what is never
// dialled.
func (d *Dialer) resolve(ctx context.Context, t policy.Target) ([]netip.Addr, *wire.Refusal) {
	if t.Addr.IsValid() {
		return []netip.Addr{t.Addr}, nil
	}
	lookup := d.Lookup
	if lookup == nil {
		lookup = net.DefaultResolver.LookupNetIP
	}
	found, err := lookup(ctx, "ip", t.Name)
	if err != nil || len(found) == 0 {
		var dns *net.DNSError
		if errors.As(err, &dns) && dns.IsNotFound || err == nil {
			return nil, wire.Refuse(wire.ReasonUnresolved, "%s has no address in the remote cluster", t.Name)
		}
		return nil, wire.Refuse(wire.ReasonUnresolved, "resolve %s in the remote cluster: %v", t.Name, err)
	}
	var allowed []netip.Addr
	var refusal *wire.Refusal
	for _, a := range found {
		a = a.Unmap()
		if r := policy.CheckAddr(a); r != nil {
			refusal = r
			continue
		}
		allowed = append(allowed, a)
	}
	if len(allowed) == 0 {
		return nil, wire.Refuse(wire.ReasonDenied, "%s resolves to %s", t.Name, refusal.Message)
	}
	return allowed, nil
}

// explain turns an error of the dial into a refusal.
func explain(ctx context.Context, t policy.Target, timeout time.Duration, err error) *wire.Refusal {
	var refusal *wire.Refusal
	var op net.Error
	switch {
	case errors.As(err, &refusal):
		return refusal
	case errors.Is(ctx.Err(), context.Canceled):
		return wire.Refuse(wire.ReasonCancelled, "the client went away")
	case ctx.Err() != nil, errors.As(err, &op) && op.Timeout():
		return wire.Refuse(wire.ReasonTimeout, "%s did not answer within %s", t, timeout.Round(time.Millisecond))
	case errors.Is(err, syscall.ECONNREFUSED):
		return wire.Refuse(wire.ReasonRefused, "%s refused the connection", t)
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return wire.Refuse(wire.ReasonUnreachable, "the spoke has no route to %s", t)
	}
	return wire.Refuse(wire.ReasonOther, "dial %s: %v", t, err)
}
