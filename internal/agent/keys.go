package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// The files of a node's keys, readable by root only, and the value of the annotation that
// the last change of the key was for.
const (
	keyFile     = "node.key"
	nextFile    = "node.key.next"
	rotatedFile = "node.key.rotated"
)

// announceFor is how long a new key is known to the others before it is used: they hear of
// it through the API server.
const announceFor = 10 * time.Second

// keys are a node's WireGuard key, and the one that it is about to change to.
type keys struct {
	dir       string
	now, next wgtypes.Key // next: zero: none
	announced time.Time   // when next was seen in the NodeTunnel; zero: not yet
}

// openKeys reads the keys, or makes the first one.
func openKeys(dir string) (*keys, error) {
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	k := &keys{dir: dir}
	var err error
	if k.next, err = readKey(filepath.Join(dir, nextFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	k.now, err = readKey(filepath.Join(dir, keyFile))
	if errors.Is(err, fs.ErrNotExist) {
		k.now, err = makeKey(filepath.Join(dir, keyFile))
	}
	return k, err
}

func readKey(file string) (wgtypes.Key, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("key of this node: %w", err)
	}
	k, err := wgtypes.ParseKey(strings.TrimSpace(string(data)))
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("key of this node: %s holds no WireGuard key: delete it, and a new one is made", file)
	}
	return k, nil
}

func makeKey(file string) (wgtypes.Key, error) {
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return k, fmt.Errorf("key of this node: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".key-*") // 0600
	if err != nil {
		return k, fmt.Errorf("key of this node: %w", err)
	}
	_, err = f.WriteString(k.String() + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return k, errors.Join(fmt.Errorf("key of this node: %w", err), os.Remove(f.Name()))
	}
	return k, nil
}

// current is the key in use.
func (k *keys) current() (secret.Bytes, netstate.Key) {
	return secret.New(k.now[:]), netstate.Key(k.now.PublicKey())
}

// spec is what the NodeTunnel should say.
func (k *keys) spec() v1alpha1.NodeTunnelSpec {
	s := v1alpha1.NodeTunnelSpec{PublicKey: v1alpha1.Key(k.now.PublicKey().String())}
	if k.next != (wgtypes.Key{}) {
		s.NextPublicKey = v1alpha1.Key(k.next.PublicKey().String())
	}
	return s
}

// asked tells whether the annotation of the NodeTunnel has another value than at the last
// change, and remembers it.
func (k *keys) asked(own *v1alpha1.NodeTunnel) (bool, error) {
	want := own.Annotations[model.RotateAnnotation]
	done, err := os.ReadFile(filepath.Join(k.dir, rotatedFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("key of this node: %w", err)
	}
	if want == "" || want == string(done) {
		return false, nil
	}
	if err := os.WriteFile(filepath.Join(k.dir, rotatedFile), []byte(want), 0o600); err != nil {
		return false, fmt.Errorf("key of this node: %w", err)
	}
	return true, nil
}

// old tells whether the key has lived long enough: up to a fifth less than its lifetime, so that
// nodes that were set up together do not all change theirs at once. The file keeps the
// time that the key was made.
func (k *keys) old(lifetime time.Duration, now time.Time) (bool, error) {
	if lifetime <= 0 {
		return false, nil
	}
	st, err := os.Stat(filepath.Join(k.dir, keyFile))
	if err != nil {
		return false, fmt.Errorf("key of this node: %w", err)
	}
	public := k.now.PublicKey() // as good as a die that is cast once for each key
	early := time.Duration(float64(lifetime) / 5 * float64(binary.BigEndian.Uint16(public[:])) / (1 << 16))
	return now.Sub(st.ModTime()) >= lifetime-early, nil
}

// rotate goes on with a change of the key: make one, have it known, use it. It begins when
// somebody asks for it, or the key has reached its lifetime (0: it never does).
func (k *keys) rotate(own *v1alpha1.NodeTunnel, lifetime time.Duration, now time.Time) error {
	if own == nil {
		return nil
	}
	if k.next == (wgtypes.Key{}) {
		asked, err := k.asked(own)
		if err != nil {
			return err
		}
		old, err := k.old(lifetime, now)
		if err != nil || !asked && !old {
			return err
		}
		k.announced = time.Time{}
		k.next, err = makeKey(filepath.Join(k.dir, nextFile))
		return err
	}
	if own.Spec.NextPublicKey != k.spec().NextPublicKey {
		return nil
	}
	if k.announced.IsZero() {
		k.announced = now
	}
	if now.Sub(k.announced) < announceFor {
		return nil
	}
	if err := os.Rename(filepath.Join(k.dir, nextFile), filepath.Join(k.dir, keyFile)); err != nil {
		return fmt.Errorf("key of this node: %w", err)
	}
	k.now, k.next = k.next, wgtypes.Key{}
	return nil
}
