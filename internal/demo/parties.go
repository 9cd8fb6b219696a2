package demo

import (
	"bufio"
	"bytes"
	"context"
	"embed"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab"
)

//go:embed manifests
var manifests embed.FS

// party is somebody with a WireGuard key.
type party struct {
	Private wgtypes.Key
	Public  wgtypes.Key
}

func newParty() (party, error) {
	k, err := wgtypes.GeneratePrivateKey()
	return party{k, k.PublicKey()}, err
}

// parties is what the manifests' templates refer to.
type parties struct {
	Gateway, Oslo, Phone, Laptop party
	PSK                          string // Berlin's
	Preshared                    string // Oslo's WireGuard pre-shared key, base64
	Web1, Web2                   string
}

func newParties() (*parties, error) {
	p := &parties{Web1: web1, Web2: web2}
	for _, x := range []*party{&p.Gateway, &p.Oslo, &p.Phone, &p.Laptop} {
		var err error
		if *x, err = newParty(); err != nil {
			return nil, err
		}
	}
	psk, err := wgtypes.GenerateKey()
	if err != nil {
		return nil, err
	}
	p.PSK = base64.RawURLEncoding.EncodeToString(psk[:])
	preshared, err := wgtypes.GenerateKey()
	p.Preshared = preshared.String()
	return p, err
}

// write fills in the manifests of one gateway ("hosting", "oslo").
func (p *parties) write(name, dir string) error {
	entries, err := manifests.ReadDir("manifests/" + name)
	if err != nil {
		return err
	}
	for _, e := range entries {
		t, err := template.ParseFS(manifests, "manifests/"+name+"/"+e.Name())
		if err != nil {
			return err
		}
		var b bytes.Buffer
		if err := t.Execute(&b, p); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, e.Name()), b.Bytes(), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// process is one running program of the demo.
type program struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// start runs a program on a host; its output goes to a file in dir.
func start(dir string, h *lab.Host, env []string, name string, args ...string) (*program, error) {
	path := filepath.Join(dir, h.Name+"-"+filepath.Base(name)+".log")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := h.Command(context.Background(), name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = f, f
	if err := h.Start(cmd); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", filepath.Base(name), h.Name, err)
	}
	p := &program{cmd: cmd, log: path, done: make(chan struct{})}
	go func() { _ = cmd.Wait(); close(p.done) }()
	return p, nil
}

// stop ends a program, politely first.
func (p *program) stop() {
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// startGateway runs "culvert gateway" on a host and waits until it has applied everything.
func startGateway(ctx context.Context, dir string, h *lab.Host, private wgtypes.Key, p *parties, name string) (*program, error) {
	conf, state := filepath.Join(dir, name, "manifests"), filepath.Join(dir, name, "state")
	for _, d := range []string{conf, state} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(state, "wireguard.key"), []byte(private.String()+"\n"), 0o600); err != nil {
		return nil, err
	}
	if err := p.write(name, conf); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	prog, err := start(dir, h, nil, self, "gateway", "--manifests", conf, "--state", state, "--http", "0.0.0.0:9586")
	if err != nil {
		return prog, err
	}
	return prog, waitFor(ctx, func() error { return ready(ctx, h) })
}

// ready asks the gateway on a host whether it is.
func ready(ctx context.Context, h *lab.Host) error {
	return h.Do(func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:9586/readyz", nil)
		if err != nil {
			return err
		}
		// A connection of its own, dialled on this thread: in the host's namespace.
		c, err := net.Dial("tcp", req.URL.Host)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		if err := req.Write(c); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("gateway on %s: not ready: %s", h.Name, resp.Status)
		}
		return nil
	})
}

// startDevice runs a stock user-space WireGuard, configured by wg(8).
func startDevice(ctx context.Context, dir string, h *lab.Host, link string, private wgtypes.Key, gateway wgtypes.Key, addrs []string, allowed string) (*program, error) {
	prog, err := start(dir, h, []string{"WG_PROCESS_FOREGROUND=1"}, "wireguard-go", "--foreground", link)
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, link+".conf")
	text := fmt.Sprintf("[Interface]\nPrivateKey = %s\n[Peer]\nPublicKey = %s\nEndpoint = %s:51820\nAllowedIPs = %s\nPersistentKeepalive = 25\n",
		private, gateway, gatewayPublic, allowed)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return prog, err
	}
	if err := waitFor(ctx, func() error { _, err := h.Output(ctx, "wg", "setconf", link, conf); return err }); err != nil {
		return prog, err
	}
	if err := h.IP("link", "set", link, "mtu", "1420"); err != nil {
		return prog, err
	}
	if err := h.Up(link, strings.Join(addrs, " ")); err != nil {
		return prog, err
	}
	for _, a := range strings.Split(allowed, ",") {
		if err := h.IP("route", "replace", strings.TrimSpace(a), "dev", link); err != nil {
			return prog, err
		}
	}
	return prog, nil
}

// startStrongSwan runs an unmodified strongSwan, configured as its manual says.
func startStrongSwan(ctx context.Context, dir string, h *lab.Host, psk string) (*program, error) {
	base := filepath.Join(dir, "berlin")
	if err := os.MkdirAll(base, 0o700); err != nil {
		return nil, err
	}
	socket := "unix://" + filepath.Join(base, "vici.sock")
	daemon := fmt.Sprintf(`charon-systemd {
  load = random nonce openssl pem pkcs1 pkcs8 x509 pubkey kernel-libipsec kernel-netlink socket-default vici updown revocation constraints hmac sha2 sha1 aes gcm gmp curve25519 chapoly kdf
  plugins { vici { socket = %s } }
  filelog { log { path = %s/charon.log
    default = 1 } }
}
`, socket, base)
	connection := fmt.Sprintf(`connections { culvert {
  version = 2
  remote_addrs = %s
  encap = yes
  keyingtries = 0
  dpd_delay = 5s
  local { auth = psk
    id = berlin.example.com }
  remote { auth = psk
    id = vpn.example.com }
  children { cluster {
    local_ts = 10.10.0.0/24
    remote_ts = 10.244.0.0/16,10.96.0.0/16
    start_action = start
    close_action = start
    dpd_action = restart
    esp_proposals = aes256gcm16-x25519 } }
  proposals = aes256gcm16-prfsha384-x25519
} }
secrets { ike { id-1 = berlin.example.com
  id-2 = vpn.example.com
  secret = "%s" } }
`, gatewayPublic, psk)
	files := map[string]string{"strongswan.conf": daemon, "swanctl.conf": connection}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(base, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	prog, err := start(dir, h, []string{"STRONGSWAN_CONF=" + filepath.Join(base, "strongswan.conf")}, "charon-systemd")
	if err != nil {
		return nil, err
	}
	return prog, waitFor(ctx, func() error {
		cmd := h.Command(ctx, "swanctl", "--load-all", "--noprompt", "--uri", socket, "--file", filepath.Join(base, "swanctl.conf"))
		cmd.Env = append(os.Environ(), "STRONGSWAN_CONF="+filepath.Join(base, "strongswan.conf"))
		out, err := outputOf(h, cmd)
		if err != nil {
			return fmt.Errorf("swanctl: %w: %s", err, out)
		}
		return nil
	})
}

func outputOf(h *lab.Host, cmd *exec.Cmd) (string, error) {
	var b strings.Builder
	cmd.Stdout, cmd.Stderr = &b, &b
	if err := h.Start(cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return b.String(), err
}

// waitFor tries every 100 ms, for 10 s at most, until f succeeds.
func waitFor(ctx context.Context, f func() error) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}
