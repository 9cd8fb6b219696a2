package gateway

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

func TestOneThread(t *testing.T) {
	for _, c := range []struct {
		was  bool
		load float64
		want bool
	}{
		{false, 0, true},
		{false, 0.14, true},
		{false, 0.2, false},
		{true, 0.2, true},
		{true, 0.31, false},
		{true, 1, false},
	} {
		if got := oneThread(c.was, c.load); got != c.want {
			t.Errorf("one thread before: %t, load %.2f: %t, want %t", c.was, c.load, got, c.want)
		}
	}
}

// One thread while there is nothing to do, all of them soon after there is, and at the end.
func TestThreadsFollowTheLoad(t *testing.T) {
	t.Setenv("GOMAXPROCS", "")
	all := runtime.NumCPU()
	if all == 1 {
		t.Fatal("this machine has one processor: the test needs two")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- paceThreads(ctx) }()
	await := func(what string, want int) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); runtime.GOMAXPROCS(0) != want; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("no %s: %d", what, runtime.GOMAXPROCS(0))
			}
		}
	}
	await("one thread in a calm process", 1)
	var stop atomic.Bool
	go func() {
		for n := 0; !stop.Load(); n++ {
			_ = n
		}
	}()
	await("all threads in a busy one", all)
	stop.Store(true)
	await("one thread again", 1)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := runtime.GOMAXPROCS(0); n != all {
		t.Errorf("%d threads are left, want %d", n, all)
	}
}
