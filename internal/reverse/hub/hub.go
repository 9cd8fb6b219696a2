// Package hub is the tenant's end of the reversed tunnel: it accepts spokes, and opens
// streams through them for clients.
//
// It knows nothing of files and Kubernetes: what is allowed, who it is and how requests for
// certificates are answered are given to it, and may change while it runs.
package hub

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/connect"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Settings are what may change while a hub runs. They must not be changed after Set.
type Settings struct {
	Policy policy.Policy
	// Hubs are all replicas, this one too, as spokes reach them, and ClientHubs as clients do.
	Hubs, ClientHubs []wire.HubAddress
	Exports          []Export
}

// Export is a listener at the spokes that comes out on the hub's side.
type Export struct {
	wire.Listener
	Target string // "host:port", dialled by the hub
}

// Joiner answers requests for certificates.
type Joiner interface {
	// Join issues for a token; role is that of the listener where it was asked.
	Join(ctx context.Context, role pki.Role, token string, csr []byte) (wire.JoinReply, error)
	// Renew issues for who has shown a certificate that counts.
	Renew(ctx context.Context, id pki.Identity, csr []byte) (wire.JoinReply, error)
}

// Options are what a hub is made of.
type Options struct {
	Holder  *identity.Holder
	Joiner  Joiner
	Version string
	Logger  *slog.Logger
	Meter   *meter.Meter
	// Dial is for exports; nil: net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Hub is one replica. Make it with New.
type Hub struct {
	opts     Options
	settings atomic.Pointer[Settings]
	spokes   link.Pool

	mu       sync.Mutex
	sessions map[*mux.Session]*session
	watchers map[chan struct{}]bool
	leaving  bool
}

// session is one connection of a spoke or a client.
type session struct {
	*mux.Session
	identity    pki.Identity
	certificate *x509.Certificate
	name        string // from its hello
	from        string
	since       time.Time
}

// New makes a hub that allows nothing until Set is called.
func New(opts Options) *Hub {
	h := &Hub{opts: opts, sessions: map[*mux.Session]*session{}, watchers: map[chan struct{}]bool{}}
	h.settings.Store(&Settings{})
	if h.opts.Dial == nil {
		h.opts.Dial = (&net.Dialer{}).DialContext
	}
	return h
}

// Set puts settings into effect: for new streams, and for what spokes are told.
func (h *Hub) Set(s *Settings) {
	h.settings.Store(s)
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

// Ready reports whether a stream could be opened now.
func (h *Hub) Ready() error {
	if !h.spokes.Ready() {
		return errors.New("no spoke is connected")
	}
	return nil
}

// Open opens a stream to a target for a client.
func (h *Hub) Open(ctx context.Context, target string) (*mux.Stream, wire.Opened, *wire.Refusal) {
	return h.open(ctx, target, link.DialTimeout)
}

func (h *Hub) open(ctx context.Context, target string, timeout time.Duration) (*mux.Stream, wire.Opened, *wire.Refusal) {
	t, refusal := policy.ParseTarget(target)
	if refusal == nil {
		refusal = h.settings.Load().Policy.Check(t)
	}
	if refusal != nil {
		return nil, wire.Opened{}, refusal
	}
	open := wire.Open{Kind: wire.StreamTarget, Timeout: min(timeout, link.DialTimeout), Target: t.String()}
	return h.spokes.Open(ctx, open, wire.ReasonNoSpoke)
}

// ServeSpokes accepts spokes until ctx ends.
func (h *Hub) ServeSpokes(ctx context.Context, l net.Listener) error {
	return h.serve(ctx, l, pki.Spoke, wire.ALPNSpoke, false)
}

// ServeClients accepts clients until ctx ends: sessions of egresses, and HTTP CONNECT.
func (h *Hub) ServeClients(ctx context.Context, l net.Listener) error {
	return h.serve(ctx, l, pki.Client, wire.ALPNClient, true)
}

func (h *Hub) serve(ctx context.Context, l net.Listener, role pki.Role, protocol string, plain bool) error {
	server := &connect.Server{
		Open: h.Open, Meter: h.opts.Meter, Logger: h.opts.Logger,
		TLS: func(ctx context.Context, conn *tls.Conn) { h.accept(ctx, conn, role) },
	}
	if plain {
		server.HTTP = connect.Proxy(h.Open, h.opts.Meter)
	}
	return server.Serve(ctx, tlsListener{l, identity.Server(h.opts.Holder, role, protocol, plain)}, link.DrainTimeout)
}

// tlsListener is tls.NewListener with writes that can be collected.
type tlsListener struct {
	net.Listener
	config *tls.Config
}

// Accept implements net.Listener.
func (l tlsListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return tls.Server(mux.Cork(c), l.config), nil
}

// accept serves a connection that is not HTTP.
func (h *Hub) accept(ctx context.Context, conn *tls.Conn, role pki.Role) {
	state := conn.ConnectionState()
	if state.NegotiatedProtocol == wire.ALPNJoin {
		h.join(ctx, conn, role)
		return
	}
	id, err := identity.Peer(h.opts.Holder, state, role)
	if err != nil {
		_ = conn.Close()
		return
	}
	s := &session{identity: id, certificate: state.PeerCertificates[0], from: conn.RemoteAddr().String(), since: time.Now()}
	ready := make(chan struct{})
	s.Session = mux.New(conn, mux.Config{Keepalive: link.Keepalive, DeadAfter: link.DeadAfter, Accept: func(st *mux.Stream) {
		<-ready
		h.stream(ctx, s, st)
	}})
	h.add(s)
	close(ready)
	end := context.AfterFunc(ctx, s.Close)
	defer end()
	<-s.Done()
	h.remove(s)
}

func (h *Hub) add(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sessions[s.Session] = s
	if h.leaving {
		s.GoAway()
	}
	h.count(s.identity)
}

func (h *Hub) remove(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.sessions, s.Session)
	left := h.count(s.identity)
	if left == 0 {
		h.opts.Logger.Info(string(s.identity.Role)+" gone", "name", s.identity.Name, "from", s.from, "error", s.Err())
	}
}

// count updates the number of connections of a peer, with the lock held.
func (h *Hub) count(id pki.Identity) int {
	n := 0
	for _, s := range h.sessions {
		if s.identity == id {
			n++
		}
	}
	h.opts.Meter.Sessions(string(id.Role)+"/"+id.Name, n)
	return n
}

// GoAway asks all spokes and clients to open no more streams, and closes each session when
// it carries none. It returns when all are closed or ctx ends.
func (h *Hub) GoAway(ctx context.Context) {
	h.mu.Lock()
	h.leaving = true
	for _, s := range h.sessions {
		s.GoAway()
	}
	h.mu.Unlock()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	quiet := map[*mux.Session]int{}
	for {
		left := 0
		for _, s := range h.list() {
			if s.Streams() > 1 { // one is the hello's
				quiet[s.Session] = 0
			} else if quiet[s.Session]++; quiet[s.Session] > 3 {
				s.CloseWith("the hub stops")
				continue
			}
			left++
		}
		if left == 0 {
			return
		}
		select {
		case <-ctx.Done():
			for _, s := range h.list() {
				s.CloseWith("the hub stops")
			}
			return
		case <-ticker.C:
		}
	}
}

func (h *Hub) list() []*session {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]*session, 0, len(h.sessions))
	for _, s := range h.sessions {
		out = append(out, s)
	}
	return out
}

