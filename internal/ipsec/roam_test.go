package ipsec_test

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// natted is a site whose peer sits behind a NAT router and calls.
func natted(t *testing.T) (*site, *labtest.Host) {
	t.Helper()
	labtest.Require(t, "nft", "conntrack")
	s := newSite(t)
	nat := s.lab.Host("nat")
	s.gw.IP("link", "del", "eth0")
	s.lab.Connect(s.gw, "eth0", gwOuter+"/24", nat, "out", "192.0.2.20/24")
	s.lab.Connect(nat, "in", "192.168.7.1/24", s.remote, "eth0", "192.168.7.2/24")
	s.remote.IP("route", "add", "default", "via", "192.168.7.1")
	nat.Sysctl("net/ipv4/ip_forward", "1")
	masquerade(nat, "20000-29999")
	c := s.connection()
	c.Initiate, c.RemoteAddresses = netstate.InitiateNever, nil
	s.set(c)
	newPeer(t, s.remote, peerConf("192.0.2.2", "192.168.7.2", "#ike", "dpd_delay = 2s", peerDial, dialNow+"\n dpd_action = restart"))
	s.awaitUp("site", 10*time.Second)
	s.awaitPing(5 * time.Second)
	return s, nat
}

func masquerade(nat *labtest.Host, ports string) {
	_, _ = nat.Try("nft", "delete", "table", "ip", "n")
	nat.Run("nft", "add table ip n; add chain ip n p { type nat hook postrouting priority 100; }; add rule ip n p oifname out meta l4proto udp masquerade to :"+ports)
}

func TestPeerBehindNAT(t *testing.T) {
	s, nat := natted(t)
	before := s.observe("site").Remote
	if before.Addr().String() != "192.0.2.20" || before.Port() < 20000 {
		t.Errorf("the peer is seen at %s, not behind the NAT", before)
	}
	transfer(t, s.remote, s.gw, peerInner, gwInner, 8<<20)
	// The peer compares its mapping from one DPD exchange to the next.
	labtest.Eventually(t, 8*time.Second, "the peer has made a DPD exchange", func() error {
		if s.logCount("N(NATD_S_IP) N(NATD_D_IP) ]") < 4 {
			return errors.New("none yet")
		}
		return nil
	})
	// The NAT forgets everything and hands out other ports.
	masquerade(nat, "30000-39999")
	nat.Run("conntrack", "-F")
	start := time.Now()
	labtest.Eventually(t, 10*time.Second, "the new mapping is in use", func() error {
		if c := s.observe("site"); c.Remote.Port() < 30000 {
			return fmt.Errorf("%s", c.Remote)
		}
		return nil
	})
	s.awaitPing(10 * time.Second)
	t.Logf("after the NAT's restart back in %v: %s became %s", time.Since(start).Round(100*time.Millisecond), before, s.observe("site").Remote)
}

func TestPeerAddressChanges(t *testing.T) {
	s := newSite(t)
	c := s.connection()
	c.Initiate, c.RemoteAddresses = netstate.InitiateNever, nil
	s.set(c)
	newPeer(t, s.remote, peerConf("local_addrs = 192.0.2.2", "", peerDial, dialNow))
	s.awaitUp("site", 10*time.Second)
	s.awaitPing(5 * time.Second)
	s.remote.IP("addr", "add", "192.0.2.9/24", "dev", "eth0")
	s.remote.IP("addr", "del", peerOuter+"/24", "dev", "eth0")
	_, _ = s.remote.Try("ip", "addr", "add", "192.0.2.9/24", "dev", "eth0")
	start := time.Now()
	labtest.Eventually(t, 10*time.Second, "the new address is in use", func() error {
		if c := s.observe("site"); c.Remote.Addr().String() != "192.0.2.9" {
			return fmt.Errorf("%s", c.Remote)
		}
		return nil
	})
	s.awaitPing(10 * time.Second)
	t.Logf("after the change of address back in %v", time.Since(start).Round(100*time.Millisecond))
}

// Both ends initiate. When the attempts cross, both IKE SAs stay: uniqueness is looked at
// by who is called, and at that time neither has another one. That must come to rest, be
// of no harm while there are two, and of none when one of them ends.
func TestBothInitiate(t *testing.T) {
	s := newSite(t)
	var other *ipsec.IPsec
	s.remote.Do(func() (err error) {
		other, err = ipsec.New(ipsec.Options{Dir: shortDir(t) + "/ike", Start: s.remote.Start})
		return err
	})
	t.Cleanup(func() { _ = other.Close() })
	c := s.connection()
	d := c
	d.LocalAddresses, d.RemoteAddresses = c.RemoteAddresses, c.LocalAddresses
	d.LocalID, d.RemoteID = c.RemoteID, c.LocalID
	d.LocalSelectors, d.RemoteSelectors = c.RemoteSelectors, c.LocalSelectors
	if s.state.Datapath == netstate.KernelESP {
		s.remote.IP("link", "add", "cvtx1", "type", "xfrm", "dev", "lo", "if_id", "7")
		s.remote.IP("link", "set", "cvtx1", "up")
	}
	slow := inVM() // where there is netem
	if slow {      // so that they cross for sure
		s.gw.Run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "400ms")
		s.remote.Run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "400ms")
	}
	failed := make(chan error, 1)
	go func() {
		_, err := other.Set(t.Context(), &netstate.IPsec{Datapath: s.state.Datapath, Connections: []netstate.IPsecConnection{d}})
		failed <- err
	}()
	s.set(c)
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	s.remote.IP("link", "set", c.Link, "up", "mtu", "1380")
	s.remote.IP("route", "replace", "10.1.0.0/16", "dev", c.Link, "src", peerInner)
	s.awaitUp("site", 10*time.Second)
	s.awaitPing(10 * time.Second)
	time.Sleep(2 * time.Second)
	if slow {
		s.gw.Run("tc", "qdisc", "del", "dev", "eth0", "root")
		s.remote.Run("tc", "qdisc", "del", "dev", "eth0", "root")
	}
	before := s.logCount("established between")
	stop := s.pinger()
	time.Sleep(4 * time.Second)
	all := s.ikeSAs()
	if len(all) == 2 {
		if _, err := s.vici("--terminate", "--ike-id", all[1]); err != nil { // the newer one, which sends
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
	}
	sent, lost := stop()
	rest := s.ikeSAs()
	t.Logf("%d IKE SAs, then %d; %d of %d pings lost", len(all), len(rest), lost, sent)
	if now := s.logCount("established between"); now != before || lost > 0 {
		t.Errorf("it does not come to rest: %d new IKE SAs, %d of %d pings lost", now-before, lost, sent)
	}
	if len(all) < 1 || len(all) > 2 || len(rest) != 1 {
		t.Errorf("IKE SAs %v, then %v", all, rest)
	}
}

var ikeSA = regexp.MustCompile(`(?m)^site: #(\d+), ESTABLISHED`)

// ikeSAs are the numbers of our daemon's established IKE SAs, the oldest first.
func (s *site) ikeSAs() []string {
	s.t.Helper()
	out, err := s.vici("--list-sas")
	if err != nil {
		s.t.Error(err)
	}
	var all []string
	for _, m := range ikeSA.FindAllStringSubmatch(out, -1) {
		all = append(all, m[1])
	}
	slices.SortFunc(all, func(a, b string) int { return cmp.Or(len(a)-len(b), strings.Compare(a, b)) })
	return all
}
