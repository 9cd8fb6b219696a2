package vici

import (
	"bufio"
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// fakeDaemon answers on a socket with a script: for each packet that comes, the packets
// that go back.
func fakeDaemon(t *testing.T, answer func(packet) []packet) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "vici")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for {
					p, err := readPacket(r)
					if err != nil {
						return
					}
					for _, a := range answer(p) {
						b, err := a.encode()
						if err != nil {
							return
						}
						if _, err := c.Write(b); err != nil {
							return
						}
					}
				}
			}()
		}
	}()
	return socket
}

func message(t *testing.T, s *Section) []byte {
	t.Helper()
	b, err := s.Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func dial(t *testing.T, socket string) *Conn {
	t.Helper()
	c, err := Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestCommands(t *testing.T) {
	socket := fakeDaemon(t, func(p packet) []packet {
		switch {
		case p.kind == eventRegister || p.kind == eventUnregister:
			if p.name == "no-such-event" {
				return []packet{{kind: eventUnknown}}
			}
			return []packet{{kind: eventConfirm}}
		case p.name == "refused":
			return []packet{{kind: cmdResponse, message: message(t, (&Section{}).Set("success", "no").Set("errmsg", "because"))}}
		case p.name == "list":
			return []packet{
				{kind: event, name: "other", message: []byte("not even a message")},
				{kind: event, name: "item", message: message(t, (&Section{}).Set("n", "1"))},
				{kind: event, name: "item", message: message(t, (&Section{}).Set("n", "2"))},
				{kind: cmdResponse},
			}
		case p.name == "echo":
			return []packet{{kind: cmdResponse, message: p.message}}
		}
		return []packet{{kind: cmdUnknown}}
	})
	c := dial(t, socket)
	ctx := t.Context()
	if m, err := c.Command(ctx, "echo", (&Section{}).Set("a", "\x00\n{}")); err != nil || m.Get("a") != "\x00\n{}" {
		t.Errorf("echo: %v, %v", m, err)
	}
	var refused *CommandError
	if _, err := c.Command(ctx, "refused", nil); !errors.As(err, &refused) || refused.Message != "because" {
		t.Errorf("refused: %v", err)
	}
	if _, err := c.Command(ctx, "nonsense", nil); !errors.Is(err, ErrUnknown) {
		t.Errorf("nonsense: %v", err)
	}
	var got string
	if _, err := c.Stream(ctx, "list", "item", nil, func(s *Section) error { got += s.Get("n"); return nil }); err != nil || got != "12" {
		t.Errorf("list: %q, %v", got, err)
	}
	stop := errors.New("enough")
	if _, err := c.Stream(ctx, "list", "item", nil, func(*Section) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("list with an error: %v", err)
	}
	if _, err := c.Stream(ctx, "list", "no-such-event", nil, nil); !errors.Is(err, ErrUnknown) {
		t.Errorf("unknown event: %v", err)
	}
	if _, err := c.Command(ctx, "echo", nil); err != nil {
		t.Errorf("the connection is of no use afterwards: %v", err)
	}
	if _, err := Subscribe(ctx, socket, "no-such-event"); !errors.Is(err, ErrUnknown) {
		t.Errorf("subscribe: %v", err)
	}
}

// A daemon that does not answer costs its caller no more than the deadline.
func TestDeadline(t *testing.T) {
	socket := fakeDaemon(t, func(packet) []packet { return nil })
	for name, context := range map[string]func() (context.Context, context.CancelFunc){
		"deadline": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), 50*time.Millisecond)
		},
		"cancel": func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(50*time.Millisecond, cancel)
			return ctx, cancel
		},
	} {
		c := dial(t, socket)
		ctx, cancel := context()
		start := time.Now()
		if _, err := c.Command(ctx, "version", nil); err == nil || time.Since(start) > 2*time.Second {
			t.Errorf("%s: %v after %v", name, err, time.Since(start))
		}
		cancel()
		if _, err := c.Command(t.Context(), "version", nil); !errors.Is(err, ErrClosed) {
			t.Errorf("%s: a connection that lost its place was used again: %v", name, err)
		}
		ctx, cancel = context()
		if _, err := Subscribe(ctx, socket, "log"); err == nil {
			t.Errorf("%s: subscribed to a silent daemon", name)
		}
		cancel()
	}
}

func TestHostileDaemon(t *testing.T) {
	for name, raw := range map[string]string{
		"huge packet":   "\xff\xff\xff\xff\x01",
		"empty packet":  "\x00\x00\x00\x00",
		"bad type":      "\x00\x00\x00\x01\x99",
		"out of turn":   "\x00\x00\x00\x01\x05",
		"bad message":   "\x00\x00\x00\x03\x01\x03\xff",
		"half a packet": "\x00\x00\x00\x09\x01",
	} {
		socket := filepath.Join(t.TempDir(), "vici")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte(raw))
			_ = c.(*net.UnixConn).CloseWrite()
		}()
		c := dial(t, socket)
		if _, err := c.Command(t.Context(), "version", nil); err == nil {
			t.Errorf("%s: no error", name)
		}
		_ = l.Close()
	}
}

func TestSubscription(t *testing.T) {
	socket := fakeDaemon(t, func(p packet) []packet {
		if p.kind == eventRegister && p.name == "last" {
			return []packet{
				{kind: event, name: "first", message: message(t, (&Section{}).Set("lost", "yes"))},
				{kind: eventConfirm},
				{kind: event, name: "last", message: message(t, (&Section{}).Set("n", "7"))},
			}
		}
		return []packet{{kind: eventConfirm}}
	})
	s, err := Subscribe(t.Context(), socket, "first", "last")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if e, err := s.Next(t.Context()); err != nil || e.Name != "last" || e.Message.Get("n") != "7" {
		t.Errorf("%v, %v", e, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence: %v", err)
	}
}