// Recheck closes the sessions whose certificate no longer counts: expired, revoked, or
// from an authority that is gone. It returns how many.
func (h *Hub) Recheck() int {
	closed := 0
	for _, s := range h.list() {
		now := h.opts.Holder.Get()
		_, err := pki.Verify([]*x509.Certificate{s.certificate}, pki.Expect{
			UID: now.UID, Role: s.identity.Role, Authorities: now.Authorities, Revoked: now.Revoked, Now: time.Now(),
		})
		if err != nil {
			h.opts.Logger.Warn("connection closed", "peer", s.identity, "from", s.from, "error", err)
			s.CloseWith(err.Error())
			closed++
		}
	}
	return closed
}

// Peer describes who is connected.
type Peer struct {
	Role        pki.Role  `json:"role"`
	Name        string    `json:"name"`               // of the certificate
	Instance    string    `json:"instance,omitempty"` // as it calls itself
	From        string    `json:"from"`
	Since       time.Time `json:"since"`
	Connections int       `json:"connections"`
	Streams     int       `json:"streams"`
	RTT         string    `json:"rtt,omitempty"`
	Expires     time.Time `json:"certificateExpirationTime"`
}

// Peers lists who is connected, by role, name and instance.
func (h *Hub) Peers() []Peer {
	var out []Peer
	for _, s := range h.list() {
		h.mu.Lock()
		instance := s.name
		h.mu.Unlock()
		host, _, _ := net.SplitHostPort(s.from)
		p := Peer{
			Role: s.identity.Role, Name: s.identity.Name, Instance: instance, From: host, Since: s.since, Connections: 1,
			Streams: max(0, s.Streams()-1), RTT: s.RTT().Round(time.Microsecond).String(), Expires: s.certificate.NotAfter,
		}
		i := slices.IndexFunc(out, func(o Peer) bool {
			return o.Role == p.Role && o.Name == p.Name && o.Instance == p.Instance && o.From == p.From
		})
		if i < 0 {
			out = append(out, p)
			continue
		}
		o := &out[i]
		o.Connections++
		o.Streams += p.Streams
		if p.Since.Before(o.Since) {
			o.Since = p.Since
		}
	}
	slices.SortFunc(out, func(a, b Peer) int {
		return strings.Compare(string(a.Role)+"/"+a.Name+"/"+a.Instance, string(b.Role)+"/"+b.Name+"/"+b.Instance)
	})
	return out
}
