package ipsec_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// A supervised daemon goes on as long as somebody vouches for it, and starts anew, once, when
// nobody does any more.
func TestNobodyVouches(t *testing.T) {
	t.Parallel()
	labtest.Require(t, charon)
	gw := labtest.New(t).Host("gw")
	dir := filepath.Join(shortDir(t), "ike")
	socket := ipsec.Socket(dir)
	ctx, cancel := context.WithCancel(t.Context())
	var fenced atomic.Int32
	ended := make(chan error, 1)
	go func() {
		ended <- ipsec.Supervise(ctx, ipsec.Options{Dir: dir, Start: gw.Start}, datapath(t), func() error { fenced.Add(1); return nil })
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	instance := func() string {
		st, err := os.Stat(socket)
		if err != nil {
			return ""
		}
		return st.ModTime().String()
	}
	labtest.Eventually(t, 20*time.Second, "the daemon runs", func() error { _, err := os.Stat(socket); return err })
	first := instance()
	for range 10 {
		if err := ipsec.Vouch(dir, time.Now().Add(2*time.Second)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if n := fenced.Load(); n != 0 || instance() != first {
		t.Fatalf("fenced %d times while somebody vouched for it", n)
	}
	if err := ipsec.Vouch(dir, time.Now().Add(100*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 20*time.Second, "another daemon runs", func() error {
		if now := instance(); now == "" || now == first {
			return fmt.Errorf("its socket is of %q", now)
		}
		return nil
	})
	second := instance()
	time.Sleep(time.Second)
	if n := fenced.Load(); n != 1 || instance() != second {
		t.Errorf("fenced %d times, want 1", n)
	}
	// Nobody needs to vouch for what stands by.
	if err := ipsec.Vouch(dir, time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := ipsec.Vouch(dir, time.Time{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond)
	if n := fenced.Load(); n != 1 {
		t.Errorf("fenced %d times, want 1", n)
	}
}
