// Package plan decides what a host's network should look like: from the model and from
// facts observed on the host to a netstate.State.
//
// It is pure: the same input gives the same state. It touches no clock, file, socket or
// kernel; time and everything else that changes comes in with the facts.
package plan

import (
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-vpn/culvert/internal/ipam"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// WireGuardLink is the gateway's one WireGuard link: all its sites and devices are peers
// of it, so that a stock client needs to know one key and one port.
const WireGuardLink = "cvtwg0"

// Bytes that a packet grows by on its way into a tunnel, at worst: an outer IPv6 header
// (40), UDP (8), and
//   - WireGuard: 16 of header and 16 of tag (https://www.wireguard.com/protocol/)
//   - ESP with AES-GCM (RFC 4303, RFC 4106): 8 of header, 8 of IV, up to 5 of padding and
//     trailer, 16 of tag; rounded up to 100, so that 1500 gives the 1400 that peers count on:
//     strongSwan's kernel-libipsec cuts off what is longer (maxLibIPsec).
const (
	overheadWireGuard = 80
	overheadESP       = 100
)

// maxLibIPsec is the largest inner packet that strongSwan's user-space ESP takes, in bytes
// (TUN_DEFAULT_MTU; seen with 5.9.8: longer ones arrive truncated).
const maxLibIPsec = 1400

const (
	minimumMTU = 1280 // RFC 8200, section 5: nothing below may carry IPv6
	defaultMTU = 1500
)

// Facts is what the planner must know beyond the objects.
type Facts struct {
	Now time.Time
	// PrivateKey is the gateway's WireGuard key; zero in a dry run.
	PrivateKey secret.Bytes
	PublicKey  netstate.Key
	// IPsecDatapath is what the host can do; empty counts as KernelESP.
	IPsecDatapath netstate.IPsecDatapath
	// UnderlayMTU is that of the link towards the peers, in bytes; 0: 1500.
	UnderlayMTU int
	// Resolved holds the addresses of the DNS names that endpoints use.
	Resolved map[string]netip.Addr
	// Endpoints are the places that peers were last seen at, before this process.
	Endpoints map[netstate.Key]netip.AddrPort
	// Addresses are the devices' addresses, see Addresses.
	Addresses map[model.ID][]netip.Addr
	// DeviceKeys are the public keys of devices whose key pair was made here.
	DeviceKeys map[model.ID]netstate.Key
	// Paths is what probes say of sites with several paths; for one that is not there, the
	// preferred path is taken to work.
	Paths map[model.ID]PathFacts

	// Nodes are those of the cluster that the gateway is a pod of, by name, NodeName the one
	// that it runs on, and PodIPs its own addresses, at most one per family. All empty: it
	// runs standalone.
	Nodes    []model.Node
	NodeName string
	PodIPs   []netip.Addr
}

// Result is a planned state and what else follows from the objects.
type Result struct {
	State netstate.State
	// NextChange is when the state changes by itself (a device expires); zero: never.
	NextChange time.Time
	// Waiting says, per object ("site default/berlin"), what is not in effect yet and why.
	Waiting map[string]string
}

// SiteName and DeviceName are how peers, tunnels and messages name an object.
func SiteName(id model.ID) string { return "site " + id.String() }

// DeviceName is the name of a device in peers, tunnels and messages.
func DeviceName(id model.ID) string {
	if id.Namespace == "" {
		return "device " + id.Name
	}
	return "device " + id.Namespace + "/" + id.Name // at once: there may be ten thousands
}

// planner carries what the parts of one plan share.
type planner struct {
	gw    *model.Gateway
	facts Facts
	out   Result
	wg    netstate.WireGuard
	paths []pathDevice // by index of the path
}

// Gateway plans one gateway host.
func Gateway(gw *model.Gateway, facts Facts) Result {
	p := &planner{gw: gw, facts: facts}
	p.out.Waiting = map[string]string{}
	p.firewallRanges()
	p.wireGuardDevice()
	n := len(gw.Sites) + len(gw.Devices)
	p.wg.Peers, p.out.State.Firewall.Tunnels = slices.Grow(p.wg.Peers, n), slices.Grow(p.out.State.Firewall.Tunnels, n)
	for _, s := range gw.Sites {
		p.site(s)
	}
	for _, d := range gw.Devices {
		p.device(d)
	}
	p.devicePools()
	p.finishPaths()
	p.finishWireGuard()
	p.services()
	p.nodeLink()
	p.clamps()
	p.rules()
	p.sysctls()
	p.out.State.Sort()
	return p.out
}

func (p *planner) firewallRanges() {
	f := &p.out.State.Firewall
	f.Pods = slices.Clone(p.gw.Pods)
	f.Services = slices.Clone(p.gw.ServiceRanges)
	f.Nodes = slices.Clone(p.gw.Nodes)
	f.Masquerade = p.gw.Masquerade
}

// GatewayAddresses are the gateway's own addresses in the devices' ranges: the first
// usable one of each.
func GatewayAddresses(gw *model.Gateway) []netip.Addr {
	var out []netip.Addr
	for _, r := range gw.DeviceRanges {
		out = append(out, ipam.GatewayAddress(r))
	}
	return out
}

func (p *planner) wireGuardDevice() {
	p.wg = netstate.WireGuard{
		Link:         WireGuardLink,
		PrivateKey:   p.facts.PrivateKey,
		PublicKey:    p.facts.PublicKey,
		ListenPort:   p.gw.WireGuardPort,
		FirewallMark: netstate.MarkOuter,
	}
}

// finishWireGuard adds the device when anything uses it: a gateway that has ranges for
// devices listens before the first one is made.
func (p *planner) finishWireGuard() {
	if len(p.wg.Peers) == 0 && len(p.gw.DeviceRanges) == 0 {
		return
	}
	link := netstate.Link{Name: WireGuardLink, Kind: netstate.LinkWireGuard, MTU: p.mtu(overheadWireGuard)}
	for _, a := range GatewayAddresses(p.gw) {
		link.Addresses = append(link.Addresses, host(a))
	}
	if len(p.paths) > 0 {
		link.Addresses = append(link.Addresses, p.paths[0].addresses...)
	}
	p.out.State.Links = append(p.out.State.Links, link)
	p.out.State.WireGuard = append(p.out.State.WireGuard, p.wg)
}

func (p *planner) site(s *model.Site) {
	if s.WireGuard != nil && !s.WireGuard.Probe.IsZero() {
		p.pathSite(s)
		return
	}
	link := WireGuardLink
	if s.IPsec != nil {
		link = p.ipsecSite(s)
	} else {
		p.wireGuardSite(s)
	}
	for _, c := range s.CIDRs {
		p.route(c, link)
	}
	p.tunnel(netstate.Tunnel{
		Name: SiteName(s.ID), Kind: netstate.TunnelSite, Link: link,
		Prefixes: slices.Clone(s.CIDRs), Access: s.Access,
	})
}

func (p *planner) wireGuardSite(s *model.Site) {
	w := s.WireGuard
	peer := netstate.WireGuardPeer{
		Name:                       SiteName(s.ID),
		PublicKey:                  w.PublicKey,
		PresharedKey:               w.PresharedKey,
		PersistentKeepaliveSeconds: w.PersistentKeepaliveSeconds,
		AllowedIPs:                 slices.Clone(s.CIDRs),
	}
	peer.Endpoint = p.endpoint(s.ID, w.Paths()[0], "spec.wireguard")
	peer.Initiate = peer.Endpoint.IsValid()
	p.wg.Peers = append(p.wg.Peers, peer)
}

// endpoint is where to reach the far end of a path, whose field is named in what is said
// when its name has no address.
func (p *planner) endpoint(site model.ID, path model.WireGuardPath, field string) netip.AddrPort {
	if path.Endpoint.IsZero() {
		return p.facts.Endpoints[path.PublicKey]
	}
	if a, ok := p.resolve(path.Endpoint.Host); ok {
		return netip.AddrPortFrom(a, path.Endpoint.Port)
	}
	p.out.Waiting[SiteName(site)] = fmt.Sprintf("%s.endpoint: %q has no address (yet): check the name in DNS", field, path.Endpoint.Host)
	return p.facts.Endpoints[path.PublicKey]
}

func (p *planner) resolve(host string) (netip.Addr, bool) {
	if a, err := netip.ParseAddr(host); err == nil {
		return a, true
	}
	a, ok := p.facts.Resolved[host]
	return a, ok
}

func (p *planner) device(d *model.Device) {
	name := DeviceName(d.ID)
	switch {
	case d.Suspended:
		p.out.Waiting[name] = "spec.suspend is true: the device is locked out until it is false again"
		return
	case !d.Expires.IsZero() && !d.Expires.After(p.facts.Now):
		p.out.Waiting[name] = "spec.expirationTime is over: set a later one to let the device in again"
		return
	case !d.Expires.IsZero():
		p.changeAt(d.Expires)
	}
	key := d.PublicKey
	if key.IsZero() {
		key = p.facts.DeviceKeys[d.ID]
	}
	addrs := p.facts.Addresses[d.ID]
	if key.IsZero() || len(addrs) == 0 {
		p.out.Waiting[name] = "no key or no address yet"
		return
	}
	peer := netstate.WireGuardPeer{
		Name:         name,
		PublicKey:    key,
		PresharedKey: d.PresharedKey,
		Endpoint:     p.facts.Endpoints[key],
	}
	peer.Initiate = peer.Endpoint.IsValid()
	peer.AllowedIPs = make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		peer.AllowedIPs = append(peer.AllowedIPs, host(a))
	}
	p.wg.Peers = append(p.wg.Peers, peer)
	p.tunnel(netstate.Tunnel{
		Name: name, Kind: netstate.TunnelDevice, Link: WireGuardLink,
		Prefixes: peer.AllowedIPs, Access: d.Access,
	})
}

