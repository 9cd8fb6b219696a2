package gateway

import (
	"os"
	"runtime/debug"
	"sync"
)

// How much garbage the process may hold, in percent of what lives (debug.SetGCPercent).
//
// A start reads thousands of objects and makes thousands of peers, little of which is
// garbage: a collector that runs at each doubling of a few MiB costs a fifth of the time.
// Afterwards memory lies idle that the start needed; it is given back, and what each
// look at the peers leaves behind is kept small.
const (
	startGCPercent = 400
	idleGCPercent  = 50
	// With many objects an edit makes as much garbage as the process holds otherwise:
	// collecting twice for each would take a quarter of its time.
	manyGCPercent = 100
	many          = 5000
)

// saveTime lets the start take memory. It returns what to call, with the number of
// objects, when the start is over; the first call counts, and does its work in the
// background. Who has set GOGC decides himself.
func saveTime() (saveMemory func(objects int)) {
	if os.Getenv("GOGC") != "" {
		return func(int) {}
	}
	debug.SetGCPercent(startGCPercent)
	var once sync.Once
	return func(objects int) {
		once.Do(func() {
			percent := idleGCPercent
			if objects > many {
				percent = manyGCPercent
			}
			debug.SetGCPercent(percent)
			go debug.FreeOSMemory()
		})
	}
}
