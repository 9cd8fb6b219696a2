package wireguard

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// onEveryDatapath runs a test on each datapath that the machine has.
func onEveryDatapath(t *testing.T, f func(t *testing.T, kind Datapath)) {
	t.Helper()
	for _, kind := range []Datapath{UserSpace, Kernel} {
		t.Run(string(kind), func(t *testing.T) {
			if kind == Kernel {
				requireKernel(t)
			}
			f(t, kind)
		})
	}
}

// inUserSpace runs a test of what only that datapath has, under a name by which it can be
// left out like the others.
func inUserSpace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Run(string(UserSpace), f)
}

// requireKernel skips where the kernel has no WireGuard, also under CI: which machines
// have it is not this package's to say.
func requireKernel(t *testing.T) {
	t.Helper()
	err := labtest.New(t).Host("probe").Host.Do(func() error {
		w, err := New(Options{Datapath: Kernel})
		if err != nil {
			return err
		}
		return w.Close()
	})
	if err != nil {
		t.Skipf("SKIP: %v", err)
	}
}

// newWireGuard makes a WireGuard in the host's namespace, closed at the end of the test.
func newWireGuard(t testing.TB, h *labtest.Host, kind Datapath) *WireGuard {
	t.Helper()
	var w *WireGuard
	h.Do(func() (err error) { w, err = New(Options{Datapath: kind}); return err })
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	if w.Datapath() != kind {
		t.Fatalf("datapath is %s, want %s", w.Datapath(), kind)
	}
	return w
}

// set applies and checks the number of changes, unless it is negative.
func set(t testing.TB, w *WireGuard, want int, desired ...netstate.WireGuard) {
	t.Helper()
	n, err := w.Set(context.Background(), desired)
	if err != nil {
		t.Fatal(err)
	}
	if want >= 0 && n != want {
		t.Fatalf("Set changed %d, want %d", n, want)
	}
}

// observe reads the one device.
func observe(t testing.TB, w *WireGuard) Device {
	t.Helper()
	d, err := w.Observe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(d) != 1 {
		t.Fatalf("%d devices, want 1", len(d))
	}
	return d[0]
}

type keys struct {
	private wgtypes.Key
	public  netstate.Key
}

func newKeys(t testing.TB) keys {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return keys{private: k, public: netstate.Key(k.PublicKey())}
}

func (k keys) secret() secret.Bytes { return secret.New(k.private[:]) }

func newPSK() secret.Bytes {
	b := make([]byte, 32)
	_, _ = rand.Read(b)
	return secret.New(b)
}

func ips(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// stock is a WireGuard that is not ours, configured by wg(8): in the kernel where it has
// it, else the distribution's wireguard-go.
type stock struct {
	*labtest.Host
	link string
	keys
	dir string
	pid int // of a program in user space; else 0
	t   testing.TB
}

var stockCount atomic.Int32

// newStock starts one with an inner address.
func newStock(t testing.TB, h *labtest.Host, address string) *stock {
	t.Helper()
	return newStockProgram(t, h, address, "")
}

// newStockProgram starts the given user-space program; empty: the kernel's or else the
// distribution's.
func newStockProgram(t testing.TB, h *labtest.Host, address, program string) *stock {
	t.Helper()
	// wireguard-go's control socket is in a directory that all namespaces share.
	s := &stock{
		Host: h, link: fmt.Sprintf("st%d-%d", os.Getpid()%1000000, stockCount.Add(1)), keys: newKeys(t), dir: t.TempDir(), t: t,
	}
	if program != "" || h.Host.IP("link", "add", s.link, "type", "wireguard") != nil {
		if program == "" {
			program = "wireguard-go"
		}
		labtest.Require(t, program)
		cmd, _ := h.Background(program, "-f", s.link)
		s.pid = cmd.Process.Pid
		socket := filepath.Join("/var/run/wireguard", s.link+".sock")
		labtest.Eventually(t, 5*time.Second, "wireguard-go", func() error { _, err := os.Stat(socket); return err })
		t.Cleanup(func() { _ = os.Remove(socket) })
	}
	s.wg("private-key", s.file(s.private.String()))
	h.IP("addr", "add", address, "dev", s.link)
	h.IP("link", "set", s.link, "up", "mtu", "1420")
	return s
}

func (s *stock) file(content string) string {
	f, err := os.CreateTemp(s.dir, "key")
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(content); err != nil {
		s.t.Fatal(err)
	}
	return f.Name()
}

// wg runs "wg set LINK …".
func (s *stock) wg(args ...string) {
	s.t.Helper()
	s.Run("wg", append([]string{"set", s.link}, args...)...)
}

// peer adds a peer with allowed IPs and, unless empty, an endpoint.
func (s *stock) peer(k netstate.Key, endpoint, allowed string, more ...string) {
	s.t.Helper()
	args := []string{"peer", k.String(), "allowed-ips", allowed}
	if endpoint != "" {
		args = append(args, "endpoint", endpoint)
	}
	s.wg(append(args, more...)...)
}

func (s *stock) ping(target string) error {
	out, err := s.Try("ping", "-c1", "-W1", target)
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(out))
	}
	return nil
}
