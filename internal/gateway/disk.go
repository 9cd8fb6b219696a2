package gateway

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/store"
)

// disk is the backing of a standalone gateway: manifests, and a state directory.
type disk struct {
	*source.Files
	store   *store.Store
	known   store.Objects
	unsaved bool // known is not what is on disk
	last    model.Objects
	given   map[model.ID][]netip.Addr // addresses that known does not have yet; nil: none
}

func newDisk(manifests string, s *store.Store) (*disk, error) {
	d := &disk{Files: source.NewFiles(manifests), store: s}
	var err error
	d.known, err = s.Objects()
	return d, err
}

// Name implements backing.
func (d *disk) Name() string { return "manifests" }

// Read implements backing: every object has the time at which it was first seen.
func (d *disk) Read() (model.Objects, []model.Problem, error) {
	objects, problems, err := d.Files.Read()
	if err != nil {
		return objects, problems, err
	}
	if stamp(objects, d.last, &d.known, time.Now()) {
		d.unsaved = true
	}
	d.last = objects
	return objects, problems, err
}

// ParseOptions implements backing.
func (d *disk) ParseOptions(model.Objects) model.ParseOptions { return model.ParseOptions{} }

// Review implements backing.
func (d *disk) Review(problems []model.Problem) []model.Problem { return problems }

// Active implements backing: there is no other process.
func (d *disk) Active() (active, known bool) { return true, true }

// Contested implements backing.
func (d *disk) Contested() bool { return false }

// WithoutServices implements backing.
func (d *disk) WithoutServices() bool { return false }

// Hello implements backing.
func (d *disk) Hello() http.Handler { return nil }

// Identity implements backing.
func (d *disk) Identity(context.Context, *model.Gateway) (id identity, err error) {
	id.private, id.public, err = d.store.GatewayKey()
	id.endpoints = d.store.Endpoints()
	return id, err
}

// Devices implements backing: addresses are allocated here, and keys made.
func (d *disk) Devices(gw *model.Gateway, facts *plan.Facts) ([]model.Problem, error) {
	addresses, changed, problems := plan.Addresses(gw, d.known.Addresses)
	if changed {
		d.given, d.unsaved = addresses, true
	}
	facts.Addresses = addresses
	facts.DeviceKeys = map[model.ID]netstate.Key{}
	for _, dev := range gw.Devices {
		if !dev.PublicKey.IsZero() {
			continue
		}
		_, pub, err := d.store.DeviceKey(dev.ID)
		if err != nil {
			return problems, err
		}
		facts.DeviceKeys[dev.ID] = pub
	}
	return problems, nil
}

// Save implements backing. It comes after the objects were applied and before anybody is
// told: what is not on disk yet is worked out the same way after a crash.
func (d *disk) Save() error {
	if !d.unsaved {
		return nil
	}
	if d.given != nil {
		d.known.Addresses, d.given = plan.AddressBook(d.given), nil
	}
	err := d.store.SaveObjects(d.known)
	d.unsaved = err != nil
	return err
}

// SaveEndpoints implements backing.
func (d *disk) SaveEndpoints(m map[netstate.Key]netip.AddrPort) error {
	return d.store.SaveEndpoints(m)
}

// Tell implements backing: who wants to know asks the socket.
func (d *disk) Tell(account) {}

// Close implements backing.
func (d *disk) Close() error { return nil }

// lockSoon takes the lock, with some patience for a predecessor that is just ending.
func lockSoon(s *store.Store) error {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err := s.Lock(); !errors.Is(err, store.ErrLocked) || time.Now().After(deadline) {
			return err
		}
	}
}
