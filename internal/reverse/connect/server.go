// Package connect serves HTTP CONNECT, as kube-apiserver's egress selector, Prometheus,
// curl and others speak it, on any listener.
//
// The answer to a CONNECT that succeeds is exactly "200", and not one byte of the target's
// comes with it; the reason of a refusal stands in the status line, since most clients
// show nothing else.
package connect

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

const (
	// headTimeout is for the TLS handshake and the request's head together.
	headTimeout = 10 * time.Second
	// MaxConnections is how many connections are served at once; those beyond it wait in the
	// kernel's queue.
	MaxConnections = 8192
)

// Open opens a stream to a target as the client named it. The refusal is a *wire.Refusal's
// message for the client.
type Open func(ctx context.Context, target string) (*mux.Stream, wire.Opened, *wire.Refusal)

// Server serves CONNECT.
type Server struct {
	Open Open
	// HTTP serves requests with another method; nil: they are refused.
	HTTP http.Handler
	// TLS takes a connection that negotiated another application protocol than HTTP; only
	// used on connections that are *tls.Conn. Nil: none.
	TLS   func(ctx context.Context, conn *tls.Conn)
	Meter *meter.Meter
	// Logger is told of streams that were cut; nil: nobody is.
	Logger *slog.Logger
}

// Serve accepts connections until ctx ends, and then waits for those that are being served
// for at most drain; then it cuts them. It closes the listener.
func (s *Server) Serve(ctx context.Context, l net.Listener, drain time.Duration) error {
	alive, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	web := s.web(alive)
	slots := make(chan struct{}, MaxConnections)
	var wg sync.WaitGroup
	var failed error
	for {
		conn, err := l.Accept()
		if err != nil && ctx.Err() == nil && temporary(err) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			if ctx.Err() == nil {
				failed = err
			}
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			end := context.AfterFunc(alive, func() { _ = conn.Close() })
			defer end()
			s.serve(alive, conn, web)
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(drain):
		kill()
		<-done
	}
	if web != nil {
		_ = web.server.Close()
	}
	return failed
}

// temporary errors of accept pass: too many open files, a client that went away.
func temporary(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ECONNABORTED, syscall.ENOBUFS, syscall.ENOMEM, syscall.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s *Server) serve(ctx context.Context, conn net.Conn, web *webServer) {
	conn = mux.Hold(conn) // so that a cut is told to who has sent no more than this request
	_ = conn.SetDeadline(time.Now().Add(headTimeout))
	if t, ok := conn.(*tls.Conn); ok {
		if t.HandshakeContext(ctx) != nil {
			_ = conn.Close()
			return
		}
		if p := t.ConnectionState().NegotiatedProtocol; p != "" && p != wire.ALPNHTTP {
			_ = conn.SetDeadline(time.Time{})
			if s.TLS == nil {
				_ = conn.Close()
				return
			}
			s.TLS(ctx, t)
			return
		}
	}
	head, rest, refusal := readHead(conn)
	if refusal != nil && refusal.Reason == wire.ReasonNotAllowed && web != nil {
		_ = conn.SetDeadline(time.Time{})
		web.take(&prefixed{Conn: mux.Release(conn), prefix: head})
		return
	}
	var target string
	if refusal == nil {
		target, refusal = wire.ParseConnect(head)
	}
	if refusal != nil {
		s.refuse(conn, refusal)
		return
	}
	s.connect(ctx, conn, target, rest)
}

// readHead reads up to the end of the request's head. Refusals: too large, not CONNECT
// (head is then what was read), or nothing to answer to (an empty message).
func readHead(conn net.Conn) (head, rest []byte, refusal *wire.Refusal) {
	buf := make([]byte, 0, 512)
	for {
		if end := wire.HeadEnd(buf); end > 0 && end <= wire.MaxHead {
			if !wire.IsConnect(buf) {
				return buf, nil, wire.Refuse(wire.ReasonNotAllowed, "only CONNECT is served here")
			}
			return buf[:end], buf[end:], nil
		}
		if len(buf) > 0 && !wire.IsConnect(buf) {
			return buf, nil, wire.Refuse(wire.ReasonNotAllowed, "only CONNECT is served here")
		}
		if len(buf) >= wire.MaxHead {
			return nil, nil, wire.Refuse(wire.ReasonTooLarge, "the request's head has more than %d bytes", wire.MaxHead)
		}
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, cap(buf))...)[:len(buf)]
		}
		n, err := conn.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if n == 0 && err != nil {
			if len(buf) == 0 {
				return nil, nil, &wire.Refusal{Reason: wire.ReasonCancelled}
			}
			return nil, nil, wire.Refuse(wire.ReasonMalformed, "the request ended, or took more than %s, before its head was complete", headTimeout)
		}
	}
}

