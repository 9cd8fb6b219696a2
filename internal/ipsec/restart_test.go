package ipsec_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// daemonPID is our own daemon's process.
func (s *site) daemonPID() int {
	s.t.Helper()
	want := "STRONGSWAN_CONF=" + filepath.Join(s.dir, "ike", "strongswan.conf")
	dirs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, d := range dirs {
		if b, err := os.ReadFile(d); err == nil && strings.Contains(string(b), want) {
			pid, _ := strconv.Atoi(strings.Split(d, "/")[2])
			return pid
		}
	}
	return 0
}

// up makes a connection that carries traffic.
func up(t *testing.T) (*site, *peer) {
	t.Helper()
	s := newSite(t)
	p := newPeer(t, s.remote, peerConf())
	s.set(s.connection())
	s.awaitUp("site", 10*time.Second)
	s.awaitPing(5 * time.Second)
	return s, p
}

func TestOurDaemonDies(t *testing.T) {
	s, _ := up(t)
	for len(s.ike.Events()) > 0 {
		<-s.ike.Events()
	}
	old := s.daemonPID()
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.ike.Events():
	case <-time.After(time.Second):
		t.Error("no event within 1 s")
	}
	s.awaitNewDaemon(old)
	s.awaitUp("site", 10*time.Second)
	s.route() // ipsec0 is a new one
	s.awaitPing(10 * time.Second)
	if changed := s.set(s.connection()); changed != 0 {
		t.Errorf("Set after the repair changed %d", changed)
	}
}

func (s *site) awaitNewDaemon(old int) {
	s.t.Helper()
	labtest.Eventually(s.t, 5*time.Second, "a new daemon", func() error {
		if pid := s.daemonPID(); pid == 0 || pid == old {
			return fmt.Errorf("pid %d", pid)
		}
		_, err := s.ike.Observe(s.t.Context()) // it answers
		return err
	})
}

func TestPeerRestarts(t *testing.T) {
	for _, how := range []string{"killed", "stopped"} {
		t.Run(how, func(t *testing.T) {
			s, p := up(t)
			if how == "killed" {
				p.kill()
			} else {
				_ = p.cmd.Process.Signal(syscall.SIGTERM)
				time.Sleep(300 * time.Millisecond)
			}
			start := time.Now()
			p.start()
			// A killed peer is noticed by DPD: 2 s of silence and 12.8 s of retransmission.
			limit := 10 * time.Second
			if how == "killed" {
				limit = 17 * time.Second
			}
			s.awaitPing(limit)
			t.Logf("traffic back after %v", time.Since(start).Round(100*time.Millisecond))
		})
	}
}

func TestAdoptsRunningDaemon(t *testing.T) {
	s, _ := up(t)
	pid, before := s.daemonPID(), s.observe("site")
	s.ike.Release() // as if the process were killed
	again := s.open()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	changed, err := again.Set(ctx, s.state)
	if err != nil || changed != 0 {
		t.Fatalf("Set after a restart: changed %d, %v", changed, err)
	}
	all, err := again.Observe(ctx)
	if err != nil || len(all) != 1 || !all[0].Established || all[0].Since.Sub(before.Since).Abs() > 2*time.Second {
		t.Fatalf("after a restart: %+v, %v; before: %+v", all, err, before)
	}
	if now := s.daemonPID(); now != pid {
		t.Errorf("daemon %d became %d", pid, now)
	}
	s.awaitPing(time.Second)
	// What was removed meanwhile is found and removed.
	s.state.Connections = nil
	if changed, err := again.Set(ctx, s.state); err != nil || changed != 1 {
		t.Errorf("Set without connections: changed %d, %v", changed, err)
	}
	if now := s.daemonPID(); now != 0 {
		t.Errorf("daemon %d still runs without a connection", now)
	}
}

