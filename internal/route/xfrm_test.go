package route_test

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// haveXFRM tells whether the kernel makes xfrm interfaces. Where they have to be there
// (in the virtual machine of test/kernel) a kernel without them fails the test.
func haveXFRM(t *testing.T, h *labtest.Host) bool {
	t.Helper()
	err := h.Host.IP("link", "add", "try0", "type", "xfrm", "if_id", "7")
	if err == nil {
		h.IP("link", "delete", "try0")
		return true
	}
	if os.Getenv("CULVERT_KERNEL") == "1" {
		t.Fatal(err)
	}
	return false
}

func TestXFRMLinks(t *testing.T) {
	h := host(t)
	r := open(t, h)
	if !haveXFRM(t, h) {
		t.Log("this kernel has none; they are tested by test/kernel")
		_, err := r.SetLinks(t.Context(), []netstate.Link{{Name: "cvtx1", Kind: netstate.LinkXFRM, MTU: 1400, InterfaceID: 1}})
		if err == nil || !strings.Contains(err.Error(), "CONFIG_XFRM_INTERFACE") {
			t.Errorf("the error does not say what is missing: %v", err)
		}
		return
	}
	h.IP("link", "add", "foreign0", "type", "xfrm", "if_id", "99")
	before := dump(h)
	s := netstate.State{
		Links: []netstate.Link{
			{Name: "cvtx1", Kind: netstate.LinkXFRM, MTU: 1400, InterfaceID: 1, Addresses: []netip.Prefix{pfx("10.99.0.1/32"), pfx("fd00:99::1/128")}},
			{Name: "cvtx2", Kind: netstate.LinkXFRM, MTU: 1380, InterfaceID: 2},
		},
		Rules:  gatewayRules(),
		Routes: slices.Concat(tunnelRoutes("cvtx1", "10.1.0.0/16", "fd01::/48"), tunnelRoutes("cvtx2", "10.2.0.0/16", "fd02::/48")),
	}
	s.Sort()
	steady := func(what string) {
		t.Helper()
		have, err := r.Observe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		have.Links = slices.DeleteFunc(have.Links, func(l netstate.Link) bool { return l.Name == "cvt0" })
		if d := netstate.Diff(have, s); d != nil {
			t.Errorf("%s: kernel to desired:\n%s", what, strings.Join(d, "\n"))
		}
		if n := apply(t, r, s); n != 0 {
			t.Errorf("%s: the second Set made %d changes", what, n)
		}
	}
	apply(t, r, s)
	steady("first")
	_ = r.Detach()
	r = open(t, h)
	steady("restart")
	h.IP("link", "delete", "cvtx1")
	apply(t, r, s)
	steady("deleted by hand")
	s.Links[1].InterfaceID = 3 // made anew
	apply(t, r, s)
	steady("another identifier")
	s.Links = s.Links[:1]
	s.Routes = slices.DeleteFunc(s.Routes, func(x netstate.Route) bool { return x.Link == "cvtx2" })
	apply(t, r, s)
	steady("one removed")
	if _, err := r.SetLinks(t.Context(), append(slices.Clone(s.Links), netstate.Link{Name: "cvt0", Kind: netstate.LinkXFRM, InterfaceID: 8})); err == nil || !strings.Contains(err.Error(), "is of type veth, not xfrm") {
		t.Errorf("%v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, dump(h)); d != "" {
		t.Errorf("before and after:\n%s", d)
	}
}

func TestHundredXFRMLinks(t *testing.T) {
	h := host(t)
	if !haveXFRM(t, h) {
		t.Log("this kernel has none; they are tested by test/kernel")
		return
	}
	r := open(t, h)
	var s netstate.State
	for i := range 100 {
		s.Links = append(s.Links, netstate.Link{Name: fmt.Sprintf("cvtx%d", i), Kind: netstate.LinkXFRM, MTU: 1400, InterfaceID: uint32(i + 1), Addresses: []netip.Prefix{pfx(fmt.Sprintf("10.99.0.%d/32", i))}})
	}
	start := time.Now()
	apply(t, r, s)
	t.Logf("100 links made in %s", time.Since(start))
	start = time.Now()
	if n := apply(t, r, s); n != 0 {
		t.Errorf("the second Set made %d changes", n)
	}
	t.Logf("compared in %s", time.Since(start))
}