// refuse answers a refusal and closes the connection.
func (s *Server) refuse(conn net.Conn, r *wire.Refusal) {
	conn = mux.Release(conn)
	defer conn.Close()
	if r.Reason == wire.ReasonCancelled && r.Message == "" {
		return // a probe of the port
	}
	s.Meter.Refused(r.Reason)
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := conn.Write(Refusal(r)); err != nil {
		return
	}
	// What the client still sends must not turn the answer into a reset.
	if c, ok := conn.(mux.Conn); ok && c.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, conn, 2*wire.MaxHead)
	}
}

// Refusal is the answer to a CONNECT that is refused: the reason is in the status line.
func Refusal(r *wire.Refusal) []byte {
	text := wire.Line(r.Message)
	allow := ""
	if r.Reason == wire.ReasonNotAllowed {
		allow = "Allow: CONNECT\r\n"
	}
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\n%sCulvert-Reason: %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s\n",
		r.Reason.Status(), text, allow, r.Reason, len(text)+1, text)
}

const established = "HTTP/1.1 200 Connection established\r\n\r\n"

func (s *Server) connect(ctx context.Context, conn net.Conn, target string, rest []byte) {
	began := time.Now()
	st, opened, refusal := s.Open(ctx, target)
	if refusal != nil {
		s.refuse(conn, refusal)
		return
	}
	both, ok := conn.(mux.Conn)
	if !ok {
		_, _ = conn.Close(), st.Close()
		return
	}
	s.Meter.Opened("target", opened.Dial, time.Since(began))
	_ = conn.SetDeadline(time.Now().Add(headTimeout))
	_, err := conn.Write([]byte(established))
	if err == nil && len(rest) > 0 {
		_, err = st.Write(rest)
	}
	if err != nil {
		_, _ = conn.Close(), st.Close()
		s.Meter.Closed(0, 0, mux.Cause(err))
		return
	}
	_ = conn.SetDeadline(time.Time{})
	to, from, err := mux.RelayAfter(func() { awaitRead(conn) }, both, st)
	meter.LogCut(s.Logger, target, mux.Cause(err))
	s.Meter.Closed(to, from, mux.Cause(err))
}

// webServer serves requests that are not CONNECT, on connections that are handed to it.
type webServer struct {
	server *http.Server
	conns  chan net.Conn
	done   chan struct{}
}

func (s *Server) web(ctx context.Context) *webServer {
	if s.HTTP == nil {
		return nil
	}
	w := &webServer{conns: make(chan net.Conn), done: make(chan struct{})}
	w.server = &http.Server{
		Handler: s.HTTP, ReadHeaderTimeout: headTimeout, IdleTimeout: 90 * time.Second, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	go func() { _ = w.server.Serve(w) }()
	return w
}

// take hands a connection over and returns when it is closed.
func (w *webServer) take(c *prefixed) {
	c.closed = make(chan struct{})
	select {
	case w.conns <- c:
		<-c.closed
	case <-w.done:
		_ = c.Close()
	}
}

// Accept implements net.Listener.
func (w *webServer) Accept() (net.Conn, error) {
	select {
	case c := <-w.conns:
		return c, nil
	case <-w.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (w *webServer) Close() error {
	select {
	case <-w.done:
	default:
		close(w.done)
	}
	return nil
}

// Addr implements net.Listener.
func (*webServer) Addr() net.Addr { return &net.UnixAddr{Name: "proxy", Net: "unix"} }

// prefixed gives back what was read from a connection already.
type prefixed struct {
	net.Conn
	prefix []byte
	once   sync.Once
	closed chan struct{}
}

// Read implements net.Conn.
func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		n := copy(b, p.prefix)
		p.prefix = p.prefix[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// Close implements net.Conn.
func (p *prefixed) Close() error {
	p.once.Do(func() {
		if p.closed != nil {
			close(p.closed)
		}
	})
	return p.Conn.Close()
}

// IsAbsolute reports whether a request names a host, as clients of an HTTP proxy write it.
func IsAbsolute(r *http.Request) bool {
	return r.URL.IsAbs() && strings.EqualFold(r.URL.Scheme, "http") && r.URL.Host != ""
}