func (p *planner) changeAt(t time.Time) {
	if p.out.NextChange.IsZero() || t.Before(p.out.NextChange) {
		p.out.NextChange = t
	}
}

// devicePools routes the devices' ranges as a whole: a device that comes or goes changes
// no route.
func (p *planner) devicePools() {
	for _, r := range p.gw.DeviceRanges {
		p.route(r, WireGuardLink)
	}
	if len(p.gw.DeviceRanges) > 0 {
		p.out.State.Firewall.Pools = []netstate.Pool{{Link: WireGuardLink, Prefixes: slices.Clone(p.gw.DeviceRanges)}}
	}
}

// route sends a range into a link, and nowhere at all when the link is gone.
func (p *planner) route(dst netip.Prefix, link string) {
	p.unicast(dst, link, netstate.Table)
	p.unreachable(dst)
}

func (p *planner) unicast(dst netip.Prefix, link string, table int) {
	p.out.State.Routes = append(p.out.State.Routes,
		netstate.Route{Destination: dst, Kind: netstate.RouteUnicast, Link: link, Metric: netstate.MetricTunnel, Table: table})
}

func (p *planner) unreachable(dst netip.Prefix) {
	p.out.State.Routes = append(p.out.State.Routes,
		netstate.Route{Destination: dst, Kind: netstate.RouteUnreachable, Metric: netstate.MetricUnreachable, Table: netstate.Table})
}

