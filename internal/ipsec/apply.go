package ipsec

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// sharedOwners names the connections whose pre-shared key would also admit another
// connection's peer: those with an equal remote identity and a different key. The one
// that was there before, else the first by name, stays.
func (i *IPsec) sharedOwners(next map[string]*connection) []string {
	names := slices.Sorted(maps.Keys(next))
	slices.SortStableFunc(names, func(a, b string) int { return i.rank(a) - i.rank(b) })
	first := map[string]*connection{}
	var out []string
	for _, name := range names {
		c := next[name]
		if c.owner == "" {
			continue
		}
		id := canonicalIdentity(c.owner)
		if other := first[id]; other != nil && !other.Auth.PresharedKey.Equal(c.Auth.PresharedKey) {
			out = append(out, name)
		} else {
			first[id] = c
		}
	}
	return out
}

func (i *IPsec) rank(name string) int {
	if _, ok := i.memory.Connections[name]; ok {
		return 0
	}
	return 1
}

// apply brings the daemon to i.desired. The caller holds i.set.
func (i *IPsec) apply(ctx context.Context, datapath netstate.IPsecDatapath) (int, error) {
	d, err := i.ensureDaemon(ctx, datapath)
	if err != nil {
		return 0, err
	}
	selectorsErr := errors.Join(i.setSelectors(datapath), i.selectors.dropRules())
	loaded, err := d.conn.Command(ctx, "get-conns", nil)
	if err != nil {
		return 0, err
	}
	have := loaded.List("conns")
	i.mu.Lock()
	desired := i.desired
	i.mu.Unlock()

	var gone, stale []string // ours that go, ours to be loaded
	for name := range i.memory.Connections {
		if desired[name] == nil {
			gone = append(gone, name)
		}
	}
	for _, name := range have {
		if i.opts.Socket == "" && desired[name] == nil && !slices.Contains(gone, name) {
			gone = append(gone, name)
		}
	}
	for name, c := range desired {
		if i.memory.Connections[name].Digest != c.digest || !slices.Contains(have, name) {
			stale = append(stale, name)
		}
	}
	if len(gone)+len(stale) == 0 {
		return 0, errors.Join(selectorsErr, i.loadAdopted(ctx, d))
	}
	slices.Sort(gone)
	slices.Sort(stale)
	changed, err := i.change(ctx, d, gone, stale, have)
	return changed, errors.Join(selectorsErr, err)
}

// change removes and loads connections; what fails does not stop the rest.
func (i *IPsec) change(ctx context.Context, d *daemon, gone, stale, have []string) (changed int, err error) {
	old := maps.Clone(i.memory.Connections)
	for _, name := range slices.Concat(gone, stale) {
		i.forget(name)
	}
	if err := i.memory.write(i.opts.path(memoryName)); err != nil {
		return 0, err
	}
	var errs []error
	for _, name := range gone {
		if err := d.unload(ctx, name, old[name].KeyID, i.keyInUse(old[name].KeyID)); err != nil {
			errs = append(errs, fmt.Errorf("remove connection %s: %w", name, err))
			i.remember(name, remembered{}) // tried again by the next Set
			continue
		}
		changed++
	}
	errs = append(errs, i.dropCertificates(ctx, d))
	for _, name := range stale {
		c := i.desired[name]
		r, err := i.load(ctx, d, c)
		if err == nil && slices.Contains(have, name) && old[name].Digest != c.digest {
			err = d.terminate(ctx, name)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("load connection %s: %w", name, err))
			i.refuseLoad(name, err)
			continue
		}
		if k := old[name].KeyID; k != "" && k != r.KeyID && !i.keyInUse(k) {
			errs = append(errs, ignoreRefusal(d.command(ctx, "unload-key", "id", k)))
		}
		if old[name].Digest != "" && c.owner == "" {
			errs = append(errs, ignoreRefusal(d.command(ctx, "unload-shared", "id", sharedID(name))))
		}
		i.remember(name, r)
		changed++
	}
	errs = append(errs, i.memory.write(i.opts.path(memoryName)))
	return changed, errors.Join(errs...)
}

