package plan

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

func id(name string) model.ID { return model.ID{Namespace: "default", Name: name} }

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, x := range s {
		out = append(out, netip.MustParsePrefix(x))
	}
	return out
}

func edge() *model.Gateway {
	return &model.Gateway{
		ID: id("edge"), Pods: prefixes("10.244.0.0/16"), ServiceRanges: prefixes("10.96.0.0/12"), Nodes: prefixes("10.0.0.0/24"),
		DeviceRanges: prefixes("10.99.0.0/24", "fd00:99::/64"), Address: "vpn.example.com", WireGuardPort: 51820,
		ServicesMode: netstate.ServicesTranslate,
	}
}

func ipsecSite(name, cidr string) *model.Site {
	return &model.Site{ID: id(name), CIDRs: prefixes(cidr), Access: netstate.AccessPods, IPsec: &model.IPsecSite{}}
}

func TestMTU(t *testing.T) {
	for _, c := range []struct{ underlay, set, wireguard, ipsec int }{
		{0, 0, 1420, 1400}, {1500, 0, 1420, 1400}, {1400, 0, 1320, 1300}, {1280, 0, 1280, 1280}, {9000, 0, 8920, 8900}, {1500, 1300, 1300, 1300},
	} {
		gw := edge()
		gw.MTU = c.set
		gw.Sites = []*model.Site{ipsecSite("berlin", "10.1.0.0/16")}
		got := map[netstate.LinkKind]int{}
		s := Gateway(gw, Facts{UnderlayMTU: c.underlay}).State
		for _, l := range s.Links {
			got[l.Kind] = l.MTU
		}
		if got[netstate.LinkWireGuard] != c.wireguard || got[netstate.LinkXFRM] != c.ipsec {
			t.Errorf("underlay %d, spec.mtu %d: %v, want wireguard %d, ipsec %d", c.underlay, c.set, got, c.wireguard, c.ipsec)
		}
		for _, clamp := range s.Firewall.Clamps {
			if clamp.MSS4 != clamp.MSS6+20 || int(clamp.MSS4) > c.wireguard-40 {
				t.Errorf("underlay %d: clamp %+v", c.underlay, clamp)
			}
		}
	}
}

// Whatever the objects: a range that is routed into a tunnel has an unreachable route
// behind it, in the same table, and a rule leads there.
func TestEveryTunnelRouteFailsClosed(t *testing.T) {
	gw := edge()
	gw.Sites = []*model.Site{ipsecSite("berlin", "10.1.0.0/16"), {ID: id("oslo"), CIDRs: prefixes("fd00:20::/64"), WireGuard: &model.WireGuardSite{PublicKey: netstate.Key{1}}}}
	s := Gateway(gw, Facts{}).State
	tunnels := 0
	for _, r := range s.Routes {
		if r.Kind != netstate.RouteUnicast {
			continue
		}
		tunnels++
		if !slices.ContainsFunc(s.Routes, func(o netstate.Route) bool {
			return o.Kind == netstate.RouteUnreachable && o.Destination == r.Destination && o.Table == r.Table && o.Metric > r.Metric
		}) {
			t.Errorf("no unreachable route behind %+v", r)
		}
		if !slices.ContainsFunc(s.Rules, func(o netstate.Rule) bool {
			return o.Family == netstate.FamilyOf(r.Destination.Addr()) && o.Table == r.Table && o.Mark == 0
		}) {
			t.Errorf("no rule leads to %+v", r)
		}
	}
	if tunnels != 4 {
		t.Errorf("%d tunnel routes, want 4", tunnels)
	}
}

func TestInterfaceIDsAreStableAndUnique(t *testing.T) {
	one := edge()
	one.Sites = []*model.Site{ipsecSite("m", "10.1.0.0/16")}
	want := Gateway(one, Facts{}).State.IPsec.Connections[0].InterfaceID
	many := edge()
	seen := map[uint32]bool{}
	for _, n := range strings.Split("abcdefghijklmnopqrstuvwxyz", "") {
		many.Sites = append(many.Sites, ipsecSite(n, "10.1.0.0/16"))
	}
	for _, c := range Gateway(many, Facts{}).State.IPsec.Connections {
		if c.InterfaceID == 0 || seen[c.InterfaceID] {
			t.Errorf("%s has the interface ID %#x", c.Name, c.InterfaceID)
		}
		seen[c.InterfaceID] = true
		if c.Name == "default.m" && c.InterfaceID != want {
			t.Errorf("the ID of m changed from %#x to %#x with other sites", want, c.InterfaceID)
		}
	}
	p := &planner{gw: edge()}
	p.out.State.Links = []netstate.Link{{InterfaceID: hash32(id("m").String())}}
	if got := p.freeInterfaceID(id("m")); got == hash32(id("m").String()) || got == 0 {
		t.Errorf("a taken ID is given out again: %#x", got)
	}
}

