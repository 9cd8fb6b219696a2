package front

import (
	"crypto/tls"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// A successor takes over the port while clients come; those of the predecessor go on until
// they end. Where the kernel moves what a closing listener has (net.ipv4.tcp_migrate_req),
// no client is lost; elsewhere at most those whose handshake ends in that instant.
func TestSuccessor(t *testing.T) {
	for _, migrate := range []string{"0", "1"} {
		t.Run("migrate "+migrate, func(t *testing.T) {
			h := labtest.New(t).Host("host")
			h.Sysctl("net/ipv4/tcp_migrate_req", migrate)
			successor(t, h, migrate == "1")
		})
	}
}

func successor(t *testing.T, h *labtest.Host, migrates bool) {
	ca := newAuthority(t)
	cert := ca.certificate(t, "a.example.com")
	var a *server
	h.Do(func() error { a = newServer(t, "a", &cert, nil); return nil })
	path := writeFile(t, t.TempDir(), "routes.yaml", fmt.Sprintf("routes: [{serverName: a.example.com, backends: [{address: %q}]}]", a.address))
	o := childOptions{Routes: path, Listen: "127.0.0.1:8443", DrainTimeout: time.Minute}
	try := func() (conn *tls.Conn, err error) {
		err = h.Host.Do(func() error {
			conn, _, err = ca.try(o.Listen, "a.example.com")
			return err
		})
		return conn, err
	}
	start := func() (c *child) {
		h.Do(func() error { c = startChild(t, o); return nil })
		return c
	}
	first := start()
	old, err := try()
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	const clients = 4
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var mu sync.Mutex
	var served int
	var failed []error
	for range clients {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := try()
				mu.Lock()
				if err != nil {
					failed = append(failed, err)
				} else {
					served++
					_ = conn.Close()
				}
				mu.Unlock()
			}
		})
	}
	second := start()
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// The predecessor has closed its socket when it no longer takes its share: on a busy machine
	// that takes its time.
	time.Sleep(500 * time.Millisecond)
	mu.Lock()
	enough := served + 50
	mu.Unlock()
	eventually(t, 30*time.Second, "clients are served by the successor", func() error {
		mu.Lock()
		defer mu.Unlock()
		if served < enough {
			return fmt.Errorf("%d of %d", served, enough)
		}
		return nil
	})
	if err := echo(old, []byte("still here")); err != nil {
		t.Errorf("a connection of the predecessor: %v", err)
	}
	close(stop)
	wg.Wait()
	t.Logf("%d served, %d failed", served, len(failed))
	if most := map[bool]int{false: clients, true: 0}[migrates]; len(failed) > most {
		t.Errorf("%d failed: %v", len(failed), failed)
	}
	_ = old.Close()
	select {
	case err := <-first.done:
		if err != nil {
			t.Errorf("the predecessor: %v", err)
		}
	case <-time.After(30 * time.Second): // half of what it would wait for the connection
		t.Error("the predecessor is still there")
	}
	select {
	case err := <-second.done:
		t.Errorf("the successor has ended: %v", err)
	default:
	}
}
