package model

import (
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Memory makes a Parse cheaper that shares most objects, the very same ones, with the one
// before: Services of which nothing changed are not looked at again, and where nothing but
// endpoints changed, which is what happens all the time in a cluster, or nothing but Devices,
// of which there may be ten thousands, nothing else is. It never changes a result. The zero
// value is ready; it is for one Parse at a time.
type Memory struct {
	services map[*corev1.Service]remembered
	opts     ParseOptions // of the Parse before, without InEffect and Memory
	objects  Objects      // of the Parse before
	model    *Model       // its result; nil: it had problems

	// With a model, what its Devices were checked against, and they themselves.
	attachments map[ID]*attachments
	secrets     map[ID]*corev1.Secret
}

// remembered is what a Service without problems came to.
type remembered struct {
	slices []metav1.Object
	ports  []netstate.ServicePort
}

// lasting are the options that a later Parse must share.
func (o ParseOptions) lasting() ParseOptions {
	o.InEffect, o.Memory = nil, nil
	return o
}

// note keeps a result for the next Parse.
func (m *Memory) note(objects Objects, opts ParseOptions, result *Model) {
	if m == nil {
		return
	}
	m.opts, m.objects, m.model = opts.lasting(), objects, nil
	if len(result.Problems) == 0 {
		m.model = result
	}
}

// Changed is the result of a Parse with so little change since the one before that most
// objects need no look; nil: it takes a Parse. It has no problems, and so does not depend on
// what is InEffect.
func (m *Memory) Changed(objects Objects, opts ParseOptions) *Model {
	if m == nil || m.model == nil || !reflect.DeepEqual(m.opts, opts.lasting()) {
		return nil
	}
	if result := m.endpointsChanged(objects, opts); result != nil {
		return result
	}
	return m.devicesChanged(objects, opts)
}

// endpointsChanged is the result of a Parse whose objects are those of the one before,
// except for the content of EndpointSlices; nil when it is not so simple. Without problems
// before, no two objects contradict each other, so that their order has no meaning.
func (m *Memory) endpointsChanged(objects Objects, opts ParseOptions) *Model {
	services, ok := m.otherSlices(objects)
	if !ok {
		return nil
	}
	p := &parser{opts: opts, out: &Model{Gateways: m.model.Gateways}}
	s := &serviceParser{p: p, slices: map[ID][]entry{}, owners: map[portKey]Ref{}, next: m.services}
	var affected []entry
	for i, d := range objects.list {
		switch o := d.Object.(type) {
		case *discoveryv1.EndpointSlice:
			if id := serviceOf(o); services[id] {
				s.slices[id] = append(s.slices[id], entry{Decoded: d, ref: d.Ref(), position: i})
			}
		case *corev1.Service:
			if ref := d.Ref(); services[ref.ID] {
				affected = append(affected, entry{Decoded: d, ref: ref, position: i})
			}
		}
	}
	for _, e := range affected {
		ports := len(s.ports)
		s.service(e, e.Object.(*corev1.Service))
		if len(p.problems) > 0 {
			return nil
		}
		s.keep(e, e.Object.(*corev1.Service), s.ports[ports:])
	}
	result := *m.model
	result.Gateways = make([]*Gateway, len(m.model.Gateways))
	for i, g := range m.model.Gateways {
		changed := *g
		changed.Ports = slices.Clone(g.Ports)
		for _, x := range s.ports {
			if j, ok := slices.BinarySearchFunc(changed.Ports, x, netstate.CompareServicePorts); ok {
				changed.Ports[j] = x
			}
		}
		result.Gateways[i] = &changed
	}
	m.note(objects, opts, &result)
	return &result
}

// otherSlices names the Services with an EndpointSlice that is not the one of the Parse
// before; ok is false when anything else differs.
func (m *Memory) otherSlices(objects Objects) (services map[ID]bool, ok bool) {
	if len(objects.list) != len(m.objects.list) {
		return nil, false
	}
	services = map[ID]bool{}
	for i, d := range objects.list {
		was := m.objects.list[i]
		if d.Object == was.Object {
			continue
		}
		a, isSlice := was.Object.(*discoveryv1.EndpointSlice)
		b, stillSlice := d.Object.(*discoveryv1.EndpointSlice)
		if !isSlice || !stillSlice || was.Ref() != d.Ref() {
			return nil, false
		}
		services[serviceOf(a)], services[serviceOf(b)] = true, true
	}
	return services, true
}

// serviceOf names the Service that an EndpointSlice belongs to; no name: none.
func serviceOf(o *discoveryv1.EndpointSlice) ID {
	return ID{namespaceOf(o), o.Labels[discoveryv1.LabelServiceName]}
}

// recall takes over what a Service came to before, if nothing of it has changed.
func (s *serviceParser) recall(e entry, o *corev1.Service) bool {
	m := s.p.opts.Memory
	if m == nil || m.opts.NodeName != s.p.opts.NodeName || m.opts.Zone != s.p.opts.Zone {
		return false
	}
	was, ok := m.services[o]
	now := s.slices[e.ref.ID]
	if !ok || len(was.slices) != len(now) {
		return false
	}
	for i := range now {
		if was.slices[i] != now[i].Object {
			return false
		}
	}
	for i := range was.ports {
		x := &was.ports[i]
		if _, taken := s.owners[portKey{x.Address, x.Protocol, x.Port}]; taken || !s.inRange(x.Address) {
			return false
		}
	}
	for i := range was.ports {
		x := &was.ports[i]
		s.owners[portKey{x.Address, x.Protocol, x.Port}] = e.ref
	}
	s.ports = append(s.ports, was.ports...)
	s.next[o] = was
	return true
}

// keep notes what a Service came to, for recall.
func (s *serviceParser) keep(e entry, o *corev1.Service, ports []netstate.ServicePort) {
	r := remembered{ports: slices.Clone(ports)}
	for _, x := range s.slices[e.ref.ID] {
		r.slices = append(r.slices, x.Object)
	}
	s.next[o] = r
}
