package gateway

import (
	"cmp"
	"slices"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/store"
)

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
