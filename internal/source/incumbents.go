package source

import (
	"slices"

	"github.com/culvert-vpn/culvert/internal/model"
)

// Incumbents remembers the last good version of every object, so that a bad edit leaves
// in effect what was. The zero value remembers nothing; it is for one Parse at a time.
type Incumbents struct {
	good   map[model.Ref]model.Decoded
	memory model.Memory
	last   *model.Objects // the snapshot behind good; nil: not all of it is good
}

// Count is the number of objects of which a good version is known.
func (in *Incumbents) Count() int { return len(in.good) }

// Parse is model.Parse, except that an object whose new version is refused is replaced
// by its last good one. The problems are those of the new versions; kept names the
// objects whose last good version stays in effect. What opts.InEffect names is in effect
// beside what is remembered; opts.Memory is not used.
func (in *Incumbents) Parse(objects model.Objects, opts model.ParseOptions) (m *model.Model, problems []model.Problem, kept map[model.Ref]bool) {
	if m = in.memory.Changed(objects, opts); m != nil {
		in.remember(objects, m)
		return m, nil, map[model.Ref]bool{}
	}
	known := in.unchanged(objects)
	for ref, ok := range opts.InEffect {
		if _, remembered := in.good[ref]; ok && !remembered {
			known[ref] = true
		}
	}
	opts.InEffect, opts.Memory = known, &in.memory
	m = model.Parse(objects, opts)
	problems = m.Problems
	kept = map[model.Ref]bool{}
	secrets := in.changedSecrets(objects)
	for {
		var back []model.Decoded
		for _, p := range m.Problems {
			ref := model.Ref{Kind: p.Kind, ID: p.Object}
			old, ok := in.good[ref]
			if !ok || kept[ref] {
				continue
			}
			needs := old.Secrets()
			if opts.InEffect[ref] && !slices.ContainsFunc(needs, func(s model.Ref) bool { return secrets[s] }) {
				continue
			}
			kept[ref], opts.InEffect[ref] = true, true
			back = append(back, old)
			for _, s := range needs {
				if d, ok := in.good[s]; ok {
					back = append(back, d)
				}
			}
		}
		if len(back) == 0 {
			break
		}
		objects = objects.With(back...)
		m = model.Parse(objects, opts)
	}
	in.remember(objects, m)
	return m, standing(problems, m.Problems, kept), kept
}

// standing leaves out the problems of objects that are in effect as they are, now that
// what they refer to is in effect again.
func standing(problems, final []model.Problem, kept map[model.Ref]bool) []model.Problem {
	if len(kept) == 0 {
		return problems
	}
	still := map[model.Ref]bool{}
	for _, p := range final {
		still[model.Ref{Kind: p.Kind, ID: p.Object}] = true
	}
	var out []model.Problem
	for _, p := range problems {
		if ref := (model.Ref{Kind: p.Kind, ID: p.Object}); kept[ref] || still[ref] {
			out = append(out, p)
		}
	}
	return out
}

// changedSecrets names the Secrets that are gone or changed.
func (in *Incumbents) changedSecrets(objects model.Objects) map[model.Ref]bool {
	changed := map[model.Ref]bool{}
	for ref := range in.good {
		if ref.Kind == model.KindSecret {
			changed[ref] = true
		}
	}
	if len(changed) == 0 {
		return changed
	}
	for _, d := range objects.All() {
		if ref := d.Ref(); changed[ref] && d.Equal(in.good[ref]) {
			delete(changed, ref)
		}
	}
	return changed
}

// unchanged names the objects whose last good version is the one in the snapshot.
func (in *Incumbents) unchanged(objects model.Objects) map[model.Ref]bool {
	out := make(map[model.Ref]bool, len(in.good))
	for _, d := range objects.Ours() {
		if old, ok := in.good[d.Ref()]; ok && old.Equal(d) {
			out[d.Ref()] = true
		}
	}
	return out
}

// remember keeps the accepted version of every object that is in the snapshot.
func (in *Incumbents) remember(objects model.Objects, m *model.Model) {
	if len(m.Problems) == 0 && in.last != nil {
		gone, come := objects.Since(*in.last)
		for _, d := range gone {
			delete(in.good, d.Ref())
		}
		for _, d := range come {
			in.good[d.Ref()] = d
		}
		in.last = &objects
		return
	}
	list := objects.All()
	refused := map[model.Ref]bool{}
	for _, p := range m.Problems {
		refused[model.Ref{Kind: p.Kind, ID: p.Object}] = true
	}
	next := make(map[model.Ref]model.Decoded, len(list))
	for _, d := range list {
		if ref := d.Ref(); !refused[ref] {
			next[ref] = d
		}
	}
	in.good, in.last = next, nil
	if len(m.Problems) == 0 {
		in.last = &objects
	}
}

// InEffect is the version of an object that the last Parse accepted.
func (in *Incumbents) InEffect(ref model.Ref) (model.Decoded, bool) {
	d, ok := in.good[ref]
	return d, ok
}
