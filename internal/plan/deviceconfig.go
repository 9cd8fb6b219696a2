package plan

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

// DeviceConfig is a device's side of the tunnel as a wg-quick(8) file. It holds the
// device's private key when that is known, so the result is itself a secret; else a
// comment says where to put it. Facts need PublicKey, UnderlayMTU and Addresses.
func DeviceConfig(gw *model.Gateway, d *model.Device, private secret.Bytes, facts Facts) (secret.Bytes, error) {
	addrs := facts.Addresses[d.ID]
	switch {
	case len(addrs) == 0:
		return secret.Bytes{}, fmt.Errorf("device %s has no address yet", d.ID)
	case facts.PublicKey.IsZero():
		return secret.Bytes{}, fmt.Errorf("the public key of gateway %s is not known", gw.ID)
	case gw.Address == "":
		return secret.Bytes{}, fmt.Errorf("gateway %s has no address that devices can dial: set spec.expose.address", gw.ID)
	}
	p := &planner{gw: gw, facts: facts}
	var b strings.Builder
	fmt.Fprintf(&b, "# Device %s at gateway %s\n[Interface]\n", d.ID, gw.ID)
	if private.IsZero() {
		b.WriteString("# PrivateKey = the key that belongs to " + d.PublicKey.String() + "; it was not made here\n")
	} else {
		fmt.Fprintf(&b, "PrivateKey = %s\n", base64.StdEncoding.EncodeToString(private.Reveal()))
	}
	var own []netip.Prefix
	for _, a := range addrs {
		own = append(own, host(a))
	}
	fmt.Fprintf(&b, "Address = %s\n", join(own))
	if len(gw.DNS) > 0 {
		fmt.Fprintf(&b, "DNS = %s\n", join(gw.DNS))
	}
	fmt.Fprintf(&b, "MTU = %d\n\n[Peer]\nPublicKey = %s\n", p.mtu(overheadWireGuard), facts.PublicKey)
	if !d.PresharedKey.IsZero() {
		fmt.Fprintf(&b, "PresharedKey = %s\n", base64.StdEncoding.EncodeToString(d.PresharedKey.Reveal()))
	}
	fmt.Fprintf(&b, "Endpoint = %s\n", net.JoinHostPort(gw.Address, strconv.Itoa(int(gw.WireGuardPort))))
	fmt.Fprintf(&b, "AllowedIPs = %s\n", join(reachable(gw, d)))
	if d.PersistentKeepaliveSeconds != 0 {
		fmt.Fprintf(&b, "PersistentKeepalive = %d\n", d.PersistentKeepaliveSeconds)
	}
	return secret.New([]byte(b.String())), nil
}

// reachable lists what a device sends into the tunnel: what it may open, the gateway
// itself, and what may open connections to it (pods, always).
func reachable(gw *model.Gateway, d *model.Device) []netip.Prefix {
	out := slices.Clone(gw.Pods)
	if d.Access&netstate.AccessServices != 0 {
		out = append(out, gw.ServiceRanges...)
	}
	if d.Access&netstate.AccessNodes != 0 {
		out = append(out, gw.Nodes...)
	}
	if d.Access&netstate.AccessSites != 0 {
		for _, s := range gw.Sites {
			out = append(out, s.CIDRs...)
		}
	}
	for _, a := range GatewayAddresses(gw) {
		out = append(out, host(a))
	}
	slices.SortFunc(out, netstate.ComparePrefixes)
	return slices.Compact(out)
}

func join[T fmt.Stringer](items []T) string {
	s := make([]string, len(items))
	for i, x := range items {
		s[i] = x.String()
	}
	return strings.Join(s, ", ")
}
