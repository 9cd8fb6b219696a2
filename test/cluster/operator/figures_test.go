package operator

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// TestFigures measures the operator with CULVERT_DEVICES Devices, for "make bench": all made
// at once, one more, a new process that finds everything done.
func TestFigures(t *testing.T) {
	if os.Getenv("CULVERT_BENCH") == "" {
		t.Skip("runs in make bench only")
	}
	n := deviceCount()
	ns := inNamespace(t, "figures")
	p := startOperator(t, "--alone")
	create(t, gateway(ns, func(s *v1alpha1.VPNGatewaySpec) {
		s.DeviceCIDRs = []v1alpha1.RoutedCIDR{"10.64.0.0/16", "fd00:99::/64"}
	}))
	eventually(t, 30*time.Second, func() error {
		var g v1alpha1.VPNGateway
		if err := get(&g, ns, "edge"); err != nil {
			return err
		}
		return wantPrefix(says(g.Status.Conditions, v1alpha1.ConditionAccepted), "True")
	})
	gatewayRuns(t, ns)
	start := time.Now()
	createDevices(t, ns, n)
	made := time.Since(start)
	often(t, 10*time.Minute, 500*time.Millisecond, func() error { return accepted(ns, n) })
	done := time.Since(start)

	time.Sleep(2 * time.Second)
	start = time.Now()
	create(t, device(ns, "more"))
	often(t, time.Minute, 5*time.Millisecond, func() error {
		var d v1alpha1.Device
		if err := get(&d, ns, "more"); err != nil {
			return err
		}
		if len(d.Status.Addresses) != 2 || d.Status.PublicKey == "" {
			return errors.New("no addresses or no key yet")
		}
		return nil
	})
	more := time.Since(start)
	_, most := p.residentMiB()
	if err := exact(ns); err != nil {
		t.Error(err)
	}

	p.end(syscall.SIGKILL)
	start = time.Now()
	p = startOperator(t, "--alone")
	often(t, time.Minute, 10*time.Millisecond, p.leads)
	labtest.Report(fmt.Sprintf("Operator/%d", n),
		labtest.Figure{Value: made.Seconds(), Unit: "made-s"}, labtest.Figure{Value: done.Seconds(), Unit: "all done-s"},
		labtest.Figure{Value: more.Seconds() * 1e3, Unit: "one more-ms"}, labtest.Figure{Value: time.Since(start).Seconds(), Unit: "started anew-s"},
		labtest.Figure{Value: float64(most) * (1 << 20) / 1e6, Unit: "memory-MB"})
}

// often is eventually with pauses of the caller's choice.
func often(t *testing.T, limit, pause time.Duration, check func() error) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(pause) {
		err := check()
		if err == nil {
			return
		}
		if time.Since(began) > limit {
			t.Fatalf("after %s: %v", limit, err)
		}
	}
}
