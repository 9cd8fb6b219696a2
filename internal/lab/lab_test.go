package lab_test

import (
	"os"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

func TestTwoHostsReachEachOtherAndAreRemoved(t *testing.T) {
	var names []string
	t.Run("network", func(t *testing.T) {
		l := labtest.New(t, "ping")
		a, b := l.Host("a"), l.Host("b")
		names = []string{a.Namespace, b.Namespace}
		l.Connect(a, "eth0", "192.0.2.1/24 2001:db8::1/64", b, "eth0", "192.0.2.2/24 2001:db8::2/64")
		a.Run("ping", "-c1", "-W1", "192.0.2.2")
		a.Run("ping", "-c1", "-W1", "2001:db8::2")
		b.Background("sleep", "1000")
	})
	for _, n := range names {
		if _, err := os.Stat("/run/netns/" + n); err == nil {
			t.Errorf("namespace %s is still there", n)
		}
	}
}

func TestRemoveTakesOnlyItsPrefix(t *testing.T) {
	labtest.Require(t, "ip")
	l, err := lab.NewUnique("one")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h, err := l.Host("h")
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Remove(strings.TrimSuffix(h.Namespace, "e-h")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/run/netns/" + h.Namespace); err != nil {
		t.Errorf("a lab of another prefix was removed: %v", err)
	}
}
