package netlab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// strongswan is an unmodified strongSwan on a host, configured as its manual says.
type strongswan struct {
	t    *testing.T
	host *labtest.Host
	dir  string
	conf string // swanctl.conf
	cmd  *exec.Cmd
	done chan struct{}
}

const strongswanConf = `charon-systemd {
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

// newStrongSwan starts the daemon on a host and loads a swanctl.conf, if there is one.
func newStrongSwan(t *testing.T, h *labtest.Host, conf string) *strongswan {
	t.Helper()
	labtest.Require(t, "charon-systemd", "swanctl")
	dir, err := os.MkdirTemp("", "cvtike") // short: it holds a Unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &strongswan{t: t, host: h, dir: dir, conf: conf}
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
	s.write("strongswan.conf", fmt.Sprintf(strongswanConf, esp, dir, dir))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of strongSwan on %s:\n%s", h.Name, tail(filepath.Join(dir, "charon.log"), 40))
		}
		s.kill()
	})
	s.start()
	return s
}

func (s *strongswan) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// start starts the daemon and loads what it is configured with.
func (s *strongswan) start() {
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
		_, err := s.swanctl("--stats")
		return err
	})
	s.load()
}

func (s *strongswan) load() {
	s.t.Helper()
	s.write("swanctl.conf", s.conf)
	if out, err := s.swanctl("--load-all", "--clear", "--noprompt", "--file", filepath.Join(s.dir, "swanctl.conf")); err != nil {
		s.t.Fatalf("swanctl: %v\n%s", err, out)
	}
}

func (s *strongswan) swanctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "swanctl", append(args, "--uri", "unix://"+filepath.Join(s.dir, "vici"))...)
	cmd.Env = append(os.Environ(), "SWANCTL_DIR="+s.dir, "STRONGSWAN_CONF="+filepath.Join(s.dir, "strongswan.conf"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// kill ends the daemon without a word to anyone.
func (s *strongswan) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		<-s.done
		s.cmd = nil
	}
}

// children has a child SA for each family, as the gateway has.
func children(cidrs string) string {
	four, six, _ := strings.Cut(cidrs, ",")
	child := func(name, local, remote string) string {
		return fmt.Sprintf(`      %s {
        local_ts = %s
        remote_ts = %s
        esp_proposals = aes256gcm16-x25519
        start_action = start
        close_action = start
        dpd_action = restart
      }
`, name, local, remote)
	}
	text := child("net4", four, "10.244.0.0/16,10.96.0.0/16")
	if six != "" {
		text += child("net6", six, "fd00:10:244::/48,fd00:10:96::/112")
	}
	return text
}

// pskConf is the swanctl.conf of a site NAME.example.com that dials the gateway at once;
// edits are pairs of old and new text.
func pskConf(name, cidrs, psk string, edits ...string) string {
	return strings.NewReplacer(edits...).Replace(fmt.Sprintf(`connections {
  culvert {
    version = 2
    remote_addrs = %s
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    dpd_delay = 2s
    local {
      auth = psk
      id = %s.example.com
    }
    remote {
      auth = psk
      id = vpn.example.com
    }
    children {
%s    }
  }
}
secrets {
  ike-gw {
    id-1 = vpn.example.com
    id-2 = %s.example.com
    secret = "%s"
  }
}
`, public, name, children(cidrs), name, psk))
}

// authority is a CA made for one test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, key: a256(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA of the sites"},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err == nil {
		a.cert, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	a.pem = encode("CERTIFICATE", der)
	return a
}

func a256(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func encode(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// issue makes a certificate for a DNS name, valid from and to a time from now.
func (a *authority) issue(serial int64, name string, from, to time.Duration) (cert, key string) {
	a.t.Helper()
	k := a256(a.t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(from), NotAfter: time.Now().Add(to), KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, k.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", keyDER)
}

// revoke makes a CRL that names a serial number.
func (a *authority) revoke(serial int64) string {
	a.t.Helper()
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(serial), RevocationTime: time.Now().Add(-time.Minute)}},
	}, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return encode("X509 CRL", der)
}