func (i *IPsec) forget(name string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.memory.Connections, name)
	delete(i.retry, name)
	i.log.forget(name)
}

func (i *IPsec) remember(name string, r remembered) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.memory.Connections[name] = r
}

func (i *IPsec) refuseLoad(name string, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.refused[name] = invalid(err)
}

func (i *IPsec) keyInUse(id string) bool {
	for _, r := range i.memory.Connections {
		if id != "" && r.KeyID == id {
			return true
		}
	}
	return false
}

// ensureDaemon returns the running daemon of that datapath.
func (i *IPsec) ensureDaemon(ctx context.Context, datapath netstate.IPsecDatapath) (*daemon, error) {
	i.mu.Lock()
	d := i.daemon
	i.mu.Unlock()
	if d != nil {
		usable := d.datapath == datapath || i.opts.Socket != ""
		_, err := d.conn.Command(ctx, "version", nil)
		switch {
		case err == nil && usable && !d.dead():
			return d, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case usable && !d.dead(): // only the connection broke
			d.disconnect()
		default:
			if err := errors.Join(d.stop(), i.forgetDaemon()); err != nil {
				return nil, err
			}
		}
	}
	d, err := i.opts.openDaemon(ctx, datapath)
	if err != nil {
		return nil, err
	}
	// Before anything is loaded, so that no cause of a failure is missed.
	sub, err := vici.Subscribe(ctx, d.socket, subscribed...)
	if err != nil {
		d.disconnect()
		return nil, err
	}
	d.sub = make(chan *vici.Subscription, 1)
	d.sub <- sub
	i.mu.Lock()
	defer i.mu.Unlock()
	i.daemon = d
	if d.adopted && d.instance == i.memory.Instance {
		return d, nil
	}
	// It knows nothing of us yet, and whatever one before it left is of no use to it.
	i.memory.Instance = d.instance
	clear(i.loaded)
	return d, flushXFRM(i.kernel, i.memory.clear())
}

// load gives the daemon a connection's credentials and then the connection.
func (i *IPsec) load(ctx context.Context, d *daemon, c *connection) (remembered, error) {
	r := remembered{Digest: c.digest, InterfaceID: c.InterfaceID}
	if c.owner != "" {
		m := (&vici.Section{}).Set("id", sharedID(c.Name)).Set("type", "IKE").
			Set("data", string(c.Auth.PresharedKey.Reveal())).SetList("owners", c.owner)
		if _, err := d.conn.Command(ctx, "load-shared", m); err != nil {
			return r, err
		}
	} else {
		m := (&vici.Section{}).Set("type", "any").Set("data", string(c.Auth.PrivateKey.Reveal()))
		answer, err := d.conn.Command(ctx, "load-key", m)
		if err != nil {
			return r, err
		}
		r.KeyID = answer.Get("id")
		if err := i.loadCertificates(ctx, d, c.certs); err != nil {
			return r, err
		}
	}
	_, err := d.conn.Command(ctx, "load-conn", c.load)
	return r, err
}

func (i *IPsec) loadCertificates(ctx context.Context, d *daemon, certs []blob) error {
	for _, b := range certs {
		if i.loaded[b] {
			continue
		}
		m := (&vici.Section{}).Set("type", b.kind).Set("data", b.der)
		if b.flag != "" {
			m.Set("flag", b.flag)
		}
		if _, err := d.conn.Command(ctx, "load-cert", m); err != nil {
			return err
		}
		i.loaded[b] = true
	}
	return nil
}

