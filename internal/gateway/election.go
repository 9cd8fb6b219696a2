package gateway

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The times of an election. Who holds the Lease works until holdFor has passed since he last
// had word with whoever could take it: the API server, or else all other pods. Another pod
// takes the Lease when it has heard nothing of its holder, on either way, for takeAfter. The
// difference is for taking down what the holder had in effect, and for clocks.
const (
	renewEvery = 500 * time.Millisecond
	helloEvery = 250 * time.Millisecond
	holdFor    = 1200 * time.Millisecond
	takeAfter  = 1500 * time.Millisecond
	// outAfter is when a pod that says nothing, while the Lease could be renewed, is taken
	// for gone: it is then no reason to stop when the API server goes, too.
	outAfter = 10 * time.Second
)

// election decides by times alone which of a gateway's pods works. It asks nobody, and has
// no clock: all times are the caller's, of one clock.
//
// The Lease alone would have a gateway stop when the API server does. So the holder also
// greets all other pods: as long as each of them answers, none of them is about to take the
// Lease, and the holder goes on.
type election struct {
	pod     string
	alone   bool // there is no other pod, and none is to come
	surplus bool // the pod is one too many, and about to be deleted

	known   bool      // the Lease was read, or nobody else can hold it
	holder  string    // of the Lease, as last read or written; empty: nobody
	version string    // of the Lease; empty: there is none
	seen    time.Time // as another: when the holder last showed that it lives
	renewed time.Time // as holder: when the last write began that succeeded
	others  map[string]acquaintance
}

// acquaintance is what the holder knows of another pod.
type acquaintance struct {
	since    time.Time // when it became one, or this pod the holder
	answered time.Time // when it was last greeted and answered; zero: never
}

// lives reports whether the pod may take the Lease when it has the chance, at a time when
// the Lease could be written.
func (a acquaintance) lives(at time.Time) bool {
	return at.Sub(a.since) < outAfter || at.Sub(a.answered) < outAfter
}

func newElection(pod string) *election {
	return &election{pod: pod, others: map[string]acquaintance{}}
}

// among says who there is: how many pods the gateway is to have, and which others there are.
func (e *election) among(replicas int, others []string, now time.Time) {
	e.surplus = ordinal(e.pod) >= replicas
	alone := replicas <= 1 && !e.surplus
	if e.alone && !alone && e.active(now) {
		// It was not written so far: there is time to do so.
		e.holder, e.renewed = e.pod, now
	}
	e.alone = alone
	maps.DeleteFunc(e.others, func(pod string, _ acquaintance) bool { return !slices.Contains(others, pod) })
	for _, pod := range others {
		if _, ok := e.others[pod]; !ok {
			e.others[pod] = acquaintance{since: now}
		}
	}
}

// ordinal is the number at the end of a pod's name, which a StatefulSet counts from 0.
func ordinal(pod string) int {
	n, err := strconv.Atoi(pod[strings.LastIndexByte(pod, '-')+1:])
	if err != nil {
		return 0
	}
	return n
}

// holds reports whether the Lease is this pod's, as far as it knows.
func (e *election) holds() bool { return e.holder == e.pod }

// active reports whether this pod is to work now.
func (e *election) active(now time.Time) bool {
	switch {
	case !e.known:
		return false
	case e.alone:
		return e.holder == "" || e.holds()
	case !e.holds() || e.renewed.IsZero():
		return false
	}
	if now.Before(e.renewed.Add(holdFor)) {
		return true
	}
	for _, o := range e.others {
		if o.lives(e.renewed) && !now.Before(o.answered.Add(holdFor)) {
			return false
		}
	}
	return true
}

// read takes in the Lease as the API server has it; version is empty when there is none.
func (e *election) read(holder, version string, now time.Time) {
	if holder != e.holder || version != e.version {
		e.seen = now
	}
	if holder == e.pod && !e.holds() {
		e.renewed = time.Time{} // of an earlier life: it counts when it is written anew
	}
	e.known, e.holder, e.version = true, holder, version
}

// wrote takes in that the Lease is this pod's, by a write that began at a time.
func (e *election) wrote(version string, began time.Time) {
	if !e.holds() || e.renewed.IsZero() {
		for pod, o := range e.others {
			o.since = began
			e.others[pod] = o
		}
	}
	e.known, e.holder, e.version, e.renewed = true, e.pod, version, began
}

// heard takes in that the holder greeted this pod.
func (e *election) heard(pod string, now time.Time) {
	if pod == e.holder && !e.holds() {
		e.seen = now
	}
}

// met takes in that another pod, greeted at a time, answered that it does not work.
func (e *election) met(pod string, began time.Time) {
	if o, ok := e.others[pod]; ok && o.answered.Before(began) {
		o.answered = began
		e.others[pod] = o
	}
}

// writeIn is after what time this pod may write the Lease as its own: at once when it is
// free. Never: it is not needed, or was not read.
func (e *election) writeIn(now time.Time) (wait time.Duration, ever bool) {
	switch {
	case !e.known, e.alone && (e.holder == "" || e.holds()), e.surplus && !e.holds():
		return 0, false
	case e.holder == "":
		return 0, true
	case e.holds():
		return e.renewed.Add(renewEvery).Sub(now), true
	}
	return e.seen.Add(takeAfter).Sub(now), true
}

// contested reports whether another pod stands by.
func (e *election) contested(now time.Time) bool {
	for _, o := range e.others {
		if now.Sub(o.answered) < takeAfter {
			return true
		}
	}
	return false
}
