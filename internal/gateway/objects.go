package gateway

import (
	"cmp"
	"slices"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/store"
)

// stamp gives every object without a creation time the time at which it was first seen,
// so that "first come stays" holds across restarts. The objects of last, the snapshot before,
// have theirs and are not looked at again; without one, all are. It reports whether known
// changed.
func stamp(objects, last model.Objects, known *store.Objects, now time.Time) bool {
	gone, come := objects.Since(last)
	changed := false
	left := map[string]bool{} // names that may be gone
	for _, d := range gone {
		if d.Ours() {
			left[d.Ref().String()] = true
		}
	}
	if last.Count() == 0 {
		for name := range known.FirstSeen {
			left[name] = true
		}
	}
	for _, d := range come {
		if !d.Ours() {
			continue
		}
		name := d.Ref().String()
		delete(left, name)
		first, ok := known.FirstSeen[name]
		if !ok {
			first, changed = now, true
			known.FirstSeen[name] = now
		}
		d.SetCreated(first)
	}
	if len(left) == 0 {
		return changed
	}
	for _, d := range objects.Ours() { // one of two of the same name went
		delete(left, d.Ref().String())
	}
	for name := range left {
		if _, ok := known.FirstSeen[name]; ok {
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