func TestChangeTouchesOneConnectionOnly(t *testing.T) {
	s := newSite(t)
	newPeer(t, s.remote, twoConnections())
	a, b := s.connection(), s.connection()
	b.Name, b.RemoteID, b.RemoteSelectors = "site-b", "b.example", prefixes("10.3.0.0/16")
	s.set(a, b)
	s.awaitUp("site", 10*time.Second)
	first := s.awaitUp("site-b", 10*time.Second)
	time.Sleep(1100 * time.Millisecond) // Since has a resolution of a second
	a.ChildLifetime = time.Hour
	if changed := s.set(a, b); changed != 1 {
		t.Errorf("one edit changed %d connections", changed)
	}
	labtest.Eventually(t, 10*time.Second, "the edited connection is made anew", func() error {
		if c := s.observe("site"); !c.Established || !c.Since.After(first.Since) {
			return fmt.Errorf("%+v", c)
		}
		return nil
	})
	if c := s.observe("site-b"); !c.Established || c.Since.After(first.Since.Add(time.Second)) {
		t.Errorf("the other connection was touched: %+v", c)
	}
	if changed := s.set(b); changed != 1 {
		t.Errorf("one removal changed %d connections", changed)
	}
	labtest.Eventually(t, 5*time.Second, "the removed connection is down", func() error {
		out, err := s.vici("--list-sas")
		if err == nil && strings.Contains(out, "site: ") {
			err = errors.New(out)
		}
		return err
	})
	out, err := s.vici("--list-conns")
	if err != nil || strings.Contains(out, "site: ") || !strings.Contains(out, "site-b: ") {
		t.Errorf("%v: connections after the removal: %s", err, out)
	}
	if c := s.observe("site-b"); !c.Established || c.Since.After(first.Since.Add(time.Second)) {
		t.Errorf("the other connection was touched: %+v", c)
	}
}

// vici asks our daemon with strongSwan's own tool.
func (s *site) vici(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	args = append(args, "--uri", "unix://"+filepath.Join(s.dir, "ike", "charon.vici"))
	out, err := exec.CommandContext(ctx, "swanctl", args...).CombinedOutput()
	return string(out), err
}

// twoConnections is the peer as two sites: peer.example and b.example.
func twoConnections() string {
	conf := peerConf()
	conns, secrets, _ := strings.Cut(conf, "secrets {")
	second := strings.NewReplacer("connections {", "", "to-gw", "to-gw-b", "net {", "net-b {", "peer.example", "b.example", "10.2.0.0/16", "10.3.0.0/16").Replace(conns)
	conns = strings.TrimSuffix(strings.TrimSpace(conns), "}")
	return conns + second + "secrets {" + strings.Replace(secrets, "id-2", "id-3 = b.example\n    id-2", 1)
}

func TestTwoKeysCannotSwap(t *testing.T) {
	s := newSite(t)
	a, b := s.connection(), s.connection()
	a.Initiate, b.Initiate = netstate.InitiateNever, netstate.InitiateNever
	a.RemoteAddresses, b.RemoteAddresses = nil, nil
	b.Name, b.RemoteID, b.RemoteSelectors = "site-b", "b.example", prefixes("10.3.0.0/16")
	b.Auth.PresharedKey = secret.New([]byte("the key of site b"))
	s.set(a, b)
	// The holder of site's key says that it is b.
	newPeer(t, s.remote, strings.ReplaceAll(peerConf("10.2.0.0/16", "10.3.0.0/16", peerDial, dialNow), "peer.example", "b.example"))
	s.awaitFailure("site-b", "AuthenticationFailed", "another pre-shared key")
	if c := s.observe("site"); c.LastFailure != nil {
		t.Errorf("the other site is blamed: %+v", c.LastFailure)
	}
}

// A second IKE daemon on the host: charon itself would start, deaf, and never recover.
func TestPortIsTaken(t *testing.T) {
	s := newSite(t)
	newPeer(t, s.remote, peerConf())
	var other net.PacketConn
	s.gw.Do(func() (err error) {
		other, err = net.ListenPacket("udp4", ":500")
		return err
	})
	defer other.Close()
	s.state.Connections = []netstate.IPsecConnection{s.connection()}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := s.ike.Set(ctx, s.state); err == nil || !strings.Contains(err.Error(), "UDP port 500") {
		t.Fatalf("Set with UDP port 500 taken: %v", err)
	}
	if pid := s.daemonPID(); pid != 0 {
		t.Errorf("a deaf daemon goes on as pid %d", pid)
	}
	_ = other.Close()
	s.set(s.connection())
	s.awaitUp("site", 10*time.Second)
}
