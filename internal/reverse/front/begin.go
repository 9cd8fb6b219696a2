package front

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/reverse/front/preamble"
)

// maxBegin bounds what is read before it is known where to: a preamble in the smallest
// possible records, and a PROXY header.
const maxBegin = 2 * preamble.MaxSize

// scratchSize is how much is read at once, in bytes.
const scratchSize = 16 << 10

var scratch = sync.Pool{New: func() any { return new([scratchSize]byte) }}

// refusal is why a connection is not relayed.
type refusal struct {
	reason Reason
	text   string
}

func (r *refusal) Error() string { return r.text }

func refuse(reason Reason, format string, args ...any) error {
	return &refusal{reason, fmt.Sprintf(format, args...)}
}

// begin reads what the connection begins with, and finds out from where it comes and
// where to. Errors are refusals.
func (c *conn) begin() error {
	_ = c.client.SetReadDeadline(c.start.Add(c.front.opts.HeaderTimeout))
	if c.front.proxied(c.peer.Addr()) {
		if err := c.readProxy(); err != nil {
			return err
		}
	}
	if reason := c.ticket.identify(c.source.Addr()); reason != "" {
		return refuse(reason, "too many connections from %s", c.source.Addr())
	}
	if len(c.buf) == 0 {
		if err := c.read(); err != nil {
			return err
		}
	}
	switch preamble.KindOf(c.buf[0]) {
	case preamble.TLS:
		c.protocol = protocolTLS
		return c.readHello()
	case preamble.HTTP:
		c.protocol = protocolConnect
		return c.readRequest()
	case preamble.Neither:
	}
	return refuse(Reason(preamble.Unknown), "neither TLS nor HTTP: the first byte is %#02x", c.buf[0])
}

// proxied reports whether a connection from there begins with a PROXY header.
func (f *Front) proxied(a netip.Addr) bool {
	for _, p := range f.opts.ProxyFrom {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func (c *conn) readProxy() error {
	return c.parse(func() error {
		p, n, err := preamble.ParseProxy(c.buf)
		if err != nil {
			return err
		}
		c.buf = c.buf[n:]
		if p.Source.IsValid() {
			c.source, c.destination = p.Source, p.Destination
		}
		return nil
	})
}

func (c *conn) readHello() error {
	return c.parse(func() error {
		hello, err := preamble.ParseHello(c.buf)
		c.serverName, c.ech = hello.ServerName, hello.ECH
		return err
	})
}

func (c *conn) readRequest() error {
	return c.parse(func() error {
		request, n, err := preamble.ParseRequest(c.buf)
		if err != nil {
			return err
		}
		c.buf = c.buf[n:]
		c.serverName, c.port = request.Name, request.Port
		return nil
	})
}

// parse calls one of the parsers until it needs no more bytes. Errors are refusals.
func (c *conn) parse(parser func() error) error {
	for {
		err := parser()
		var refused *preamble.Error
		switch {
		case err == nil:
			return nil
		case errors.As(err, &refused):
			return refuse(Reason(refused.Reason), "%s", refused)
		case len(c.buf) >= maxBegin:
			return refuse(Reason(preamble.Oversized), "%d bytes do not say where to", len(c.buf))
		}
		if err := c.read(); err != nil {
			return err
		}
	}
}

// read waits for bytes of the client and appends them to c.buf. While it waits no buffer
// is held but what has arrived.
func (c *conn) read() error {
	var n int
	var failed error
	err := c.client.Raw.Read(func(fd uintptr) bool {
		b, _ := scratch.Get().(*[scratchSize]byte)
		defer scratch.Put(b)
		for {
			n, failed = unix.Read(int(fd), b[:])
			if !errors.Is(failed, unix.EINTR) {
				break
			}
		}
		if errors.Is(failed, unix.EAGAIN) {
			failed = nil
			return false
		}
		if n > 0 {
			c.client.Took(n)
			c.buf = append(c.buf, b[:n]...)
		}
		return true
	})
	switch err := errors.Join(err, failed); {
	case c.ticket.evicted.Load():
		return refuse(Displaced, "newer connections came while it did not say where to")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refuse(HeaderTimeout, "did not say where to within %s", time.Since(c.start).Round(time.Millisecond))
	case err != nil:
		return refuse(Closed, "closed before it said where to: %v", err)
	case n == 0:
		return refuse(Closed, "closed before it said where to: %v", io.EOF)
	}
	return nil
}

// choose finds the route and counts the connection as its tenant's. Errors are refusals.
func (c *conn) choose() error {
	r := (*c.front.routes.Load())[c.serverName]
	if r == nil {
		return refuse(UnknownName, "no route for %s", c.serverName)
	}
	if c.protocol == protocolConnect && c.port != r.ConnectPort {
		return refuse(Port, "port %d of %s is not served, only %d", c.port, c.serverName, r.ConnectPort)
	}
	c.route = r
	switch reason := c.ticket.admit(r.Tenant); reason {
	case "":
		return nil
	case UnknownName:
		return refuse(reason, "no route for %s", c.serverName)
	case Displaced:
		return refuse(reason, "newer connections came while it did not say where to")
	default:
		return refuse(reason, "too many connections: %s", reason)
	}
}
