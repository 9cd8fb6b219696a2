package gateway

import (
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/probe"
)

func TestChoosePath(t *testing.T) {
	now := time.Unix(10000, 0)
	up := probe.Status{Health: probe.Up, Since: now.Add(-time.Hour)}
	fresh := probe.Status{Health: probe.Up, Since: now.Add(-time.Second)}
	down := probe.Status{Health: probe.Down, Since: now.Add(-time.Minute)}
	var unknown probe.Status
	for name, c := range map[string]struct {
		list           []probe.Status
		was, preferred int
		want           int
		again          bool // looked at again before long
	}{
		"nobody has answered yet":               {[]probe.Status{unknown, unknown}, 1, 1, 1, false},
		"all up":                                {[]probe.Status{up, up}, 0, 0, 0, false},
		"the used one breaks":                   {[]probe.Status{down, up}, 0, 0, 1, false},
		"the used one breaks, others are new":   {[]probe.Status{down, unknown, up}, 0, 0, 2, false},
		"the next after the preferred":          {[]probe.Status{up, up, down}, 2, 2, 0, false},
		"the preferred one is just back":        {[]probe.Status{fresh, up}, 1, 0, 1, true},
		"the preferred one has settled":         {[]probe.Status{up, up}, 1, 0, 0, false},
		"the preferred one is back, other dead": {[]probe.Status{fresh, down}, 1, 0, 0, false},
		"none":                                  {[]probe.Status{down, down}, 0, 0, -1, false},
		"none before, one now":                  {[]probe.Status{down, fresh}, -1, 0, 1, false},
		"fewer paths than before":               {[]probe.Status{up, up}, 3, 1, 1, false},
		"not preferred, not known, still used":  {[]probe.Status{down, unknown}, 1, 0, 1, false},
	} {
		got, again := choosePath(c.list, c.was, c.preferred, now)
		if got != c.want || again.IsZero() == c.again {
			t.Errorf("%s: path %d, again %v, want %d, %t", name, got, again, c.want, c.again)
		}
		if c.again && (again.Before(now) || again.After(now.Add(settleTime))) {
			t.Errorf("%s: again at %v, now is %v", name, again, now)
		}
	}
}

func TestPathsMessage(t *testing.T) {
	if got := pathsMessage([]PathReport{{Link: "cvtwg0", Health: "up"}}); got != "" {
		t.Errorf("one path: %q", got)
	}
	got := pathsMessage([]PathReport{{Link: "cvtwg0", Health: "down"}, {Link: "cvtwg1", Health: "up", Active: true}})
	if want := "paths: cvtwg0 down, cvtwg1 up (in use)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
