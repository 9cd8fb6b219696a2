package ipsec_test

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

const charon = "/usr/sbin/charon-systemd"

// Most of a test's time is spent waiting for timers of the protocol, so more of them than
// there are processors run at once; not in an emulated machine.
func TestMain(m *testing.M) {
	flag.Parse()
	if !inVM() {
		_ = flag.Set("test.parallel", "8")
	}
	os.Exit(m.Run())
}

// inVM reports whether this is the emulated machine of test/kernel.
func inVM() bool { return os.Getenv("CULVERT_KERNEL") == "1" }

// peer is an unmodified strongSwan on a host of its own, configured as its users do it.
type peer struct {
	t    *testing.T
	host *labtest.Host
	dir  string
	conf string // swanctl.conf
	cmd  *exec.Cmd
}

// peerStrongswan is the peer's strongswan.conf: kernel-libipsec where there is no ESP.
const peerStrongswan = `charon-systemd {
  load = random nonce openssl pem pkcs1 pkcs8 x509 pubkey %s kernel-netlink socket-default vici revocation constraints hmac sha1 sha2 aes des gcm gmp curve25519 chapoly kdf
  make_before_break = yes
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

// newPeer starts the daemon on a host and loads a swanctl.conf.
func newPeer(t *testing.T, host *labtest.Host, conf string) *peer {
	t.Helper()
	p := &peer{t: t, host: host, dir: shortDir(t), conf: conf}
	esp := ""
	if datapath(t) == netstate.LibIPsec {
		esp = "kernel-libipsec"
	}
	p.write("strongswan.conf", fmt.Sprintf(peerStrongswan, esp, p.dir, p.dir))
	for _, d := range []string{"x509", "x509ca", "x509crl", "private", "pkcs8", "ecdsa", "rsa"} {
		if err := os.MkdirAll(filepath.Join(p.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	p.start()
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(p.dir, "charon.log"))
			t.Logf("peer's log:\n%s", tail(string(b)))
		}
	})
	return p
}

func tail(s string) string {
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-60):], "\n")
}

// shortDir is a directory whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("/tmp", "cvtike")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(d) })
	return d
}

func (p *peer) write(name, text string) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) start() {
	p.t.Helper()
	_ = os.Remove(filepath.Join(p.dir, "vici"))
	cmd := exec.Command(charon)
	cmd.Env = []string{"STRONGSWAN_CONF=" + filepath.Join(p.dir, "strongswan.conf")}
	if err := p.host.Start(cmd); err != nil {
		p.t.Fatal(err)
	}
	p.cmd = cmd
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	p.t.Cleanup(func() { _ = cmd.Process.Kill(); <-done })
	p.loadAll()
}

// kill ends the daemon without a word to anyone.
func (p *peer) kill() {
	_ = p.cmd.Process.Kill()
	time.Sleep(50 * time.Millisecond)
}

// loadAll writes and loads swanctl.conf.
func (p *peer) loadAll() {
	p.t.Helper()
	p.write("swanctl.conf", p.conf)
	labtest.Eventually(p.t, 40*time.Second, "the peer's daemon answers", func() error {
		_, err := p.swanctl("--stats")
		return err
	})
	if out, err := p.swanctl("--load-all", "--clear"); err != nil {
		p.t.Fatalf("swanctl --load-all: %v\n%s", err, out)
	}
}

func (p *peer) swanctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	args = append(args, "--uri", "unix://"+filepath.Join(p.dir, "vici"))
	if strings.HasPrefix(args[0], "--load") {
		args = append(args, "--file", filepath.Join(p.dir, "swanctl.conf"))
	}
	cmd := exec.CommandContext(ctx, "swanctl", args...)
	cmd.Env = append(os.Environ(), "SWANCTL_DIR="+p.dir, "STRONGSWAN_CONF="+filepath.Join(p.dir, "strongswan.conf"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// datapath is what this machine can do.
func datapath(t *testing.T) netstate.IPsecDatapath {
	t.Helper()
	d, _, err := ipsec.DetectDatapath()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// site is a gateway and a peer joined by a wire, each with an inner address of its own:
// 10.1.0.1 behind the gateway, 10.2.0.1 behind the peer.
type site struct {
	t      *testing.T
	lab    *labtest.Lab
	gw     *labtest.Host
	remote *labtest.Host
	ike    *ipsec.IPsec
	dir    string
	state  *netstate.IPsec
}

const (
	gwOuter, peerOuter = "192.0.2.1", "192.0.2.2"
	gwInner, peerInner = "10.1.0.1", "10.2.0.1"
	psk                = "correct horse battery staple"
)

// newSite makes the lab and the applier, without a peer or connections.
func newSite(t *testing.T) *site {
	t.Helper()
	t.Parallel()
	labtest.Require(t, charon, "swanctl", "ping")
	s := &site{t: t, lab: labtest.New(t), dir: shortDir(t)}
	s.gw, s.remote = s.lab.Host("gw"), s.lab.Host("peer")
	s.lab.Connect(s.gw, "eth0", gwOuter+"/24", s.remote, "eth0", peerOuter+"/24")
	s.gw.IP("addr", "add", gwInner+"/32", "dev", "lo")
	for _, a := range []string{peerInner, "10.3.0.1", "10.4.0.1"} {
		s.remote.IP("addr", "add", a+"/32", "dev", "lo")
	}
	s.ike = s.open()
	s.state = &netstate.IPsec{Datapath: datapath(t)}
	return s
}

// open makes an applier for the site's directory, as a new process would.
func (s *site) open() *ipsec.IPsec {
	s.t.Helper()
	var i *ipsec.IPsec
	s.gw.Do(func() (err error) {
		i, err = ipsec.New(ipsec.Options{Dir: filepath.Join(s.dir, "ike"), Start: s.gw.Start})
		return err
	})
	s.t.Cleanup(func() {
		if s.t.Failed() {
			b, _ := os.ReadFile(filepath.Join(s.dir, "ike", "charon.log"))
			s.t.Logf("our daemon's log:\n%s", tail(string(b)))
		}
		if err := i.Close(); err != nil {
			s.t.Errorf("Close: %v", err)
		}
	})
	return i
}

// connection is a connection with the usual settings; edit it before set.
func (s *site) connection() netstate.IPsecConnection {
	c := netstate.IPsecConnection{
		Name: "site", LocalAddresses: []string{gwOuter}, RemoteAddresses: []string{peerOuter},
		LocalID: "gw.example", RemoteID: "peer.example",
		Auth:            netstate.IPsecAuth{PresharedKey: secret.New([]byte(psk))},
		LocalSelectors:  prefixes("10.1.0.0/16"),
		RemoteSelectors: prefixes("10.2.0.0/16"),
		Initiate:        netstate.InitiateAlways,
		DPDDelay:        2 * time.Second,
		Link:            netstate.LibIPsecLink,
	}
	if s.state.Datapath == netstate.KernelESP {
		c.Link, c.InterfaceID = "cvtx1", 7
	}
	return c
}

func prefixes(p ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, x := range p {
		out = append(out, netip.MustParsePrefix(x))
	}
	return out
}

// set applies connections and routes their remote ranges, as internal/route would.
func (s *site) set(connections ...netstate.IPsecConnection) int {
	s.t.Helper()
	s.state.Connections = connections
	changed := s.try()
	s.route()
	return changed
}

func (s *site) try() int {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	changed, err := s.ike.Set(ctx, s.state)
	if err != nil {
		s.t.Fatalf("Set: %v", err)
	}
	return changed
}

// route does what internal/route does: the link, the rules for outer and tunnel packets,
// and the routes of all remote ranges in our table.
func (s *site) route() {
	s.t.Helper()
	if len(s.state.Connections) == 0 {
		return
	}
	link := s.link()
	table := fmt.Sprint(netstate.Table)
	if out, _ := s.gw.Try("ip", "rule", "show", "priority", fmt.Sprint(netstate.RulePriorityTunnel)); out == "" {
		mark := fmt.Sprintf("%#x/%#x", netstate.MarkOuter, netstate.MarkMask)
		s.gw.IP("rule", "add", "priority", fmt.Sprint(netstate.RulePriorityOuter), "fwmark", mark, "lookup", "main")
		s.gw.IP("rule", "add", "priority", fmt.Sprint(netstate.RulePriorityTunnel), "lookup", table)
	}
	var routes []string
	for _, c := range s.state.Connections {
		for _, p := range c.RemoteSelectors {
			routes = append(routes, p.String())
		}
	}
	slices.Sort(routes)
	for _, p := range slices.Compact(routes) {
		src := gwInner
		args := []string{"route", "replace", p, "dev", link, "table", table, "metric", "100"}
		if !strings.Contains(p, ":") {
			args = append(args, "src", src)
		}
		s.gw.IP(args...)
	}
}

// link makes the datapath's link ready and returns its name.
func (s *site) link() string {
	s.t.Helper()
	link := netstate.LibIPsecLink
	if s.state.Datapath == netstate.KernelESP {
		link = "cvtx1"
		if _, err := s.gw.Try("ip", "link", "show", link); err != nil {
			s.gw.IP("link", "add", link, "type", "xfrm", "dev", "lo", "if_id", "7")
		}
	}
	s.gw.IP("link", "set", link, "up", "mtu", "1380")
	return link
}

// observe returns what Observe says of one connection.
func (s *site) observe(name string) ipsec.Connection {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	all, err := s.ike.Observe(ctx)
	if err != nil {
		s.t.Fatalf("Observe: %v", err)
	}
	for _, c := range all {
		if c.Name == name {
			return c
		}
	}
	s.t.Fatalf("Observe knows no connection %q", name)
	return ipsec.Connection{}
}

func (s *site) awaitUp(name string, within time.Duration) ipsec.Connection {
	s.t.Helper()
	var c ipsec.Connection
	labtest.Eventually(s.t, within, "connection "+name+" is up", func() error {
		if c = s.observe(name); !c.Established || len(c.Missing) > 0 {
			return fmt.Errorf("%+v", c)
		}
		return nil
	})
	return c
}

// ping sends one packet from the gateway's inner address to the peer's, and the other way.
func (s *site) awaitPing(within time.Duration) {
	s.t.Helper()
	labtest.Eventually(s.t, within, "ping through the tunnel", func() error {
		_, err := s.gw.Try("ping", "-c1", "-W1", "-I", gwInner, peerInner)
		return err
	})
	labtest.Eventually(s.t, within, "ping through the tunnel from the peer", func() error {
		_, err := s.remote.Try("ping", "-c1", "-W1", "-I", peerInner, gwInner)
		return err
	})
}

// peerConf is a swanctl.conf for the peer's side of site.connection, with edits: pairs
// of old and new text.
func peerConf(edits ...string) string {
	return strings.NewReplacer(edits...).Replace(`connections {
  to-gw {
    version = 2
    local_addrs = 192.0.2.2
    remote_addrs = 192.0.2.1
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    #ike
    local {
      auth = psk
      id = peer.example
    }
    remote {
      auth = psk
      id = gw.example
    }
    children {
      net {
        local_ts = 10.2.0.0/16
        remote_ts = 10.1.0.0/16
        esp_proposals = aes256gcm16-x25519
        #child
      }
    }
  }
}
secrets {
  ike-gw {
    id-1 = gw.example
    id-2 = peer.example
    secret = "` + psk + `"
  }
}
`)
}
