package model

import "slices"

// attach keeps what the next Parse checks changed Devices against.
func (m *Memory) attach(p *parser) {
	if m != nil {
		m.attachments, m.secrets = p.attachments, p.secrets
	}
}

// devicesChanged is the result of a Parse whose objects are those of the one before, except
// for some Devices; nil when it is not so simple. Without problems before and now, no two
// objects contradict each other, so that their order has no meaning.
func (m *Memory) devicesChanged(objects Objects, opts ParseOptions) *Model {
	gone, come := objects.Since(m.objects)
	if !allDevices(gone) || !allDevices(come) {
		return nil
	}
	going := make(map[ID]bool, len(gone))
	for _, d := range gone {
		going[d.Ref().ID] = true
	}
	result := *m.model
	result.Gateways = make([]*Gateway, len(m.model.Gateways))
	for i, g := range m.model.Gateways {
		changed := *g
		changed.Devices = make([]*Device, 0, len(g.Devices)+len(come))
		a := m.attachments[g.ID]
		a.gateway = &changed
		for _, d := range g.Devices {
			if going[d.ID] {
				a.release(d)
			} else {
				changed.Devices = append(changed.Devices, d)
			}
		}
		result.Gateways[i] = &changed
	}
	m.model = nil // until note: attachments are on their way from one snapshot to the other
	p := &parser{opts: opts, out: &result, attachments: m.attachments, secrets: m.secrets}
	if !p.moreDevices(come) {
		return nil
	}
	for _, g := range result.Gateways {
		if len(g.Devices) == 0 {
			g.Devices = nil // as where there never was one
		}
		slices.SortFunc(g.Devices, func(a, b *Device) int { return compareIDs(a.ID, b.ID) })
	}
	m.note(objects, opts, &result)
	return &result
}

func allDevices(list []Decoded) bool {
	return !slices.ContainsFunc(list, func(d Decoded) bool { return d.Kind() != KindDevice })
}

// release forgets what a device has.
func (a *attachments) release(d *Device) {
	delete(a.keys, d.PublicKey)
	for _, w := range d.Addresses {
		delete(a.addresses, w)
	}
}

// moreDevices accepts devices beside those that are there, or says that it cannot be all of
// them. The gateways' lists are sorted by ID before, and not afterwards.
func (p *parser) moreDevices(list []Decoded) bool {
	entries, names := make([]entry, len(list)), make(map[ID]bool, len(list))
	for i, d := range list {
		e := entry{Decoded: d, ref: d.Ref()}
		if names[e.ref.ID] || p.hasDevice(e.ref.ID) || !p.named(e) {
			return false
		}
		entries[i], names[e.ref.ID] = e, true
	}
	for _, e := range entries {
		p.device(e)
	}
	return len(p.problems) == 0
}

func (p *parser) hasDevice(id ID) bool {
	return slices.ContainsFunc(p.out.Gateways, func(g *Gateway) bool {
		_, found := slices.BinarySearchFunc(g.Devices, id, func(d *Device, id ID) int { return compareIDs(d.ID, id) })
		return found
	})
}
