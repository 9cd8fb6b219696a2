package cilium

import (
	"fmt"
	"strconv"
	"strings"
)

// Where Cilium's own chart keeps its configuration.
const (
	ConfigNamespace = "kube-system"
	ConfigName      = "cilium-config"
)

// Settings are the data of Cilium's ConfigMap: options of its agents, by name.
type Settings map[string]string

// On tells whether an option is on; "strict" is what kube-proxy-replacement was before 1.14.
func (s Settings) On(option string) bool { return s[option] == "true" || s[option] == "strict" }

// Native tells whether pods' packets travel between nodes as they are, and not in an overlay.
func (s Settings) Native() bool { return s["routing-mode"] == "native" || s["tunnel"] == "disabled" }

// OverlayPort is the UDP port by which pods' packets travel between nodes; 0: they travel as
// they are.
func (s Settings) OverlayPort() uint16 {
	if s.Native() {
		return 0
	}
	if port, err := strconv.ParseUint(s["tunnel-port"], 10, 16); err == nil && port != 0 {
		return uint16(port)
	}
	if s["tunnel-protocol"] == "geneve" || s["tunnel"] == "geneve" {
		return 6081
	}
	return 8472
}

// RefusesEncryption says in one line why a NodeEncryption cannot keep its promise beside a
// Cilium with these settings, and what to do; empty: it can. What was tried, and what is
// refused because it was not, stands in docs/install-cilium.md.
func (s Settings) RefusesEncryption() string {
	switch {
	case s.On("enable-wireguard") || s.On("enable-ipsec"):
		return "Cilium encrypts between nodes itself (encryption.enabled): delete the NodeEncryption, or turn Cilium's off"
	case s["ipam"] != "" && s["ipam"] != "kubernetes":
		return fmt.Sprintf("Cilium gives pods addresses that are not in their nodes' spec.podCIDRs (ipam.mode=%s): use Cilium's own encryption, or ipam.mode=kubernetes in a new cluster", s["ipam"])
	case s.On("kube-proxy-replacement") || s.On("enable-node-port") || s.On("enable-bpf-masquerade"):
		return "Cilium answers and forwards node ports in eBPF at the network card, past the kernel's firewall, and not at the encrypted link: use Cilium's own encryption, or kubeProxyReplacement=false without bpf.masquerade"
	}
	return ""
}

// RefusesEndpoints says in one line why a Cilium with these settings does not carry what is
// behind a gateway's pod (nodeLink: CiliumEndpoint), and what to do; empty: it does. What was
// tried stands in docs/install-cilium.md.
func (s Settings) RefusesEndpoints() string {
	if s.Native() {
		return "with native routing packets would leave the nodes with the addresses of sites, which fabrics drop: set Encapsulated, or Direct where the fabric lets them pass"
	}
	return ""
}

// SkipsRoutes says in one line why what pods say to sites and devices passes a node's routes by, and so never
// gets to a gateway, and what to do; empty: it does not. It is so in Cilium 1.15 on nodes with one
// uplink.
func (s Settings) SkipsRoutes() string {
	several := len(strings.Fields(s["devices"])) > 1
	if !s.Native() || !s.On("kube-proxy-replacement") || !s.On("enable-bpf-masquerade") || s.On("enable-host-legacy-routing") || s.On("enable-endpoint-routes") || several {
		return ""
	}
	return "with native routing Cilium's host routing in eBPF (bpf.masquerade) sends what pods say to sites and devices by a node's only uplink, whatever routes it has: set bpf.hostLegacyRouting=true, or endpointRoutes.enabled=true"
}

// RefusesChain says in one line why no plug-in of ours can stand behind Cilium's, and what to do;
// empty: it can.
func (s Settings) RefusesChain() string {
	if !s.On("cni-exclusive") {
		return ""
	}
	return "Cilium removes network configurations of others (cni.exclusive), so that pods of a booting node do not wait for its guard: set cni.exclusive=false"
}
