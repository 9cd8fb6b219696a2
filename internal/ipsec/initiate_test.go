package ipsec_test

import (
	"context"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

func TestInitiateOnTraffic(t *testing.T) {
	s := newSite(t)
	c := s.connection()
	c.Initiate = netstate.InitiateOnTraffic
	s.state.Connections = []netstate.IPsecConnection{c}
	if s.state.Datapath == netstate.LibIPsec {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := s.ike.Set(ctx, s.state); err == nil {
			t.Error("a trap that kernel-libipsec cannot set was accepted")
		}
		if f := s.observe("site").LastFailure; f == nil || f.Reason != ipsec.ReasonInvalidConfiguration {
			t.Errorf("%+v", f)
		}
		return
	}
	newPeer(t, s.remote, peerConf())
	s.set(c)
	time.Sleep(2 * time.Second)
	if s.observe("site").Established {
		t.Fatal("it is up without traffic")
	}
	s.awaitPing(20 * time.Second)
	s.awaitUp("site", time.Second)
}

func TestInitiateNever(t *testing.T) {
	s := newSite(t)
	c := s.connection()
	c.Initiate = netstate.InitiateNever
	p := newPeer(t, s.remote, peerConf())
	s.set(c)
	time.Sleep(2 * time.Second)
	if got := s.observe("site"); got.Established || got.LastFailure != nil {
		t.Fatalf("it did not wait: %+v", got)
	}
	if out, err := p.swanctl("--initiate", "--child", "net"); err != nil {
		t.Fatal(out)
	}
	s.awaitUp("site", 5*time.Second)
	s.awaitPing(5 * time.Second)
}
