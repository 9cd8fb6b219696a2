package vici

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// ErrClosed is returned by a connection that was closed, or that broke off in the middle
// of an exchange: dial again.
var ErrClosed = errors.New("vici connection is closed")

// ErrUnknown is wrapped when the daemon does not know a command or an event: its version
// is too old or a plugin is missing.
var ErrUnknown = errors.New("not known to the daemon")

// CommandError is the daemon's refusal of a command.
type CommandError struct {
	Command string // "load-conn"
	Message string // the daemon's errmsg
}

// Error is "load-conn: MESSAGE".
func (e *CommandError) Error() string { return e.Command + ": " + e.Message }

// Conn is a connection for commands. Its methods may be called from several goroutines;
// exchanges follow one another.
type Conn struct {
	mu     sync.Mutex
	conn   net.Conn
	r      *bufio.Reader
	broken bool
}

// Dial connects to the daemon's Unix socket.
func Dial(ctx context.Context, socket string) (*Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to the IKE daemon: %w", err)
	}
	return newConn(c), nil
}

func newConn(c net.Conn) *Conn { return &Conn{conn: c, r: bufio.NewReader(c)} }

// PeerPID is the process that listens on the socket, or 0 when the kernel does not say.
func (c *Conn) PeerPID() int {
	u, ok := c.conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// Close ends the connection; a command in flight fails.
func (c *Conn) Close() error { return c.conn.Close() }

// Command sends a request (nil: an empty one) and waits for the response. A response
// with success=no is a *CommandError. When ctx ends first, the connection is closed.
func (c *Conn) Command(ctx context.Context, name string, request *Section) (*Section, error) {
	return c.Stream(ctx, name, "", request, nil)
}

// Stream is Command for those that answer by a stream of events: each is given to each
// (which may not use the connection) until the response comes. After an error of each
// the rest is read and dropped, and the error returned.
func (c *Conn) Stream(ctx context.Context, name, eventName string, request *Section, each func(*Section) error) (*Section, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		return nil, ErrClosed
	}
	release := bound(ctx, c.conn)
	response, err := c.exchange(name, eventName, request, each)
	if ctxErr := release(); ctxErr != nil && err != nil {
		err = ctxErr
	}
	var refused *CommandError
	if err != nil && !errors.As(err, &refused) {
		err = fmt.Errorf("vici %s: %w", name, err)
	}
	return response, err
}

// bound makes the end of ctx end the connection's reads and writes; release undoes that
// and reports whether ctx has ended.
func bound(ctx context.Context, conn net.Conn) (release func() error) {
	// Not ctx's own deadline: the connection's would pass a moment before ctx knows.
	_ = conn.SetDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return func() error {
		stop()
		return ctx.Err()
	}
}

func (c *Conn) exchange(name, eventName string, request *Section, each func(*Section) error) (*Section, error) {
	message, err := request.Encode(nil)
	if err != nil {
		return nil, err
	}
	send, err := packet{kind: cmdRequest, name: name, message: message}.encode()
	if err != nil {
		return nil, err
	}
	if eventName != "" {
		if err := c.register(eventRegister, eventName); err != nil {
			return nil, err
		}
	}
	if _, err := c.conn.Write(send); err != nil {
		return nil, c.fail(err)
	}
	response, eachErr, err := c.collect(eventName, each)
	if eventName != "" && !c.broken {
		err = errors.Join(err, c.register(eventUnregister, eventName))
	}
	if err != nil || eachErr != nil {
		return nil, errors.Join(eachErr, err)
	}
	if response.Get("success") == "no" {
		return response, &CommandError{Command: name, Message: response.Get("errmsg")}
	}
	return response, nil
}

// collect reads events until the response.
func (c *Conn) collect(eventName string, each func(*Section) error) (response *Section, eachErr, err error) {
	for {
		p, err := readPacket(c.r)
		if err != nil {
			return nil, eachErr, c.fail(err)
		}
		switch p.kind {
		case cmdUnknown:
			return nil, eachErr, fmt.Errorf("command %w", ErrUnknown)
		case cmdResponse:
			response, err := Decode(p.message)
			if err != nil {
				return nil, eachErr, c.fail(err)
			}
			return response, eachErr, nil
		case event:
			if p.name != eventName || each == nil || eachErr != nil {
				continue
			}
			m, err := Decode(p.message)
			if err != nil {
				return nil, eachErr, c.fail(err)
			}
			eachErr = each(m)
		default:
			return nil, eachErr, c.fail(fmt.Errorf("%w: packet type %d out of turn", ErrMalformed, p.kind))
		}
	}
}

// register sends an event registration or its end and waits for the confirmation.
func (c *Conn) register(kind byte, name string) error {
	b, err := packet{kind: kind, name: name}.encode()
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(b); err != nil {
		return c.fail(err)
	}
	for {
		p, err := readPacket(c.r)
		if err != nil {
			return c.fail(err)
		}
		switch p.kind {
		case eventConfirm:
			return nil
		case eventUnknown:
			return fmt.Errorf("event %s %w", name, ErrUnknown)
		case event: // of an earlier registration
		default:
			return c.fail(fmt.Errorf("%w: packet type %d out of turn", ErrMalformed, p.kind))
		}
	}
}

// fail closes a connection whose stream can no longer be followed.
func (c *Conn) fail(err error) error {
	c.broken = true
	_ = c.conn.Close()
	return err
}
