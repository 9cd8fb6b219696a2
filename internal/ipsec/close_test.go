package ipsec_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/ipsec/vici"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

func TestCloseLeavesNothing(t *testing.T) {
	s, p := up(t)
	if err := s.ike.Close(); err != nil {
		t.Fatal(err)
	}
	if pid := s.daemonPID(); pid != 0 {
		t.Errorf("daemon %d still runs", pid)
	}
	for what, args := range map[string][]string{
		"XFRM states": {"xfrm", "state"}, "XFRM policies": {"xfrm", "policy"},
		"routes": {"route", "show", "table", "19620"}, "rules": {"rule", "show", "priority", "32768"},
	} {
		if out, _ := s.gw.Try("ip", args...); out != "" && !strings.Contains(out, "does not exist") {
			t.Errorf("%s: %s", what, out)
		}
	}
	for _, link := range []string{"ipsec0", "cvtselectors", "cvtselectors0"} {
		if out, err := s.gw.Try("ip", "link", "show", link); err == nil {
			t.Errorf("link left: %s", out)
		}
	}
	if left, err := os.ReadDir(filepath.Join(s.dir, "ike")); err == nil {
		t.Errorf("files left: %v", left)
	}
	labtest.Eventually(t, 2*time.Second, "the peer got a DELETE", func() error {
		b, err := os.ReadFile(filepath.Join(p.dir, "charon.log"))
		if err == nil && !strings.Contains(string(b), "received DELETE for IKE_SA") {
			return os.ErrNotExist
		}
		return err
	})
	if _, err := s.ike.Set(context.Background(), s.state); err == nil {
		t.Error("Set after Close succeeds")
	}
}

// An external daemon keeps what others loaded.
func TestExternalDaemon(t *testing.T) {
	s := newSite(t)
	theirs := newPeer(t, s.gw, peerConf("192.0.2.2", "192.0.2.1", "192.0.2.1", "192.0.2.2", "to-gw", "theirs"))
	newPeer(t, s.remote, peerConf())
	var i *ipsec.IPsec
	s.gw.Do(func() (err error) {
		i, err = ipsec.New(ipsec.Options{Dir: filepath.Join(s.dir, "ext"), Socket: filepath.Join(theirs.dir, "vici")})
		return err
	})
	t.Cleanup(func() { _ = i.Close() })
	s.ike = i
	s.set(s.connection())
	s.awaitUp("site", 10*time.Second)
	if changed := s.try(); changed != 0 {
		t.Errorf("second Set changed %d", changed)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := theirs.swanctl("--list-conns")
	if err != nil || strings.Contains(out, "site:") || !strings.Contains(out, "theirs:") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := theirs.swanctl("--list-sas"); err != nil || strings.Contains(out, "site:") {
		t.Errorf("%v: %s", err, out)
	}
}

// Fault 25: whatever stands in a string, the daemon's text settings are the same and no
// other connection comes to be.
func TestHostileStrings(t *testing.T) {
	s := newSite(t)
	good := s.connection()
	good.Name, good.RemoteID, good.RemoteSelectors = "good", "good.example", prefixes("10.9.0.0/16")
	s.set(good)
	conf := filepath.Join(s.dir, "ike", "strongswan.conf")
	before, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	for _, evil := range []string{
		"a\ninclude /etc/passwd\n", `a" } evil { x = "`, "a}\n}\nconnections { evil { } }", "a # comment", "include /tmp/*",
		"$(reboot)", "a\x00b", "%any", "a,b", "a = b", "..", strings.Repeat("x", 300), "\xff\xfe", "{1}:#0", "'; drop",
	} {
		for field, edit := range map[string]func(*netstate.IPsecConnection){
			"Name":            func(c *netstate.IPsecConnection) { c.Name = evil },
			"LocalID":         func(c *netstate.IPsecConnection) { c.LocalID = evil },
			"RemoteID":        func(c *netstate.IPsecConnection) { c.RemoteID = evil },
			"LocalAddresses":  func(c *netstate.IPsecConnection) { c.LocalAddresses = []string{evil} },
			"RemoteAddresses": func(c *netstate.IPsecConnection) { c.RemoteAddresses = []string{evil} },
			"IKEProposals":    func(c *netstate.IPsecConnection) { c.IKEProposals = []string{evil} },
			"ESPProposals":    func(c *netstate.IPsecConnection) { c.ESPProposals = []string{evil} },
			"PresharedKey":    func(c *netstate.IPsecConnection) { c.Auth.PresharedKey = secret.New([]byte(evil)) },
		} {
			c := s.connection()
			c.Initiate = netstate.InitiateNever
			edit(&c)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			_, _ = s.ike.Set(ctx, &netstate.IPsec{Datapath: s.state.Datapath, Connections: []netstate.IPsecConnection{good, c}})
			cancel()
			now, err := os.ReadFile(conf)
			if err != nil || string(now) != string(before) {
				t.Fatalf("%s %q changed the daemon's settings: %v\n%s", field, evil, err, now)
			}
			names := s.loadedNames()
			if !slices.Contains(names, "good") || len(names) > 2 || len(names) == 2 && !slices.Contains(names, "site") {
				t.Fatalf("%s %q: the daemon has connections %q", field, evil, names)
			}
		}
	}
}

// loadedNames asks our daemon for its connections.
func (s *site) loadedNames() []string {
	s.t.Helper()
	c, err := vici.Dial(s.t.Context(), filepath.Join(s.dir, "ike", "charon.vici"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	m, err := c.Command(s.t.Context(), "get-conns", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return m.List("conns")
}

// Fault 26, for this package: keys are in no file, nor in what prints.
func TestKeysAreNowhere(t *testing.T) {
	s, _ := up(t)
	c := s.observe("site")
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(s.dir, "ike", "*"))
	if err != nil || len(files) < 4 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			text = append(text, b...)
		}
		if st, err := os.Stat(f); err != nil || st.Mode().Perm()&0o077 != 0 && st.Mode().IsRegular() {
			t.Errorf("%s: %v, %v", f, st.Mode(), err)
		}
	}
	if strings.Contains(string(text), psk) {
		t.Error("the pre-shared key is in a file or in the status")
	}
	if out, err := exec.Command("grep", "-c", psk, "/proc/"+strconv.Itoa(s.daemonPID())+"/cmdline", "/proc/"+strconv.Itoa(s.daemonPID())+"/environ").CombinedOutput(); err == nil {
		t.Errorf("the pre-shared key is in the daemon's arguments: %s", out)
	}
}
