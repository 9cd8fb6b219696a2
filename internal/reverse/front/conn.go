package front

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/front/preamble"
	"github.com/culvert-vpn/culvert/internal/tcpconn"
)

// How a connection says where to.
const (
	protocolTLS     = "tls"
	protocolConnect = "connect"
)

// Time limits that need no option.
const (
	writeTimeout = 5 * time.Second // for the few bytes that the front itself writes
	lingerTime   = time.Second     // for a refused client to read why
	lingerBytes  = 64 << 10
)

// conn is one connection of a client.
type conn struct {
	front  *Front
	client *tcpconn.Conn
	ticket *ticket
	start  time.Time

	peer                netip.AddrPort // the other end of the connection itself
	source, destination netip.AddrPort // as the PROXY header says, where there is one

	buf        []byte // what has arrived and is not passed on yet
	protocol   string
	serverName string
	port       uint16 // of a CONNECT request
	ech        bool
	route      *route
	target     target
	dialled    time.Duration

	fromClient, toClient atomic.Uint64 // bytes
	active               atomic.Int64  // the round of the sweep in which something moved last
	answered             atomic.Bool   // the client has answered the backend
	pumps                atomic.Int32  // directions that are not at their end

	mu      sync.Mutex
	backend *tcpconn.Conn
	ended   bool
	reason  Reason   // why it ended
	refused *refusal // after a CONNECT request was answered; nil: it was not
}

// serve takes a connection from its begin to the point where it is relayed or refused.
func (f *Front) serve(client *net.TCPConn, ticket *ticket) {
	c := &conn{front: f, client: tcpconn.New(client), ticket: ticket, start: time.Now(), peer: addrPort(client.RemoteAddr())}
	c.source, c.destination = c.peer, addrPort(client.LocalAddr())
	err := c.begin()
	if err == nil {
		err = c.choose()
	}
	if err == nil {
		err = c.dial()
	}
	if err != nil {
		c.refuse(err)
		return
	}
	c.relay()
}

// dial connects to a backend and sends what it must get first. Errors are refusals.
func (c *conn) dial() error {
	begin := time.Now()
	ctx, cancel := context.WithCancel(c.front.ctx)
	defer cancel()
	backend, target, err := c.front.dial(ctx, c.route)
	c.dialled = time.Since(begin)
	if err != nil {
		return refuse(NoBackend, "%s", err)
	}
	c.backend, c.target = tcpconn.New(backend), target
	err = c.open()
	if err != nil {
		c.target.open.Add(-1)
		tcpconn.Reset(backend)
		return refuse(NoBackend, "begin with the backend of %s: %v", c.serverName, err)
	}
	return nil
}

// open sends the PROXY header and, unless that must be looked at first, what the client
// has sent; and answers a CONNECT request.
func (c *conn) open() error {
	var first []byte
	if version := map[ProxyProtocol]int{ProxyV1: 1, ProxyV2: 2}[c.target.proxy]; version != 0 {
		var err error
		first, err = preamble.AppendProxy(nil, version, preamble.Proxied{Source: c.source, Destination: c.destination}, c.serverName)
		if err != nil {
			return err
		}
	}
	if !c.inspected() {
		first = append(first, c.buf...)
		c.received(len(c.buf))
		c.buf = nil
	}
	if err := write(c.backend, first); err != nil {
		return err
	}
	if c.protocol == protocolConnect {
		return write(c.client, []byte("HTTP/1.1 200 OK\r\n\r\n"))
	}
	return nil
}

// inspected says that what follows must be a ClientHello for the same server name.
func (c *conn) inspected() bool {
	return c.protocol == protocolConnect && c.route.Content == ContentTLS
}

func write(conn *tcpconn.Conn, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write(b); err != nil {
		return err
	}
	return conn.SetWriteDeadline(time.Time{})
}

// relay starts both directions and leaves them: their goroutines begin with small stacks,
// which is most of what an idle connection costs.
func (c *conn) relay() {
	_ = c.client.SetReadDeadline(time.Time{})
	f := c.front
	f.metrics.total.WithLabelValues(c.route.Tenant, c.protocol).Inc()
	c.answered.Store(c.route.Content == ContentTCP && c.protocol == protocolConnect)
	c.active.Store(f.tick.Load())
	c.pumps.Store(2)
	f.mu.Lock()
	f.conns[c] = struct{}{}
	f.mu.Unlock()
	if c.inspected() {
		f.wg.Go(c.inspect)
	} else {
		f.wg.Go(c.upstream)
	}
	f.wg.Go(c.downstream)
	if f.ctx.Err() != nil { // Close may have missed it
		c.end(Stopped)
	}
}

// inspect holds what follows a CONNECT request to the name that was asked for, before any
// of it reaches the backend.
func (c *conn) inspect() {
	target := c.serverName
	_ = c.client.SetReadDeadline(time.Now().Add(c.front.opts.HeaderTimeout))
	err := c.readHello()
	if err == nil && c.serverName != target {
		err = refuse(Reason(preamble.Mismatch), "the CONNECT request is for %s, the TLS ClientHello for %s", target, c.serverName)
	}
	c.serverName = target
	var refused *refusal
	if errors.As(err, &refused) && refused.reason != Closed {
		_ = write(c.client, tlsAlert(refused.reason.alert()))
		c.linger()
		c.refused = refused
		c.end(refused.reason)
		c.finish()
		return
	}
	if err == nil {
		err = write(c.backend, c.buf)
	}
	if err != nil {
		c.end(Reset)
		c.finish()
		return
	}
	c.received(len(c.buf))
	c.buf = nil
	_ = c.client.SetReadDeadline(time.Time{})
	c.upstream()
}

