package gateway

import (
	"context"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A packet passes several goroutines of user-space WireGuard. With several threads each of them
// is handed to another processor, which has to wake up for it: for a lone packet that costs
// more than the work. So while there is little to do, one thread does all of it (docs/adr/0017).
const (
	oneThreadBelow  = 0.15 // processors in use
	allThreadsAbove = 0.30
	lookWithOne     = 25 * time.Millisecond // how late a burst gets all threads
	lookWithAll     = 250 * time.Millisecond
)

// paceThreads follows the process's own load until ctx ends. Who has set GOMAXPROCS decides
// himself.
func paceThreads(ctx context.Context) error {
	if os.Getenv("GOMAXPROCS") != "" || runtime.GOMAXPROCS(0) == 1 {
		<-ctx.Done()
		return nil
	}
	defer runtime.SetDefaultGOMAXPROCS()
	one := false
	used, at := processorTime(), time.Now()
	timer := time.NewTimer(lookWithAll)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		u, now := processorTime(), time.Now()
		was := one
		one = oneThread(was, float64(u-used)/float64(now.Sub(at)))
		used, at = u, now
		switch {
		case one && !was:
			runtime.GOMAXPROCS(1)
		case was && !one:
			runtime.SetDefaultGOMAXPROCS() // the processors, or fewer where the container may use fewer
		}
		if one {
			timer.Reset(lookWithOne)
		} else {
			timer.Reset(lookWithAll)
		}
	}
}

// oneThread tells whether one thread is enough, from whether it was, and from the load in
// processors. Between the two bounds all remains as it is.
func oneThread(was bool, load float64) bool {
	if was {
		return load < allThreadsAbove
	}
	return load < oneThreadBelow
}

// processorTime is what the process has used since its start.
func processorTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0 // it cannot fail with these arguments, getrusage(2)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
