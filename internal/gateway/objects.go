package gateway

import (
	"cmp"
	"slices"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/store"
)

// incumbents remembers the last good version of every object, so that a bad edit leaves
// in effect what was.
type incumbents struct {
	good   map[model.Ref]model.Decoded
	memory model.Memory
	last   []model.Decoded // the snapshot behind good; nil: not all of it is good
}

// parse is model.Parse, except that an object whose new version is refused is replaced
// by its last good one. The problems are those of the new versions; kept names the
// objects whose last good version stays in effect.
func (in *incumbents) parse(objects model.Objects) (m *model.Model, problems []model.Problem, kept map[model.Ref]bool) {
	opts := model.ParseOptions{InEffect: in.unchanged(objects), Memory: &in.memory}
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
	return m, problems, kept
}

// changedSecrets names the Secrets that are gone or changed.
func (in *incumbents) changedSecrets(objects model.Objects) map[model.Ref]bool {
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
func (in *incumbents) unchanged(objects model.Objects) map[model.Ref]bool {
	out := make(map[model.Ref]bool, len(in.good))
	for _, d := range objects.Ours() {
		if old, ok := in.good[d.Ref()]; ok && old.Equal(d) {
			out[d.Ref()] = true
		}
	}
	return out
}

// remember keeps the accepted version of every object that is in the snapshot.
func (in *incumbents) remember(objects model.Objects, m *model.Model) {
	list := objects.All()
	if len(m.Problems) == 0 && in.last != nil {
		in.replace(in.last, list)
		in.last = list
		return
	}
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
		in.last = list
	}
}

// replace leads good from one snapshot to another; what both begin and end with stays.
func (in *incumbents) replace(from, to []model.Decoded) {
	for len(from) > 0 && len(to) > 0 && from[0] == to[0] {
		from, to = from[1:], to[1:]
	}
	for len(from) > 0 && len(to) > 0 && from[len(from)-1] == to[len(to)-1] {
		from, to = from[:len(from)-1], to[:len(to)-1]
	}
	for _, d := range from {
		delete(in.good, d.Ref())
	}
	for _, d := range to {
		in.good[d.Ref()] = d
	}
}

// stamp gives every object without a creation time the time at which it was first seen,
// so that "first come stays" holds across restarts. It reports whether known changed.
func stamp(objects model.Objects, known *store.Objects, now time.Time) bool {
	changed := false
	seen := make(map[string]bool, len(known.FirstSeen))
	for _, d := range objects.Ours() {
		name := d.Ref().String()
		seen[name] = true
		first, ok := known.FirstSeen[name]
		if !ok {
			first, changed = now, true
			known.FirstSeen[name] = now
		}
		d.SetCreated(first)
	}
	for name := range known.FirstSeen {
		if !seen[name] {
			delete(known.FirstSeen, name)
			changed = true
		}
	}
	return changed
}

// sortProblems orders problems for people: by object, then by field.
func sortProblems(problems []model.Problem) {
	slices.SortStableFunc(problems, func(a, b model.Problem) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Object.String(), b.Object.String()), cmp.Compare(a.Field, b.Field))
	})
}