// dropCertificates takes certificates and CRLs that no connection needs any more from a
// daemon of ours. There is no command to unload one, so all credentials are cleared and
// the ones of unchanged connections loaded again at once. An external daemon may hold
// other people's: there they stay, which lets nobody in, since every connection names
// the CA that it accepts.
func (i *IPsec) dropCertificates(ctx context.Context, d *daemon) error {
	needed := map[blob]bool{}
	for _, c := range i.desired {
		for _, b := range c.certs {
			needed[b] = true
		}
	}
	unneeded := false
	for b := range i.loaded {
		unneeded = unneeded || !needed[b]
	}
	if !unneeded || i.opts.Socket != "" {
		return nil
	}
	if _, err := d.conn.Command(ctx, "clear-creds", nil); err != nil {
		return err
	}
	clear(i.loaded)
	var errs []error
	for name := range i.memory.Connections {
		if c := i.desired[name]; c != nil {
			_, err := i.load(ctx, d, c)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// loadAdopted makes i.loaded true for a daemon that was adopted.
func (i *IPsec) loadAdopted(ctx context.Context, d *daemon) error {
	if !d.adopted {
		return nil
	}
	d.adopted = false
	for _, c := range i.desired {
		if err := i.loadCertificates(ctx, d, c.certs); err != nil {
			return err
		}
	}
	return nil
}

func sharedID(name string) string { return "culvert-" + name }

// command sends a request of keys and values.
func (d *daemon) command(ctx context.Context, name string, kv ...string) error {
	m := &vici.Section{}
	for i := 0; i+1 < len(kv); i += 2 {
		m.Set(kv[i], kv[i+1])
	}
	_, err := d.conn.Command(ctx, name, m)
	return err
}

// ignoreRefusal drops the daemon's "no": what was to be removed is not there.
func ignoreRefusal(err error) error {
	var refused *vici.CommandError
	if errors.As(err, &refused) {
		return nil
	}
	return err
}

// unload removes a connection, its credentials and its SAs.
func (d *daemon) unload(ctx context.Context, name, keyID string, keyInUse bool) error {
	errs := []error{
		ignoreRefusal(d.command(ctx, "unload-conn", "name", name)),
		ignoreRefusal(d.command(ctx, "unload-shared", "id", sharedID(name))),
	}
	if keyID != "" && !keyInUse {
		errs = append(errs, ignoreRefusal(d.command(ctx, "unload-key", "id", keyID)))
	}
	return errors.Join(append(errs, d.terminate(ctx, name))...)
}

// terminate deletes all SAs of a connection, and tells the peer, without waiting for it.
func (d *daemon) terminate(ctx context.Context, name string) error {
	err := d.command(ctx, "terminate", "ike", name, "force", "yes", "timeout", "-1")
	var refused *vici.CommandError
	if errors.As(err, &refused) && strings.Contains(refused.Message, "no matching") {
		return nil
	}
	return err
}

// setSelectors gives kernel-libipsec its addresses, or takes them away.
func (i *IPsec) setSelectors(datapath netstate.IPsecDatapath) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []netip.Prefix
	if datapath == netstate.LibIPsec {
		for _, c := range i.desired {
			all = append(all, c.LocalSelectors...)
		}
		all = append(all, i.selectors.extra...)
	}
	return i.selectors.set(all)
}

// narrowed takes in a line of the daemon's log: kernel-libipsec has no address within
// selectors that a peer narrowed. It has one afterwards, for the next attempt.
func (i *IPsec) narrowed(msg string) bool {
	m := narrowedLine.FindStringSubmatch(msg)
	if m == nil {
		return false
	}
	p, err := netip.ParsePrefix(m[1])
	if err != nil {
		return false
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range i.desired {
		for _, l := range c.LocalSelectors {
			known := slices.Contains(i.selectors.extra, p) || len(i.selectors.extra) >= maxNarrowed
			if l.Overlaps(p) && l.Bits() < p.Bits() && !known {
				i.selectors.extra = append(i.selectors.extra, p)
				return true
			}
		}
	}
	return false
}

const maxNarrowed = 4096

var narrowedLine = regexp.MustCompile(`^error installing route with policy (\S+) === \S+ out$`)
