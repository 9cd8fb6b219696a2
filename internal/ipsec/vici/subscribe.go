package vici

import (
	"context"
	"fmt"
)

// Event is one event of a subscription.
type Event struct {
	Name    string // "ike-updown"
	Message *Section
}

// Subscription is a connection that receives events. It belongs to one goroutine, except
// Close.
type Subscription struct{ c *Conn }

// Subscribe connects to the daemon's Unix socket and registers for events. An event that
// the daemon does not know is an error that wraps ErrUnknown.
func Subscribe(ctx context.Context, socket string, events ...string) (*Subscription, error) {
	c, err := Dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	release := bound(ctx, c.conn)
	for _, name := range events {
		if err := c.register(eventRegister, name); err != nil {
			_ = c.Close()
			if ctxErr := release(); ctxErr != nil {
				err = ctxErr
			}
			return nil, fmt.Errorf("vici subscribe to %s: %w", name, err)
		}
	}
	if err := release(); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("vici subscribe: %w", err)
	}
	return &Subscription{c: c}, nil
}

// Next waits for the next event. When ctx ends, or the daemon goes away, the
// subscription is over. An event that arrived between two registrations may be lost:
// ask for the state after subscribing.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	release := bound(ctx, s.c.conn)
	for {
		p, err := readPacket(s.c.r)
		if err == nil && p.kind != event {
			continue
		}
		var m *Section
		if err == nil {
			m, err = Decode(p.message)
		}
		if err != nil {
			if ctxErr := release(); ctxErr != nil {
				err = ctxErr
			}
			_ = s.c.fail(err)
			return Event{}, fmt.Errorf("vici events: %w", err)
		}
		_ = release()
		return Event{Name: p.name, Message: m}, nil
	}
}

// Close ends the subscription; Next returns with an error.
func (s *Subscription) Close() error { return s.c.Close() }