func (p *planner) tunnel(t netstate.Tunnel) {
	p.out.State.Firewall.Tunnels = append(p.out.State.Firewall.Tunnels, t)
}

// mtu is the inner MTU of a tunnel that adds overhead bytes.
func (p *planner) mtu(overhead int) int {
	if p.gw.MTU != 0 {
		return p.gw.MTU
	}
	underlay := p.facts.UnderlayMTU
	if underlay == 0 {
		underlay = defaultMTU
	}
	// Below 1280 no link may carry IPv6: the outer packets are then fragmented instead.
	return max(underlay-overhead, minimumMTU)
}

// clamps limits TCP segments to what fits each link: IPv4 20 + TCP 20, IPv6 40 + TCP 20.
func (p *planner) clamps() {
	for _, l := range p.out.State.Links {
		p.out.State.Firewall.Clamps = append(p.out.State.Firewall.Clamps,
			netstate.Clamp{Link: l.Name, MSS4: uint16(l.MTU - 40), MSS6: uint16(l.MTU - 60)})
	}
}

// families lists the families of all tunnel ranges.
func (p *planner) families() []netstate.Family {
	var out []netstate.Family
	for _, f := range []netstate.Family{netstate.IPv4, netstate.IPv6} {
		if slices.ContainsFunc(p.out.State.Routes, func(r netstate.Route) bool {
			return netstate.FamilyOf(r.Destination.Addr()) == f
		}) {
			out = append(out, f)
		}
	}
	return out
}

func (p *planner) rules() {
	s := &p.out.State
	relayed := s.Services.Mode == netstate.ServicesProxy
	for _, f := range p.families() {
		s.Rules = append(s.Rules,
			netstate.Rule{Family: f, Priority: netstate.RulePriorityOuter, Mark: netstate.MarkOuter, MarkMask: netstate.MarkMask, Table: mainTable},
			netstate.Rule{Family: f, Priority: netstate.RulePriorityTunnel, Table: netstate.Table})
		p.pathRules(f)
		if relayed {
			s.Rules = append(s.Rules, netstate.Rule{Family: f, Priority: netstate.RulePriorityProxy, Mark: netstate.MarkProxy, MarkMask: netstate.MarkMask, Table: netstate.ProxyTable})
			s.Routes = append(s.Routes, netstate.Route{Destination: everything(f), Kind: netstate.RouteLocal, Link: "lo", Table: netstate.ProxyTable})
		}
	}
}

const mainTable = 254 // RT_TABLE_MAIN

func everything(f netstate.Family) netip.Prefix {
	if f == netstate.IPv4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func (p *planner) sysctls() {
	for _, f := range p.families() {
		path := "net/ipv4/ip_forward"
		if f == netstate.IPv6 {
			path = "net/ipv6/conf/all/forwarding"
		}
		p.out.State.Sysctls = append(p.out.State.Sysctls, netstate.Sysctl{Path: path, Value: "1"})
	}
}

func (p *planner) services() {
	if len(p.gw.ServiceRanges) == 0 || len(p.out.State.Links) == 0 {
		return
	}
	s := netstate.Services{
		Mode:   p.gw.ServicesMode,
		Ranges: slices.Clone(p.gw.ServiceRanges),
		Pods:   slices.Clone(p.gw.Pods),
		Ports:  slices.Clone(p.gw.Ports),
	}
	for _, l := range p.out.State.Links {
		s.Sources = append(s.Sources, l.Name)
	}
	p.out.State.Services = s
}

// host is the prefix that holds one address.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// hash32 is a stable, short fingerprint of a name.
func hash32(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s))
	return h.Sum32()
}
