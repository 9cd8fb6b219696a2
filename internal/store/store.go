// Package store is what a standalone gateway keeps on disk (its --state directory): keys,
// allocated addresses, the order in which objects came, and where peers were last seen.
//
//	lock             held by the one running gateway
//	wireguard.key    the gateway's private key, base64, mode 0600; made once, never replaced
//	devices/*.key    private keys of devices whose key pair was made here, mode 0600
//	objects.json     allocated addresses and first-seen times
//	endpoints.json   peers' last known endpoints
//	run/             sockets and the IKE daemon's files; of no worth after a stop
//
// Every write is atomic: a file is old or new, never half. The package knows nothing of
// Kubernetes; in a cluster the same facts live in Secrets and in status.
package store

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// Store is an open state directory.
type Store struct {
	dir  string
	lock *os.File
}

// ErrLocked means that another gateway uses the directory.
var ErrLocked = errors.New("another gateway uses it")

// Open makes the directory (mode 0700) when it is missing. It takes no lock: see Lock.
func Open(dir string) (*Store, error) {
	for _, d := range []string{dir, filepath.Join(dir, "devices"), filepath.Join(dir, "run")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("state directory: %w", err)
		}
	}
	return &Store{dir: dir}, nil
}

// Lock takes the directory for one gateway; ErrLocked when another process has it. The
// lock ends with the process.
func (s *Store) Lock() error {
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("state directory %s: %w", s.dir, ErrLocked)
		}
		return fmt.Errorf("state directory %s: lock: %w", s.dir, err)
	}
	s.lock = f
	return nil
}

// Close gives the lock back.
func (s *Store) Close() error {
	if s.lock == nil {
		return nil
	}
	return s.lock.Close()
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// RunDir is for sockets and files of child processes.
func (s *Store) RunDir() string { return s.path("run") }

// Socket is where the gateway of this directory answers "culvert status".
func (s *Store) Socket() string { return s.path("run", "culvert.sock") }

// GatewayKey reads the gateway's key, making it when there is none yet.
func (s *Store) GatewayKey() (secret.Bytes, netstate.Key, error) { return s.key("wireguard.key", true) }

// GatewayPublicKey reads the gateway's public key without making one; the zero key when
// there is none yet.
func (s *Store) GatewayPublicKey() (netstate.Key, error) {
	_, pub, err := s.key("wireguard.key", false)
	return pub, err
}

// DeviceKey reads a device's key, making it when there is none yet.
func (s *Store) DeviceKey(id model.ID) (secret.Bytes, netstate.Key, error) {
	return s.key(deviceFile(id), true)
}

// FindDeviceKey reads a device's key; zero values when none was made here.
func (s *Store) FindDeviceKey(id model.ID) (secret.Bytes, netstate.Key, error) {
	return s.key(deviceFile(id), false)
}

// RemoveDeviceKey forgets a device's key; none is not an error.
func (s *Store) RemoveDeviceKey(id model.ID) error {
	if err := os.Remove(s.path(deviceFile(id))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("key of device %s: %w", id, err)
	}
	return nil
}

// deviceFile: namespaces hold no dot, so that no two devices share a file.
func deviceFile(id model.ID) string {
	return filepath.Join("devices", id.Namespace+"."+id.Name+".key")
}

func (s *Store) key(name string, create bool) (secret.Bytes, netstate.Key, error) {
	path := s.path(name)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if !create {
			return secret.Bytes{}, netstate.Key{}, nil
		}
		return s.newKey(name)
	}
	if err != nil {
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("read key: %w", err)
	}
	private, err := wgtypes.ParseKey(strings.TrimSpace(string(b)))
	if err != nil {
		// The parser's own words may hold the key.
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("key file %s: not a WireGuard private key in base64: restore it from a backup, or remove it to have a new one made (peers must then be told)", path)
	}
	return secret.New(private[:]), netstate.Key(private.PublicKey()), nil
}

func (s *Store) newKey(name string) (secret.Bytes, netstate.Key, error) {
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("make key: %w", err)
	}
	text := base64.StdEncoding.EncodeToString(private[:]) + "\n"
	if err := s.writeNew(name, []byte(text)); err != nil {
		if errors.Is(err, fs.ErrExist) { // made by another process meanwhile
			return s.key(name, false)
		}
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("make key: %w", err)
	}
	return secret.New(private[:]), netstate.Key(private.PublicKey()), nil
}

// writeNew writes a file completely or not at all, and never replaces one.
func (s *Store) writeNew(name string, data []byte) error {
	tmp, err := s.writeTemp(name, data)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp) }()
	return os.Link(tmp, s.path(name))
}

// replace writes a file completely or not at all.
func (s *Store) replace(name string, data []byte) error {
	tmp, err := s.writeTemp(name, data)
	if err != nil {
		return err
	}
	return os.Rename(tmp, s.path(name))
}

func (s *Store) writeTemp(name string, data []byte) (string, error) {
	f, err := os.CreateTemp(filepath.Dir(s.path(name)), ".new-*") // mode 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// Objects is what must outlive a restart for the objects to mean the same again.
type Objects struct {
	// Addresses are the devices' addresses by "namespace/name".
	Addresses map[string][]netip.Addr `json:"addresses,omitempty"`
	// FirstSeen says since when an object ("Site default/berlin") has been known: of two
	// that contradict each other the older one stays in effect.
	FirstSeen map[string]time.Time `json:"firstSeen,omitempty"`
}

// Objects reads what SaveObjects wrote; empty maps when nothing was.
func (s *Store) Objects() (Objects, error) {
	o := Objects{}
	if err := s.readJSON("objects.json", &o); err != nil {
		return Objects{}, err
	}
	if o.Addresses == nil {
		o.Addresses = map[string][]netip.Addr{}
	}
	if o.FirstSeen == nil {
		o.FirstSeen = map[string]time.Time{}
	}
	return o, nil
}

// SaveObjects keeps o.
func (s *Store) SaveObjects(o Objects) error { return s.writeJSON("objects.json", o) }

// Endpoints reads what SaveEndpoints wrote; an empty map when nothing was. A damaged file
// counts as empty: it only speeds up a restart.
func (s *Store) Endpoints() map[netstate.Key]netip.AddrPort {
	var list map[string]netip.AddrPort
	out := map[netstate.Key]netip.AddrPort{}
	if err := s.readJSON("endpoints.json", &list); err != nil {
		return out
	}
	for k, v := range list {
		if key, err := netstate.ParseKey(k); err == nil {
			out[key] = v
		}
	}
	return out
}

// SaveEndpoints keeps where peers were last seen.
func (s *Store) SaveEndpoints(m map[netstate.Key]netip.AddrPort) error {
	list := make(map[string]netip.AddrPort, len(m))
	for k, v := range m {
		list[k.String()] = v
	}
	return s.writeJSON("endpoints.json", list)
}

func (s *Store) readJSON(name string, into any) error {
	b, err := os.ReadFile(s.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("state file %s: %w", s.path(name), err)
	}
	return nil
}

func (s *Store) writeJSON(name string, from any) error {
	b, err := json.Marshal(from)
	if err == nil {
		err = s.replace(name, append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("state file %s: %w", s.path(name), err)
	}
	return nil
}
