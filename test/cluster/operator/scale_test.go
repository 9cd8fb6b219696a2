package operator

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// CULVERT_DEVICES asks for another number than what an administrator was promised.
func deviceCount() int {
	if n, err := strconv.Atoi(os.Getenv("CULVERT_DEVICES")); err == nil {
		return n
	}
	return 1000
}

// A thousand Devices at once: every one has addresses, keys and a configuration within 60 s,
// and the operator stays below 150 MiB.
func TestManyDevicesAtOnce(t *testing.T) {
	ns := inNamespace(t, "many")
	p := startOperator(t)
	create(t, gateway(ns))
	eventually(t, 30*time.Second, func() error {
		var g v1alpha1.VPNGateway
		if err := get(&g, ns, "edge"); err != nil {
			return err
		}
		return wantPrefix(says(g.Status.Conditions, v1alpha1.ConditionAccepted), "True")
	})
	gatewayRuns(t, ns)
	n := deviceCount()
	start := time.Now()
	createDevices(t, ns, n)
	created := time.Since(start)
	eventually(t, 120*time.Second, func() error { return accepted(ns, n) })
	took := time.Since(start)
	if err := exact(ns); err != nil {
		t.Error(err)
	}
	now, most := p.residentMiB()
	t.Logf("%d devices: created in %s, all done after %s; the operator has %d MiB, had %d MiB at most", n, created.Round(time.Millisecond), took.Round(time.Millisecond), now, most)
	if n <= 1000 && (took > 60*time.Second || most > 150) {
		t.Errorf("took %s, want 60 s; %d MiB, want 150", took, most)
	}
	// A new process finds everything done, and reads rather than writes.
	p.end(syscall.SIGKILL)
	versions := deviceVersions(t, ns)
	p = startOperator(t)
	eventually(t, 60*time.Second, p.leads)
	time.Sleep(2 * time.Second)
	if got := deviceVersions(t, ns); got != versions {
		t.Error("a new operator wrote to devices of which nothing changed")
	}
	now, most = p.residentMiB()
	t.Logf("restarted: %d MiB, at most %d MiB", now, most)
}

func createDevices(t *testing.T, ns string, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for worker := range 10 {
		wg.Go(func() {
			for i := worker; i < n; i += 10 {
				if err := shared.client.Create(context.Background(), device(ns, fmt.Sprintf("d%05d", i))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// accepted reports whether n devices have all that the operator gives them.
func accepted(ns string, n int) error {
	var devices v1alpha1.DeviceList
	if err := shared.client.List(context.Background(), &devices, client.InNamespace(ns)); err != nil {
		return err
	}
	done := 0
	for i := range devices.Items {
		d := &devices.Items[i]
		if says(d.Status.Conditions, v1alpha1.ConditionResolvedRefs) == "True Resolved" && len(d.Status.Addresses) == 2 && d.Status.PublicKey != "" {
			done++
		}
	}
	if done != n {
		return fmt.Errorf("%d of %d devices are done", done, n)
	}
	return nil
}

func deviceVersions(t *testing.T, ns string) string {
	t.Helper()
	var devices v1alpha1.DeviceList
	if err := shared.client.List(context.Background(), &devices, client.InNamespace(ns)); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for i := range devices.Items {
		fmt.Fprintln(&b, devices.Items[i].Name, devices.Items[i].ResourceVersion)
	}
	return b.String()
}

// 200 Devices come and go at random while the operator is killed at random: the end state
// is exact.
func TestKilledAtRandom(t *testing.T) {
	ns := inNamespace(t, "killed")
	create(t, gateway(ns), site(ns, "berlin", "192.168.1.0/24"))
	gatewayRuns(t, ns)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	ctx, cancel := context.WithCancel(t.Context())
	var killer sync.WaitGroup
	kills := 0
	var other *program
	killer.Go(func() {
		for ctx.Err() == nil {
			// Two at once, for a while: as when the one that leads does not know that it no
			// longer does. Alone, they need not wait for each other's Lease.
			p := startOperator(t, "--alone")
			if other != nil && rand.IntN(2) == 0 {
				other.end(syscall.SIGKILL)
				other = nil
			}
			select {
			case <-time.After(time.Duration(500+rand.IntN(1500)) * time.Millisecond):
			case <-ctx.Done():
			}
			kills++
			if other == nil {
				other = p
				continue
			}
			p.end(syscall.SIGKILL)
		}
		if other != nil {
			other.end(syscall.SIGKILL)
		}
	})
	present := map[string]bool{}
	for range 400 {
		name := fmt.Sprintf("d%d", random.IntN(200))
		var err error
		if present[name] {
			err = shared.client.Delete(ctx, device(ns, name))
		} else {
			err = shared.client.Create(ctx, device(ns, name))
		}
		if err != nil {
			t.Fatal(err)
		}
		present[name] = !present[name]
		time.Sleep(30 * time.Millisecond)
	}
	cancel()
	killer.Wait()
	startOperator(t)
	start := time.Now()
	eventually(t, 2*time.Minute, func() error { return exact(ns) }) // a quarter of a minute is the Lease's
	t.Logf("exact after %s", time.Since(start).Round(100*time.Millisecond))
	var devices v1alpha1.DeviceList
	if err := shared.client.List(t.Context(), &devices, client.InNamespace(ns)); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, here := range present {
		if here {
			n++
		}
	}
	if len(devices.Items) != n || kills < 3 {
		t.Errorf("%d devices, want %d; killed %d times", len(devices.Items), n, kills)
	}
	t.Logf("%d devices, the operator was killed %d times", n, kills)
}