func TestExpiryAndSuspension(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	gw := edge()
	for i, d := range []*model.Device{
		{ID: id("active")}, {ID: id("expired"), Expires: now}, {ID: id("soon"), Expires: now.Add(time.Minute)},
		{ID: id("later"), Expires: now.Add(time.Hour)}, {ID: id("suspended"), Suspended: true},
	} {
		d.PublicKey = netstate.Key{byte(i + 1)}
		gw.Devices = append(gw.Devices, d)
	}
	addrs, changed, problems := Addresses(gw, nil)
	if len(addrs) != 5 || !changed || len(problems) > 0 {
		t.Fatalf("Addresses: %v, %v, %v", addrs, changed, problems)
	}
	r := Gateway(gw, Facts{Now: now, Addresses: addrs})
	var peers []string
	for _, p := range r.State.WireGuard[0].Peers {
		peers = append(peers, p.Name)
	}
	if want := []string{"device default/active", "device default/later", "device default/soon"}; !slices.Equal(peers, want) {
		t.Errorf("peers = %v, want %v", peers, want)
	}
	if len(r.State.Firewall.Tunnels) != 3 {
		t.Errorf("the firewall knows %d tunnels, want 3", len(r.State.Firewall.Tunnels))
	}
	if !r.NextChange.Equal(now.Add(time.Minute)) {
		t.Errorf("NextChange = %v", r.NextChange)
	}
	for _, n := range []string{"expired", "suspended"} {
		if r.Waiting[DeviceName(id(n))] == "" {
			t.Errorf("nothing is said about %s", n)
		}
	}
}

func TestAddressesStay(t *testing.T) {
	gw := edge()
	gw.DeviceRanges = prefixes("10.99.0.0/29") // 5 for devices
	add := func(name string, wish ...netip.Addr) {
		gw.Devices = append([]*model.Device{{ID: id(name), Addresses: wish}}, gw.Devices...)
	}
	add("one")
	first, _, _ := Addresses(gw, nil)
	add("two", first[id("one")]...) // a newcomer that comes first and wishes for what is taken
	second, changed, problems := Addresses(gw, AddressBook(first))
	if !slices.Equal(first[id("one")], second[id("one")]) || changed || len(problems) != 1 || problems[0].Object != id("two") {
		t.Errorf("second = %v, problems %+v", second, problems)
	}
	for _, n := range []string{"a", "b", "c", "d", "e", "f"} {
		add(n)
	}
	gw.Devices = slices.DeleteFunc(gw.Devices, func(d *model.Device) bool { return d.Name == "two" })
	third, _, problems := Addresses(gw, AddressBook(first))
	if len(third) != 5 || len(problems) != 2 {
		t.Errorf("a pool of 5 gave %d addresses and %d problems to 7 devices", len(third), len(problems))
	}
	if _, changed, _ := Addresses(gw, AddressBook(third)); changed {
		t.Error("the same devices change addresses")
	}
}

