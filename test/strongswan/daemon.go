// Package strongswan gives tests an unmodified strongSwan, as the far side of an IPsec site.
package strongswan

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Daemon is an unmodified strongSwan on a host, configured as its manual says.
type Daemon struct {
	Conf string // swanctl.conf; Load puts it into effect

	t    testing.TB
	host *lab.Host
	dir  string
	cmd  *exec.Cmd
	done chan struct{}
}

const daemonConf = `charon-systemd {
  load = random nonce openssl pem pkcs1 pkcs8 x509 pubkey %s kernel-netlink socket-default vici revocation constraints hmac sha1 sha2 aes des gcm gmp curve25519 chapoly kdf
  retransmit_timeout = 1.0
  retransmit_base = 1.3
  retransmit_tries = 5
  journal {
    default = -1
  }
  filelog {
    peer {
      path = %s/charon.log
      flush_line = yes
      time_format = %%H:%%M:%%S
      default = 1
    }
  }
  plugins {
    vici {
      socket = unix://%s/vici
    }
  }
}
`

// New starts the daemon on a host and loads a swanctl.conf, if there is one.
func New(t testing.TB, h *lab.Host, conf string) *Daemon {
	t.Helper()
	labtest.Require(t, "charon-systemd", "swanctl")
	dir, err := os.MkdirTemp("", "cvtike") // short: it holds a Unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &Daemon{Conf: conf, t: t, host: h, dir: dir}
	esp := ""
	if d, _, err := ipsec.DetectDatapath(); err != nil {
		t.Fatal(err)
	} else if d == netstate.LibIPsec {
		esp = "kernel-libipsec"
	}
	for _, d := range []string{"x509", "x509ca", "x509crl", "private", "pkcs8"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.write("strongswan.conf", fmt.Sprintf(daemonConf, esp, dir, dir))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of strongSwan on %s:\n%s", h.Name, Tail(filepath.Join(dir, "charon.log"), 40))
		}
		s.Kill()
	})
	s.Start()
	return s
}

func (s *Daemon) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// Start starts the daemon and loads what it is configured with.
func (s *Daemon) Start() {
	s.t.Helper()
	_ = os.Remove(filepath.Join(s.dir, "vici"))
	cmd := s.host.Command(context.Background(), "charon-systemd")
	cmd.Env = append(os.Environ(), "STRONGSWAN_CONF="+filepath.Join(s.dir, "strongswan.conf"))
	if err := s.host.Start(cmd); err != nil {
		s.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	s.cmd, s.done = cmd, done
	labtest.Eventually(s.t, 10*time.Second, "strongSwan on "+s.host.Name+" answers", func() error {
		_, err := s.Swanctl("--stats")
		return err
	})
	s.Load()
}

// Load puts Conf into effect.
func (s *Daemon) Load() {
	s.t.Helper()
	s.write("swanctl.conf", s.Conf)
	if out, err := s.Swanctl("--load-all", "--clear", "--noprompt", "--file", filepath.Join(s.dir, "swanctl.conf")); err != nil {
		s.t.Fatalf("swanctl: %v\n%s", err, out)
	}
}

// Swanctl runs swanctl(8) against the daemon.
func (s *Daemon) Swanctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "swanctl", append(args, "--uri", "unix://"+filepath.Join(s.dir, "vici"))...)
	cmd.Env = append(os.Environ(), "SWANCTL_DIR="+s.dir, "STRONGSWAN_CONF="+filepath.Join(s.dir, "strongswan.conf"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Stop ends the daemon, which says goodbye to its peers.
func (s *Daemon) Stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	<-s.done
	s.cmd = nil
}

// Kill ends the daemon without a word to anyone.
func (s *Daemon) Kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		<-s.done
		s.cmd = nil
	}
}

// Certify makes a swanctl.conf use certificates.
func (s *Daemon) Certify(cert, key, ca string) {
	s.write("x509/own.pem", cert)
	s.write("pkcs8/own.pem", key)
	s.write("x509ca/ca.pem", ca)
	i := strings.Index(s.Conf, "secrets {")
	s.Conf = strings.NewReplacer("auth = psk", "auth = pubkey").Replace(s.Conf[:i])
	s.Conf = strings.Replace(s.Conf, "auth = pubkey", "auth = pubkey\n      certs = own.pem", 1)
	s.Load()
}

// Tail is the last n lines of a log of charon that say something.
func Tail(path string, n int) string {
	b, _ := os.ReadFile(path)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool {
		return strings.Contains(l, "[ENC]") || strings.Contains(l, "[NET]") || strings.Contains(l, "[ESP] discard")
	})
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
