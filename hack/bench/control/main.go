// Control is the least that two tailscaled need to find each other, for "make bench": the
// coordination server of Tailscale's own integration tests, with a DERP relay and a STUN
// server beside it, all on one address. Nobody is asked who he is.
//
// A module of its own, so that Tailscale's dependencies bind nobody else's.
package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// Ports of the three.
const (
	controlPort = 8080
	derpPort    = 8443
	stunPort    = 3478
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: control ADDRESS")
		os.Exit(2)
	}
	if err := serve(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func serve(address string) error {
	at := func(port int) string { return net.JoinHostPort(address, fmt.Sprint(port)) }
	relay, err := net.Listen("tcp", at(derpPort))
	if err != nil {
		return err
	}
	derp := httptest.NewUnstartedServer(derpserver.Handler(derpserver.New(key.NewNode(), log.Printf)))
	derp.Listener.Close()
	derp.Listener = relay
	derp.StartTLS()
	mirror, err := net.ListenPacket("udp4", at(stunPort))
	if err != nil {
		return err
	}
	control := &testcontrol.Server{
		ExplicitBaseURL: "http://" + at(controlPort), AllNodesSameUser: true, AllOnline: true,
		DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, RegionCode: "bench", RegionName: "bench", Nodes: []*tailcfg.DERPNode{{
			Name: "bench", RegionID: 1, HostName: address, IPv4: address, IPv6: "none",
			DERPPort: derpPort, STUNPort: stunPort, STUNTestIP: address, InsecureForTests: true,
		}}}}},
	}
	failed := make(chan error, 2)
	go func() { failed <- reflect(mirror) }()
	go func() { failed <- http.ListenAndServe(at(controlPort), control) }()
	return <-failed
}

// reflect tells everybody who asks by STUN the address that the question came from.
func reflect(pc net.PacketConn) error {
	b := make([]byte, 1500)
	for {
		n, from, err := pc.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			continue
		}
		id, err := stun.ParseBindingRequest(b[:n])
		if err != nil {
			continue
		}
		source, err := netip.ParseAddrPort(from.String())
		if err == nil {
			_, _ = pc.WriteTo(stun.Response(id, source), from)
		}
	}
}
