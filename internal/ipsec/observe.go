package ipsec

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
)

// Connection is the state of one connection.
type Connection struct {
	Name string
	// Established: an IKE SA and at least one child SA are in place.
	Established bool
	// Missing names the child SAs that are configured and not in place.
	Missing []string
	// Since is when the oldest of the current child SAs was made (rekeying makes new
	// ones); zero when there is none.
	Since time.Time
	// Local and Remote are the IKE endpoints in use; invalid without an IKE SA.
	Local, Remote netip.AddrPort
	// RemoteID is the identity that the peer has proved; empty before that.
	RemoteID    string
	IKEProposal string // "AES_GCM_16-256/PRF_HMAC_SHA2_384/CURVE_25519"
	Children    []Child
	// LastFailure is why the last attempt failed; nil: none since the connection was
	// loaded or last established.
	LastFailure *Failure
}

// Child is one child SA that carries traffic.
type Child struct {
	Name            string // of its configuration
	LocalSelectors  []string
	RemoteSelectors []string
	ESPProposal     string // "AES_GCM_16-256"
	Encapsulated    bool   // in UDP (RFC 3948)
	BytesIn         uint64 // since it was made
	BytesOut        uint64
	PacketsIn       uint64
	PacketsOut      uint64
	Since           time.Time
}

// Observe returns the state of every desired connection, by name. Without a daemon they
// are all down.
func (i *IPsec) Observe(ctx context.Context) ([]Connection, error) {
	i.mu.Lock()
	d := i.daemon
	i.mu.Unlock()
	var sas map[string]*saState
	var err error
	if d != nil && !d.dead() {
		sas, err = observeSAs(ctx, d.socket)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	names := slices.Sorted(maps.Keys(i.desired))
	for name := range i.refused {
		if i.desired[name] == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	out := make([]Connection, 0, len(names))
	for _, name := range names {
		out = append(out, i.observe(name, sas[name]))
	}
	return out, err
}

func (i *IPsec) observe(name string, sa *saState) Connection {
	c := Connection{Name: name}
	if sa != nil {
		c = sa.Connection
	}
	if want := i.desired[name]; want != nil {
		for _, child := range want.children {
			if !slices.ContainsFunc(c.Children, func(x Child) bool { return x.Name == child }) {
				c.Missing = append(c.Missing, child)
			}
		}
	}
	if f, ok := i.refused[name]; ok {
		c.LastFailure = &f
	} else if f, ok := i.log.failure(name); ok {
		c.LastFailure = &f
	}
	return c
}

// saState is all IKE SAs of one connection, taken together.
type saState struct {
	Connection
	busy map[string]bool // children that are there or on their way
	// moving: an IKE SA is being set up, rekeyed or deleted, so that the rest may be
	// about to change.
	moving bool
}

// observeSAs uses a connection of its own: a deadline of its caller's ends no other.
func observeSAs(ctx context.Context, socket string) (map[string]*saState, error) {
	conn, err := vici.Dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	return listSAs(ctx, conn)
}

// listSAs asks the daemon for all SAs, by connection.
func listSAs(ctx context.Context, conn *vici.Conn) (map[string]*saState, error) {
	now := time.Now()
	out := map[string]*saState{}
	_, err := conn.Stream(ctx, "list-sas", "list-sa", nil, func(m *vici.Section) error {
		for name, sa := range m.Sections() {
			if out[name] == nil {
				out[name] = &saState{Connection: Connection{Name: name}, busy: map[string]bool{}}
			}
			out[name].add(sa, now)
		}
		return nil
	})
	return out, err
}

func (s *saState) add(sa *vici.Section, now time.Time) {
	state := sa.Get("state")
	if state != "ESTABLISHED" {
		s.moving = true
	}
	if len(sa.List("tasks-queued"))+len(sa.List("tasks-active")) > 0 {
		s.moving = true
	}
	if up := state == "ESTABLISHED" || state == "REKEYING"; up || !s.Remote.IsValid() {
		s.Local = endpoint(sa, "local")
		s.Remote = endpoint(sa, "remote")
		if up {
			s.RemoteID = sa.Get("remote-id")
			s.IKEProposal = proposal(sa, "encr", "integ", "prf")
		}
	}
	for _, child := range sa.Section("child-sas").Sections() {
		name := child.Get("name")
		switch child.Get("state") {
		case "INSTALLED", "REKEYING", "UPDATING":
			s.busy[name] = true
			s.addChild(name, child, now)
		case "CREATED", "INSTALLING", "RETRYING":
			s.busy[name] = true
		}
	}
}

// addChild keeps the newest child SA of each name; during a rekeying there are two.
func (s *saState) addChild(name string, m *vici.Section, now time.Time) {
	c := Child{
		Name: name, LocalSelectors: m.List("local-ts"), RemoteSelectors: m.List("remote-ts"),
		ESPProposal: proposal(m, "encr", "integ", ""), Encapsulated: m.Get("encap") == "yes",
		BytesIn: number(m, "bytes-in"), BytesOut: number(m, "bytes-out"),
		PacketsIn: number(m, "packets-in"), PacketsOut: number(m, "packets-out"),
		Since: now.Add(-time.Duration(number(m, "install-time")) * time.Second).Truncate(time.Second),
	}
	s.Established = true
	if s.Since.IsZero() || c.Since.Before(s.Since) {
		s.Since = c.Since
	}
	for k := range s.Children {
		if s.Children[k].Name == name {
			if c.Since.After(s.Children[k].Since) {
				s.Children[k] = c
			}
			return
		}
	}
	s.Children = append(s.Children, c)
	slices.SortFunc(s.Children, func(a, b Child) int { return strings.Compare(a.Name, b.Name) })
}

func number(m *vici.Section, key string) uint64 {
	n, _ := strconv.ParseUint(m.Get(key), 10, 64)
	return n
}

func endpoint(m *vici.Section, side string) netip.AddrPort {
	a, err := netip.ParseAddr(m.Get(side + "-host"))
	if err != nil {
		return netip.AddrPort{}
	}
	port, _ := strconv.ParseUint(m.Get(side+"-port"), 10, 16)
	return netip.AddrPortFrom(a, uint16(port))
}

// proposal joins algorithm names as the daemon prints them.
func proposal(m *vici.Section, kinds ...string) string {
	var out []string
	for _, k := range kinds {
		alg := m.Get(k + "-alg")
		if alg == "" {
			continue
		}
		if size := m.Get(k + "-keysize"); size != "" {
			alg += "-" + size
		}
		out = append(out, alg)
	}
	if dh := m.Get("dh-group"); dh != "" {
		out = append(out, dh)
	}
	return strings.Join(out, "/")
}
