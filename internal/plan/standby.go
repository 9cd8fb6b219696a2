package plan

import (
	"slices"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Standby is what of a gateway's state a pod has in effect while another one works:
// everything but the tunnels themselves. It answers no peer, nothing for a tunnel's range
// leaves it, and what takes long (services' addresses, links to the nodes) is ready.
func Standby(s netstate.State) netstate.State {
	var tunnels []string
	for _, l := range s.Links {
		if l.Kind != netstate.LinkVXLAN {
			tunnels = append(tunnels, l.Name)
		}
	}
	out := s
	out.WireGuard = nil
	if s.IPsec != nil {
		out.IPsec = &netstate.IPsec{Datapath: s.IPsec.Datapath}
	}
	out.Links = slices.DeleteFunc(slices.Clone(s.Links), func(l netstate.Link) bool { return slices.Contains(tunnels, l.Name) })
	out.Routes = slices.DeleteFunc(slices.Clone(s.Routes), func(r netstate.Route) bool { return slices.Contains(tunnels, r.Link) })
	return out
}
