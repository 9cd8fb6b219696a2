package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/dial"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/mux"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// stream serves a stream that a spoke or a client opened.
func (h *Hub) stream(ctx context.Context, s *session, st *mux.Stream) {
	open, err := wire.ParseOpen(st.Header())
	switch {
	case err != nil:
		st.Reset(wire.Refuse(wire.ReasonMalformed, "%v", err).Append(nil))
	case open.Kind == wire.StreamHello:
		h.hello(s, st)
	case open.Kind == wire.StreamExport && s.identity.Role == pki.Spoke:
		h.export(ctx, st, open)
	case open.Kind == wire.StreamTarget && s.identity.Role == pki.Client:
		h.target(ctx, st, open)
	default:
		st.Reset(wire.Refuse(wire.ReasonDenied, "a %s may not ask for that", s.identity.Role).Append(nil))
	}
}

// target joins a client's stream with one to the target.
func (h *Hub) target(ctx context.Context, client *mux.Stream, open wire.Open) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := client.OnEnd(cancel) // who goes away needs no dial any more
	began := time.Now()
	st, opened, refusal := h.open(ctx, open.Target, open.Timeout)
	stop()
	if refusal != nil {
		h.opts.Meter.Refused(refusal.Reason)
		client.Reset(refusal.Append(nil))
		return
	}
	h.opts.Meter.Opened("target", opened.Dial, time.Since(began))
	if err := client.Accept(opened.Append(nil)); err != nil {
		_, _ = st.Close(), client.Close()
		h.opts.Meter.Closed(0, 0, mux.Cause(err))
		return
	}
	to, from, err := mux.Relay(client, st)
	meter.LogCut(h.opts.Logger, open.Target, mux.Cause(err))
	h.opts.Meter.Closed(to, from, mux.Cause(err))
}

// export dials the target of an export for a spoke.
func (h *Hub) export(ctx context.Context, st *mux.Stream, open wire.Open) {
	conn, took, refusal := h.dialExport(ctx, open)
	if refusal != nil {
		h.opts.Meter.Refused(refusal.Reason)
		st.Reset(refusal.Append(nil))
		return
	}
	h.opts.Meter.Opened("export", took, 0)
	if err := st.Accept(wire.Opened{Dial: took}.Append(nil)); err != nil {
		_, _ = conn.Close(), st.Close()
		h.opts.Meter.Closed(0, 0, mux.Cause(err))
		return
	}
	from, to, err := mux.Relay(conn, st)
	h.opts.Meter.Closed(to, from, mux.Cause(err))
}

func (h *Hub) dialExport(ctx context.Context, open wire.Open) (mux.Conn, time.Duration, *wire.Refusal) {
	for _, e := range h.settings.Load().Exports {
		if e.Name != open.Target {
			continue
		}
		t, refusal := policy.ParseTarget(e.Target)
		if refusal != nil {
			return nil, 0, refusal
		}
		d := dial.Dialer{Dial: h.opts.Dial}
		return d.Target(ctx, t, open.Timeout)
	}
	return nil, 0, wire.Refuse(wire.ReasonDenied, "there is no export %q: add it to spec.exports of RemoteCluster", open.Target)
}

// hello tells a spoke or a client of all hubs, and again when something changes.
func (h *Hub) hello(s *session, st *mux.Stream) {
	defer func() { _ = st.Close() }()
	if st.Accept(nil) != nil {
		return
	}
	var hello wire.Hello
	_ = st.SetReadDeadline(time.Now().Add(10 * time.Second))
	if wire.ReadJSON(st, &hello) != nil {
		return
	}
	changed := make(chan struct{}, 1)
	h.mu.Lock()
	h.watchers[changed] = true
	first := s.name == ""
	s.name = wire.Line(hello.Name)
	known := h.count(s.identity) > 1
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.watchers, changed)
	}()
	if first && !known {
		h.opts.Logger.Info(string(s.identity.Role)+" connected", "name", s.identity.Name, "instance", s.name, "from", s.from, "version", wire.Line(hello.Version))
	}
	if wire.WriteJSON(st, h.welcome(s.identity.Role)) != nil {
		return
	}
	if first && s.identity.Role == pki.Spoke {
		remove := h.spokes.Add(s.Session, s.identity.Name+"/"+s.name)
		defer remove()
	}
	for {
		select {
		case <-s.Done():
			return
		case <-changed:
			if wire.WriteJSON(st, h.welcome(s.identity.Role)) != nil {
				return
			}
		}
	}
}

func (h *Hub) welcome(role pki.Role) wire.Welcome {
	now := h.settings.Load()
	w := wire.Welcome{Version: h.opts.Version, Hubs: now.ClientHubs}
	if role == pki.Spoke {
		w.Hubs = now.Hubs
		for _, e := range now.Exports {
			w.Exports = append(w.Exports, e.Listener)
		}
	}
	return w
}

// joinTimeout is for the whole of a request for a certificate.
const joinTimeout = 10 * time.Second

// join answers one request for a certificate.
func (h *Hub) join(ctx context.Context, conn *tls.Conn, role pki.Role) {
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	_ = conn.SetDeadline(time.Now().Add(joinTimeout))
	var request wire.JoinRequest
	if wire.ReadJSON(conn, &request) != nil {
		return
	}
	reply, who, err := h.answerJoin(ctx, conn, role, request)
	from, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
	if err != nil {
		h.opts.Logger.Warn("request for a certificate refused", "role", role, "from", from, "error", err)
		reply = wire.JoinReply{Error: wire.Line(err.Error())}
	} else {
		h.opts.Logger.Info("certificate issued", "role", role, "from", from, "how", who)
	}
	_ = wire.WriteJSON(conn, reply)
}

func (h *Hub) answerJoin(ctx context.Context, conn *tls.Conn, role pki.Role, request wire.JoinRequest) (reply wire.JoinReply, how string, err error) {
	if h.opts.Joiner == nil {
		return reply, "", errors.New("this hub issues no certificates: ask another one")
	}
	if request.Token != "" {
		reply, err = h.opts.Joiner.Join(ctx, role, request.Token, request.CSR)
		return reply, "token", err
	}
	state := conn.ConnectionState()
	if len(state.PeerCertificates) == 0 {
		return reply, "", errors.New("neither a token nor a certificate: run 'culvert join' for a token")
	}
	id, err := identity.Peer(h.opts.Holder, state, role)
	if err != nil {
		return reply, "", err
	}
	reply, err = h.opts.Joiner.Renew(ctx, id, request.CSR)
	return reply, "renewal", err
}
