package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// A key is made once and kept; it changes when it is asked to, after the next one has been
// in the NodeTunnel for a while, also when the agent restarts in between.
func TestKeyChanges(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	open := func() *keys {
		t.Helper()
		k, err := openKeys(dir)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	k := open()
	first := k.spec().PublicKey
	if again := open().spec().PublicKey; again != first {
		t.Fatalf("the key is %s, and after a restart %s", first, again)
	}
	if st, err := os.Stat(filepath.Join(dir, keyFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the key: %v, %v", st, err)
	}
	now := time.Now()
	own := &v1alpha1.NodeTunnel{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{model.RotateAnnotation: "1"}}, Spec: k.spec()}
	step := func(after time.Duration) v1alpha1.NodeTunnelSpec {
		t.Helper()
		now = now.Add(after)
		if err := k.rotate(own, 0, now); err != nil {
			t.Fatal(err)
		}
		return k.spec()
	}
	s := step(0)
	next := s.NextPublicKey
	if s.PublicKey != first || next == "" || next == first {
		t.Fatalf("asked to change: %+v, want a next key", s)
	}
	if s = step(time.Hour); s.PublicKey != first {
		t.Error("changed before the next key was published")
	}
	own.Spec = s
	k = open() // restarted
	if s = step(time.Second); s.PublicKey != first || s.NextPublicKey != next {
		t.Errorf("after a restart %+v, want the same keys", s)
	}
	if s = step(announceFor - time.Second); s.PublicKey != first {
		t.Error("changed too soon")
	}
	if s = step(time.Second); s.PublicKey != next || s.NextPublicKey != "" {
		t.Errorf("%+v, want the next key in use", s)
	}
	own.Spec = s
	if s = step(time.Hour); s.PublicKey != next || s.NextPublicKey != "" {
		t.Errorf("%+v: changed again without being asked", s)
	}
	own.Annotations[model.RotateAnnotation] = "2"
	if s = step(0); s.NextPublicKey == "" {
		t.Error("asked again, and nothing happened")
	}
}

// A key changes when it is old, each a little earlier than its lifetime says; the next one
// is young again.
func TestKeyGrowsOld(t *testing.T) {
	const lifetime = 100 * time.Hour
	ages := map[time.Duration]bool{}
	for range 8 {
		k, err := openKeys(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		own := &v1alpha1.NodeTunnel{Spec: k.spec()}
		made, age := time.Now(), time.Duration(0)
		for ; k.next == (wgtypes.Key{}); age += time.Hour {
			if err := k.rotate(own, lifetime, made.Add(age)); err != nil {
				t.Fatal(err)
			}
			if age > lifetime+time.Hour {
				t.Fatal("the key outlives its lifetime")
			}
		}
		if age < lifetime*4/5 {
			t.Errorf("changed at the age of %s", age)
		}
		ages[age] = true
		own.Spec = k.spec()
		for _, after := range []time.Duration{0, announceFor} {
			if err := k.rotate(own, lifetime, time.Now().Add(after)); err != nil {
				t.Fatal(err)
			}
		}
		own.Spec = k.spec()
		if err := k.rotate(own, lifetime, time.Now().Add(lifetime/2)); err != nil || own.Spec.NextPublicKey != "" || k.next != (wgtypes.Key{}) {
			t.Errorf("%+v, %v: want one young key", own.Spec, err)
		}
	}
	if len(ages) < 3 {
		t.Errorf("eight nodes change at the ages %v: want them spread", ages)
	}
}

func TestBrokenKeyIsNotReplaced(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, keyFile)
	if err := os.WriteFile(file, []byte("secret material\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := openKeys(dir)
	if err == nil || !strings.Contains(err.Error(), file) || strings.Contains(err.Error(), "material") {
		t.Errorf("error %v: want the file named, and nothing of what is in it", err)
	}
}
