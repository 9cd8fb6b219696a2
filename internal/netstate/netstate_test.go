package netstate

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/secret"
)

func example() State {
	p := netip.MustParsePrefix
	return State{
		Sysctls: []Sysctl{{"net/ipv4/ip_forward", "1"}},
		Links: []Link{
			{Name: "cvtwg0", Kind: LinkWireGuard, MTU: 1420, Addresses: []netip.Prefix{p("fd00:99::1/128"), p("10.99.0.1/32")}},
			{Name: "cvtx1", Kind: LinkXFRM, MTU: 1400, InterfaceID: 17},
			{Name: NodeLinkName, Kind: LinkVXLAN, MTU: 1450, VXLAN: &VXLAN{ID: NodeLinkID, Port: NodeLinkPort, Family: IPv4, MAC: MAC{2, 1}, Peers: []VXLANPeer{
				{Name: "node a", Outer: netip.MustParseAddr("172.30.0.11"), MAC: MAC{2, 2}, Via: []netip.Addr{netip.MustParseAddr("172.30.0.11")}}}}},
		},
		WireGuard: []WireGuard{{
			Link: "cvtwg0", PrivateKey: secret.New([]byte("private-key-material")), PublicKey: Key{1}, ListenPort: 51820, FirewallMark: MarkOuter,
			Peers: []WireGuardPeer{{Name: "device default/phone", PublicKey: Key{2}, PresharedKey: secret.New([]byte("preshared-material")),
				Endpoint: netip.MustParseAddrPort("192.0.2.1:7"), Initiate: true, PersistentKeepaliveSeconds: 25, AllowedIPs: []netip.Prefix{p("10.99.0.2/32")}}},
		}},
		IPsec: &IPsec{Datapath: KernelESP, Connections: []IPsecConnection{{
			Name: "default.berlin", RemoteAddresses: []string{"198.51.100.1"}, LocalID: "a", RemoteID: "b",
			Auth: IPsecAuth{PresharedKey: secret.New([]byte("psk-material"))}, IKEProposals: []string{"x"}, ESPProposals: []string{"y"},
			LocalSelectors: []netip.Prefix{p("10.244.0.0/16")}, RemoteSelectors: []netip.Prefix{p("10.10.0.0/24")},
			Initiate: InitiateAlways, IKELifetime: time.Hour, ChildLifetime: time.Minute, DPDDelay: time.Second, InterfaceID: 17, Link: "cvtx1",
		}}},
		Rules:  []Rule{{Family: IPv4, Priority: RulePriorityTunnel, Table: Table}},
		Routes: []Route{{Destination: p("10.10.0.0/24"), Kind: RouteUnicast, Link: "cvtx1", Metric: MetricTunnel, Table: Table}},
		Firewall: Firewall{Pods: []netip.Prefix{p("10.244.0.0/16")}, Masquerade: true, Clamps: []Clamp{{"cvtwg0", 1380, 1360}},
			Tunnels:  []Tunnel{{Name: "site default/berlin", Kind: TunnelSite, Link: "cvtx1", Prefixes: []netip.Prefix{p("10.10.0.0/24")}, Access: AccessPods | AccessSites}},
			Pools:    []Pool{{Link: "cvtwg0", Prefixes: []netip.Prefix{p("10.99.0.0/24")}}},
			NodeLink: &NodeLink{Link: NodeLinkName, Port: NodeLinkPort, Outer: []netip.Addr{netip.MustParseAddr("172.30.0.11")}, Sources: []netip.Prefix{p("10.244.0.0/16")}}},
		Services: Services{Mode: ServicesTranslate, Ranges: []netip.Prefix{p("10.96.0.0/12")}, Sources: []string{"cvtwg0"},
			Ports: []ServicePort{{Name: "default/web:http", Address: netip.MustParseAddr("10.96.0.1"), Protocol: TCP, Port: 80, AffinitySeconds: 5,
				Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.244.0.3:8080")}}}},
		Guard: &Guard{Link: EncryptionLink, Port: 51821, Local: []string{"cni0"}, Nodes: []netip.Addr{netip.MustParseAddr("172.30.0.11")},
			Pods: []netip.Prefix{p("10.244.0.0/16")}, Sites: []netip.Prefix{p("10.10.0.0/24")}, Strict: true,
			Exempt: []Exemption{{Name: "API server", Protocol: TCP, Address: netip.MustParseAddr("172.30.0.11"), Port: 6443}}},
	}
}

// Every field that is not a secret shows in a line: a plan or a diff that hides a change
// would be believed.
func TestEveryChangeShows(t *testing.T) {
	changes := map[string]func(*State){
		"sysctl":         func(s *State) { s.Sysctls[0].Value = "0" },
		"link kind":      func(s *State) { s.Links[0].Kind = LinkXFRM },
		"link mtu":       func(s *State) { s.Links[0].MTU++ },
		"link address":   func(s *State) { s.Links[0].Addresses = nil },
		"link id":        func(s *State) { s.Links[1].InterfaceID++ },
		"vxlan id":       func(s *State) { s.Links[2].VXLAN.ID++ },
		"vxlan port":     func(s *State) { s.Links[2].VXLAN.Port++ },
		"vxlan family":   func(s *State) { s.Links[2].VXLAN.Family = IPv6 },
		"vxlan mac":      func(s *State) { s.Links[2].VXLAN.MAC[0]++ },
		"far end":        func(s *State) { s.Links[2].VXLAN.Peers[0].Outer = s.Links[2].VXLAN.Peers[0].Outer.Next() },
		"far end's mac":  func(s *State) { s.Links[2].VXLAN.Peers[0].MAC[0]++ },
		"far end's via":  func(s *State) { s.Links[2].VXLAN.Peers[0].Via = nil },
		"guard's outer":  func(s *State) { s.Firewall.NodeLink.Outer = nil },
		"guard's inner":  func(s *State) { s.Firewall.NodeLink.Sources = nil },
		"guard's port":   func(s *State) { s.Firewall.NodeLink.Port++ },
		"guard's link":   func(s *State) { s.Firewall.NodeLink.Link = "x" },
		"unmasqueraded":  func(s *State) { s.Firewall.Unmasqueraded = s.Firewall.Pods },
		"rule forwarded": func(s *State) { s.Rules[0].Forwarded = true },
		"rule port":      func(s *State) { s.Rules[0].UDPPort = 8472 },
		"route on-link":  func(s *State) { s.Routes[0].OnLink = true },
		"wg public key":  func(s *State) { s.WireGuard[0].PublicKey[0]++ },
		"wg port":        func(s *State) { s.WireGuard[0].ListenPort++ },
		"wg mark":        func(s *State) { s.WireGuard[0].FirewallMark++ },
		"peer key":       func(s *State) { s.WireGuard[0].Peers[0].PublicKey[0]++ },
		"peer psk gone":  func(s *State) { s.WireGuard[0].Peers[0].PresharedKey = secret.Bytes{} },
		"peer endpoint":  func(s *State) { s.WireGuard[0].Peers[0].Endpoint = netip.AddrPort{} },
		"peer initiate":  func(s *State) { s.WireGuard[0].Peers[0].Initiate = false },
		"peer keepalive": func(s *State) { s.WireGuard[0].Peers[0].PersistentKeepaliveSeconds = 0 },
		"peer ips":       func(s *State) { s.WireGuard[0].Peers[0].AllowedIPs = nil },
		"ipsec datapath": func(s *State) { s.IPsec.Datapath = LibIPsec },
		"ipsec remote":   func(s *State) { s.IPsec.Connections[0].RemoteAddresses = nil },
		"ipsec local":    func(s *State) { s.IPsec.Connections[0].LocalAddresses = []string{"x"} },
		"ipsec local id": func(s *State) { s.IPsec.Connections[0].LocalID = "" },
		"ipsec rem id":   func(s *State) { s.IPsec.Connections[0].RemoteID = "" },
		"ipsec auth":     func(s *State) { s.IPsec.Connections[0].Auth = IPsecAuth{Certificate: []byte("c")} },
		"ipsec ike":      func(s *State) { s.IPsec.Connections[0].IKEProposals = []string{"z"} },
		"ipsec esp":      func(s *State) { s.IPsec.Connections[0].ESPProposals = []string{"z"} },
		"ipsec local ts": func(s *State) { s.IPsec.Connections[0].LocalSelectors = nil },
		"ipsec rem ts":   func(s *State) { s.IPsec.Connections[0].RemoteSelectors = nil },
		"ipsec children": func(s *State) { s.IPsec.Connections[0].ChildPerPair = true },
		"ipsec initiate": func(s *State) { s.IPsec.Connections[0].Initiate = InitiateNever },
		"ipsec ike life": func(s *State) { s.IPsec.Connections[0].IKELifetime++ },
		"ipsec life":     func(s *State) { s.IPsec.Connections[0].ChildLifetime++ },
		"ipsec dpd":      func(s *State) { s.IPsec.Connections[0].DPDDelay++ },
		"ipsec if_id":    func(s *State) { s.IPsec.Connections[0].InterfaceID++ },
		"ipsec link":     func(s *State) { s.IPsec.Connections[0].Link = "x" },
		"rule":           func(s *State) { s.Rules[0].Mark = 1 },
		"route kind":     func(s *State) { s.Routes[0].Kind = RouteUnreachable },
		"route via":      func(s *State) { s.Routes[0].Via = netip.MustParseAddr("10.0.0.1") },
		"route source":   func(s *State) { s.Routes[0].Source = netip.MustParseAddr("10.0.0.1") },
		"route metric":   func(s *State) { s.Routes[0].Metric++ },
		"masquerade":     func(s *State) { s.Firewall.Masquerade = false },
		"pods":           func(s *State) { s.Firewall.Pods = nil },
		"services":       func(s *State) { s.Firewall.Services = s.Firewall.Pods },
		"nodes":          func(s *State) { s.Firewall.Nodes = s.Firewall.Pods },
		"clamp":          func(s *State) { s.Firewall.Clamps[0].MSS6++ },
		"pool":           func(s *State) { s.Firewall.Pools = nil },
		"tunnel link":    func(s *State) { s.Firewall.Tunnels[0].Link = "x" },
		"tunnel from":    func(s *State) { s.Firewall.Tunnels[0].Prefixes = nil },
		"tunnel access":  func(s *State) { s.Firewall.Tunnels[0].Access = 0 },
		"service mode":   func(s *State) { s.Services.Mode = ServicesProxy },
		"service ranges": func(s *State) { s.Services.Ranges = nil },
		"service pods":   func(s *State) { s.Services.Pods = s.Services.Ranges },
		"service source": func(s *State) { s.Services.Sources = []string{"x"} },
		"port proto":     func(s *State) { s.Services.Ports[0].Protocol = UDP },
		"port affinity":  func(s *State) { s.Services.Ports[0].AffinitySeconds = 0 },
		"guard link":     func(s *State) { s.Guard.Link = "x" },
		"guard port":     func(s *State) { s.Guard.Port++ },
		"guard local":    func(s *State) { s.Guard.Local = nil },
		"guard nodes":    func(s *State) { s.Guard.Nodes = nil },
		"guard pods":     func(s *State) { s.Guard.Pods = nil },
		"guard sites":    func(s *State) { s.Guard.Sites = nil },
		"guard scope":    func(s *State) { s.Guard.AllTraffic = true },
		"guard strict":   func(s *State) { s.Guard.Strict = false },
		"guard exempt":   func(s *State) { s.Guard.Exempt[0].Port++ },
		"guard gone":     func(s *State) { s.Guard = nil },
		"port endpoints": func(s *State) { s.Services.Ports[0].Endpoints = nil },
	}
	for name, change := range changes {
		s := example()
		change(&s)
		if Diff(example(), s) == nil {
			t.Errorf("a change of %s does not show", name)
		}
	}
	if d := Diff(example(), example()); d != nil {
		t.Errorf("equal states differ: %v", d)
	}
}

func TestNoSecretIsPrinted(t *testing.T) {
	text := example().String()
	for _, s := range []string{"private-key-material", "preshared-material", "psk-material"} {
		if strings.Contains(text, s) {
			t.Errorf("%q is printed", s)
		}
	}
}

func TestSortMakesOrderIrrelevant(t *testing.T) {
	a, b := example(), example()
	slices.Reverse(b.Links)
	slices.Reverse(b.Links[1].Addresses)
	a.Sort()
	b.Sort()
	if a.String() != b.String() {
		t.Errorf("sorted states differ:\n%s\n%s", a, b)
	}
}

func TestDiffCountsRepeatedLines(t *testing.T) {
	got := DiffLines([]string{"a", "a", "b"}, []string{"a", "c"})
	if want := []string{"- a", "- b", "+ c"}; !slices.Equal(got, want) {
		t.Errorf("DiffLines = %v, want %v", got, want)
	}
}

func TestParseKey(t *testing.T) {
	k := Key{1, 2, 3}
	if got, err := ParseKey(k.String()); err != nil || got != k {
		t.Errorf("ParseKey(%s) = %v, %v", k, got, err)
	}
	for _, bad := range []string{"", "x", "AAAA", k.String() + "A", strings.Repeat("A", 43), k.String() + "\n"} {
		if _, err := ParseKey(bad); err == nil {
			t.Errorf("ParseKey(%q) is accepted", bad)
		}
	}
}