func TestEndpoints(t *testing.T) {
	gw := edge()
	gw.Sites = []*model.Site{
		{ID: id("name"), CIDRs: prefixes("10.1.0.0/16"), WireGuard: &model.WireGuardSite{PublicKey: netstate.Key{1}, Endpoint: model.Endpoint{Host: "a.example.com", Port: 7}}},
		{ID: id("seen"), CIDRs: prefixes("10.2.0.0/16"), WireGuard: &model.WireGuardSite{PublicKey: netstate.Key{2}}},
		{ID: id("new"), CIDRs: prefixes("10.3.0.0/16"), WireGuard: &model.WireGuardSite{PublicKey: netstate.Key{3}}},
	}
	seen := netip.MustParseAddrPort("192.0.2.9:1234")
	facts := Facts{Endpoints: map[netstate.Key]netip.AddrPort{{2}: seen}}
	peers := func(f Facts) map[string]netstate.WireGuardPeer {
		out := map[string]netstate.WireGuardPeer{}
		for _, p := range Gateway(gw, f).State.WireGuard[0].Peers {
			out[p.Name] = p
		}
		return out
	}
	p := peers(facts)
	if p["site default/seen"].Endpoint != seen || !p["site default/seen"].Initiate {
		t.Errorf("a peer that was seen before: %+v", p["site default/seen"])
	}
	if x := p["site default/new"]; x.Endpoint.IsValid() || x.Initiate {
		t.Errorf("a peer that dials in: %+v", x)
	}
	if Gateway(gw, facts).Waiting["site default/name"] == "" {
		t.Error("nothing is said about a name without address")
	}
	facts.Resolved = map[string]netip.Addr{"a.example.com": netip.MustParseAddr("192.0.2.1")}
	if got := peers(facts)["site default/name"].Endpoint; got != netip.MustParseAddrPort("192.0.2.1:7") {
		t.Errorf("endpoint of a resolved name = %v", got)
	}
}

func TestDeviceConfig(t *testing.T) {
	gw := edge()
	gw.DNS = []netip.Addr{netip.MustParseAddr("10.96.0.10")}
	gw.Sites = []*model.Site{ipsecSite("berlin", "10.1.0.0/16")}
	d := &model.Device{ID: id("phone"), PublicKey: netstate.Key{5}, PresharedKey: secret.New(make([]byte, 32)), Access: netstate.AccessServices | netstate.AccessSites, PersistentKeepaliveSeconds: 25}
	gw.Devices = []*model.Device{d}
	facts := Facts{PublicKey: netstate.Key{7}}
	facts.Addresses, _, _ = Addresses(gw, nil)
	got, err := DeviceConfig(gw, d, secret.New(slices.Repeat([]byte{9}, 32)), facts)
	if err != nil {
		t.Fatal(err)
	}
	want := `# Device default/phone at gateway default/edge
[Interface]
PrivateKey = CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=
Address = 10.99.0.2/32, fd00:99::2/128
DNS = 10.96.0.10
MTU = 1420

[Peer]
PublicKey = BwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
PresharedKey = AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
Endpoint = vpn.example.com:51820
AllowedIPs = 10.1.0.0/16, 10.96.0.0/12, 10.99.0.1/32, 10.244.0.0/16, fd00:99::1/128
PersistentKeepalive = 25
`
	if string(got.Reveal()) != want {
		t.Errorf("got\n%s\nwant\n%s", got.Reveal(), want)
	}
	without, err := DeviceConfig(gw, d, secret.Bytes{}, facts)
	if err != nil || strings.Contains(string(without.Reveal()), "\nPrivateKey") {
		t.Errorf("a configuration without the private key: %v\n%s", err, without.Reveal())
	}
	gw.Address = ""
	if _, err := DeviceConfig(gw, d, secret.Bytes{}, facts); err == nil || !strings.Contains(err.Error(), "spec.expose.address") {
		t.Errorf("without an address to dial: %v", err)
	}
}

func TestSelectorsCoverBothDirections(t *testing.T) {
	gw := edge()
	a, b := ipsecSite("a", "10.1.0.0/16"), ipsecSite("b", "10.2.0.0/16")
	a.Access = netstate.AccessServices // pods may open connections to the site all the same
	gw.Sites = []*model.Site{a, b}
	p := &planner{gw: gw}
	if got := p.localSelectors(a); !slices.Equal(got, prefixes("10.96.0.0/12", "10.244.0.0/16")) {
		t.Errorf("selectors of a = %v", got)
	}
	b.Access |= netstate.AccessSites | netstate.AccessNodes
	gw.Devices = []*model.Device{{ID: id("d"), Access: netstate.AccessSites}}
	if got := p.localSelectors(a); !slices.Equal(got, prefixes("10.2.0.0/16", "10.96.0.0/12", "10.99.0.0/24", "10.244.0.0/16", "fd00:99::/64")) {
		t.Errorf("selectors of a with others that may reach it = %v", got)
	}
	if got := p.localSelectors(b); !slices.Contains(got, netip.MustParsePrefix("10.0.0.0/24")) {
		t.Errorf("selectors of b lack the nodes: %v", got)
	}
}