// upstream is the direction from the client to the backend.
func (c *conn) upstream() {
	c.pump(c.backend, c.client, func(n int) {
		c.received(n)
		if !c.answered.Load() && c.toClient.Load() > 0 {
			c.answered.Store(true)
		}
	})
}

// downstream is the direction from the backend to the client.
func (c *conn) downstream() {
	c.pump(c.client, c.backend, func(n int) {
		c.toClient.Add(uint64(n))
		c.ticket.tenant.metrics.toClient.Add(float64(n))
		c.touch()
	})
}

// received counts bytes of the client that are passed on.
func (c *conn) received(n int) {
	c.fromClient.Add(uint64(n))
	c.ticket.tenant.metrics.fromClient.Add(float64(n))
	c.touch()
}

// touch tells the sweep that something moved.
func (c *conn) touch() {
	if round := c.front.tick.Load(); c.active.Load() != round {
		c.active.Store(round)
	}
}

// pump moves bytes one way until the source ends; any other end resets both sides.
func (c *conn) pump(dst, src *tcpconn.Conn, moved func(int)) {
	if err := c.front.pipes.Copy(dst, src, moved); err != nil {
		c.end(Reset)
	}
	c.finish()
}

// end resets both sides; it may be called at any time, by anyone. The first reason counts.
func (c *conn) end(reason Reason) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	c.ended, c.reason = true, reason
	tcpconn.Reset(c.client)
	tcpconn.Reset(c.backend)
}

// finish is called at the end of each direction; the second time it closes and tells.
func (c *conn) finish() {
	if c.pumps.Add(-1) > 0 {
		return
	}
	f := c.front
	f.mu.Lock()
	delete(f.conns, c)
	f.mu.Unlock()
	c.mu.Lock()
	if !c.ended {
		c.ended, c.reason = true, Done
		_ = c.client.Close()
		_ = c.backend.Close()
	}
	c.mu.Unlock()
	c.target.open.Add(-1)
	reason, counter := c.reason, f.metrics.ended
	if c.refused != nil {
		reason, counter = c.refused.reason, f.metrics.refused
	}
	counter.WithLabelValues(c.route.Tenant, string(reason)).Inc()
	c.ticket.leave()
	c.log(reason, c.refused)
}

// refuse tells the client why, as far as its protocol can say it, and ends.
func (c *conn) refuse(err error) {
	var refused *refusal
	if !errors.As(err, &refused) {
		refused = &refusal{Closed, err.Error()}
	}
	switch {
	case refused.reason == Closed || refused.reason == Displaced || c.protocol == "":
		tcpconn.Reset(c.client)
	case c.protocol == protocolTLS:
		c.tell(tlsAlert(refused.reason.alert()))
	default:
		c.tell(httpRefusal(refused.reason, refused.text))
	}
	tenant := ""
	if c.route != nil {
		tenant = c.route.Tenant
	}
	c.front.metrics.refused.WithLabelValues(tenant, string(refused.reason)).Inc()
	c.ticket.leave()
	c.log(refused.reason, refused)
}

// tell writes b and closes so that the client can read it.
func (c *conn) tell(b []byte) {
	if write(c.client, b) == nil {
		c.linger()
	}
	_ = c.client.Close()
}

// linger ends our direction and takes what the client still sends: closing a socket with
// unread bytes would reset it, and take back what was written.
func (c *conn) linger() {
	if c.client.CloseWrite() != nil || c.client.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	b, _ := scratch.Get().(*[scratchSize]byte)
	defer scratch.Put(b)
	for total := 0; total < lingerBytes; {
		n, err := c.client.Read(b[:])
		if err != nil {
			return
		}
		total += n
	}
}

// log writes the connection's record in the access log.
func (c *conn) log(reason Reason, refused *refusal) {
	verdict, message := "relayed", ""
	if refused != nil {
		verdict, message = "refused", refused.text
	}
	level := slog.LevelInfo
	if reason == Closed && len(c.buf) == 0 {
		level = slog.LevelDebug // a load balancer's check
	}
	ctx := context.Background()
	if !c.front.opts.Access.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{slog.String("source", c.source.String())}
	text := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	if c.source != c.peer {
		text("proxy", c.peer.String())
	}
	text("protocol", c.protocol)
	text("serverName", c.serverName)
	if c.ech {
		attrs = append(attrs, slog.Bool("ech", true))
	}
	if c.route != nil {
		text("tenant", c.route.Tenant)
	}
	if c.target.backend != nil {
		text("backend", c.target.address)
	}
	text("verdict", verdict)
	text("reason", string(reason))
	text("message", message)
	attrs = append(attrs,
		slog.Uint64("bytesIn", c.fromClient.Load()), slog.Uint64("bytesOut", c.toClient.Load()),
		slog.Float64("seconds", time.Since(c.start).Seconds()), slog.Float64("dialSeconds", c.dialled.Seconds()))
	c.front.opts.Access.LogAttrs(ctx, level, "connection", attrs...)
}

// addrPort is the address of a TCP socket, IPv4 as such and without a zone.
func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		panic(fmt.Sprintf("not a TCP address: %T", a))
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
