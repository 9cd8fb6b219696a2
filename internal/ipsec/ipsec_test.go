package ipsec_test

import (
	"testing"
	"time"
)

func TestPresharedKeyCarriesTraffic(t *testing.T) {
	s := newSite(t)
	newPeer(t, s.remote, peerConf())
	if changed := s.set(s.connection()); changed != 1 {
		t.Errorf("first Set changed %d connections, want 1", changed)
	}
	s.awaitUp("site", 10*time.Second)
	s.awaitPing(5 * time.Second)
	if changed := s.set(s.connection()); changed != 0 {
		t.Errorf("second Set changed %d connections, want none", changed)
	}
	c := s.observe("site")
	if len(c.Children) != 1 || c.Children[0].PacketsIn < 2 || c.Children[0].PacketsOut < 2 || c.Children[0].BytesIn == 0 {
		t.Errorf("the pings are not counted: %+v", c.Children)
	}
	if c.RemoteID != "peer.example" || c.Remote.Addr().String() != peerOuter {
		t.Errorf("peer is %q at %s", c.RemoteID, c.Remote)
	}
}
