package route_test

import (
	"context"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-vpn/culvert/internal/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// routeGet looks up the path of a plain packet.
func routeGet(r *route.Route, dst string) (route.Underlay, error) {
	return r.Lookup(netip.MustParseAddr(dst))
}

// readOnly gives the calling thread a mount namespace in which dir is read-only.
func readOnly(dir string) error {
	if err := syscall.Unshare(syscall.CLONE_NEWNS); err != nil {
		return err
	}
	if err := syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := syscall.Mount(dir, dir, "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	return syscall.Mount("none", dir, "", syscall.MS_REMOUNT|syscall.MS_BIND|syscall.MS_RDONLY, "")
}

func TestWatchTellsOfWhatIsOfInterest(t *testing.T) {
	h := host(t)
	h.IP("link", "add", "pod0", "type", "veth", "peer", "name", "pod1")
	r := open(t, h)
	apply(t, r, gateway())
	ctx, cancel := context.WithCancel(t.Context())
	changes, err := r.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Watch(ctx); err == nil {
		t.Error("a second Watch was accepted")
	}
	drain := func() {
		for {
			select {
			case <-changes:
			case <-time.After(200 * time.Millisecond):
				return
			}
		}
	}
	drain() // what apply did before Watch
	for _, c := range []struct {
		of   string
		tell bool
	}{
		{"route del 10.1.0.0/16 dev cvt0 table 19600", true},
		{"-6 route del fd01::/48 dev cvt0 table 19600", true},
		{"-6 route add fd09::/48 dev cvt0 table 19600", true},
		{"rule del priority 19602", true},
		{"-6 rule del priority 19602", true},
		{"addr del 10.99.0.1/24 dev cvt0", true},
		{"link set cvt0 mtu 1300", true},
		{"link set eth0 mtu 1400", true},
		{"route replace default via 192.0.2.2 mtu 1300", true},
		{"link add cvt7 type veth peer name pod7", true},
		{"route add 10.79.0.0/16 via 192.0.2.9 dev cvt0 onlink", true},
		{"route add 10.80.0.0/16 dev cvt0", false},
		{"addr add 10.77.0.1/24 dev pod0", false},
		{"link set pod0 mtu 1300", false},
		{"link set pod0 up", false},
		{"route add 10.78.0.0/16 via 192.0.2.2", false},
		{"rule add priority 40 lookup 40", false},
		{"link del pod0", false},
		{"link del cvt0", true},
	} {
		h.IP(strings.Fields(c.of)...)
		if c.tell {
			select {
			case <-changes:
			case <-time.After(2 * time.Second):
				t.Errorf("ip %s: nothing was told", c.of)
			}
			drain()
			continue
		}
		select {
		case <-changes:
			t.Errorf("ip %s: was told of", c.of)
			drain()
		case <-time.After(200 * time.Millisecond):
		}
	}
	cancel()
	for range changes { // closed
	}
}

// A loop that applies on every change must come to rest.
func TestWatchAndSetComeToRest(t *testing.T) {
	h := host(t)
	r := open(t, h)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changes, err := r.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, r, gateway())
	h.IP("addr", "flush", "dev", "cvt0")
	quiet := false
	for range 6 {
		select {
		case <-changes:
			apply(t, r, gateway())
		case <-time.After(400 * time.Millisecond):
			quiet = true
		}
	}
	if !quiet {
		t.Error("still changing after six rounds")
	}
	observed(t, r, gateway())
}

func TestUnderlay(t *testing.T) {
	h := host(t)
	h.IP("link", "set", "eth0", "mtu", "1450")
	h.IP("route", "add", "203.0.113.0/24", "via", "192.0.2.2", "mtu", "1300")
	h.IP("-6", "route", "add", "2001:db8:1::/48", "via", "2001:db8::2", "mtu", "1310")
	r := open(t, h)
	s := gateway()
	s.Routes = append(s.Routes, tunnelRoutes("cvt0", "198.51.100.0/24")...)
	apply(t, r, s)
	for remote, want := range map[string]route.Underlay{
		"203.0.113.7":   {Link: "eth0", LinkMTU: 1450, MTU: 1300, Source: netip.MustParseAddr("192.0.2.1"), Gateway: netip.MustParseAddr("192.0.2.2")},
		"2001:db8:1::7": {Link: "eth0", LinkMTU: 1450, MTU: 1310, Source: netip.MustParseAddr("2001:db8::1"), Gateway: netip.MustParseAddr("2001:db8::2")},
		"192.0.2.2":     {Link: "eth0", LinkMTU: 1450, MTU: 1450, Source: netip.MustParseAddr("192.0.2.1")},
		// In a tunnel's range; the outer packets do not follow it.
		"198.51.100.7": {Link: "eth0", LinkMTU: 1450, MTU: 1450, Source: netip.MustParseAddr("192.0.2.1"), Gateway: netip.MustParseAddr("192.0.2.2")},
	} {
		if got, err := r.Underlay(t.Context(), netip.MustParseAddr(remote)); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", remote, got, err, want)
		}
	}
	got, err := r.Underlay(t.Context(), netip.Addr{})
	if want := (route.Underlay{Link: "eth0", LinkMTU: 1450, MTU: 1450, Gateway: netip.MustParseAddr("192.0.2.2")}); err != nil || got != want {
		t.Errorf("default: %+v, %v", got, err)
	}
	h.IP("route", "del", "default")
	if got, err := r.Underlay(t.Context(), netip.Addr{}); err != nil || got.Gateway != netip.MustParseAddr("2001:db8::2") {
		t.Errorf("default by IPv6: %+v, %v", got, err)
	}
	h.IP("-6", "route", "del", "default")
	if _, err := r.Underlay(t.Context(), netip.Addr{}); err == nil {
		t.Error("no default route is not an error")
	}
	if _, err := r.Underlay(t.Context(), netip.MustParseAddr("8.8.8.8")); err == nil {
		t.Error("no route is not an error")
	}
}
