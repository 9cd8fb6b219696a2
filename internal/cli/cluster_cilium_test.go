package cli

import (
	"strings"
	"testing"
)

func TestJudgeCilium(t *testing.T) {
	for name, c := range map[string]struct {
		config, links map[string]string
		version       string
		encrypts      bool
		broken        bool
		want          []string // one line has each, in this order
	}{
		"as the chart makes it": {
			config: map[string]string{"routing-mode": "tunnel", "kube-proxy-replacement": "false", "ipam": "cluster-pool"},
			want:   []string{"tunnel: nodeLink Encapsulated", "false: kube-proxy translates", "note Cilium: ipam cluster-pool", "would be refused"},
		},
		"Constellation 2.x": {
			config: map[string]string{"tunnel": "disabled", "kube-proxy-replacement": "strict", "ipam": "kubernetes", "enable-wireguard": "true", "enable-cilium-endpoint-slice": "true"},
			links:  map[string]string{"vpn/hq": ""},
			want:   []string{"native: nodeLink", "true: services Translate works; Route would not", "ok Cilium: ipam", "note Cilium: NodeEncryption would be refused: Cilium encrypts"},
		},
		"sockets of hosts": {
			config: map[string]string{"kube-proxy-replacement": "true", "bpf-lb-sock-hostns-only": "true"},
			want:   []string{"true, sockets of hosts only", "note Cilium: NodeEncryption would be refused"},
		},
		"with kube-proxy": {
			config: map[string]string{"kube-proxy-replacement": "false", "ipam": "kubernetes"}, encrypts: true,
			want: []string{"ok Cilium: NodeEncryption works in both scopes; what is encrypted are the packets of Cilium's tunnel (UDP 8472)"},
		},
		"past the firewall": {
			config:   map[string]string{"routing-mode": "native", "kube-proxy-replacement": "true", "enable-bpf-masquerade": "true"},
			encrypts: true, broken: true,
			want: []string{"FAIL Cilium: NodeEncryption is refused", "or kubeProxyReplacement=false"},
		},
		"masquerades at the link of sites": {
			config: map[string]string{"kube-proxy-replacement": "true", "enable-bpf-masquerade": "true", "devices": "eth0 cvt+"}, broken: true,
			links: map[string]string{"vpn/hq": ""},
			want:  []string{"FAIL VPNGateway vpn/hq devices=eth0 cvt+ has Cilium masquerade", "devices=eth0)"},
		},
		"past the routes": {
			config: map[string]string{"routing-mode": "native", "kube-proxy-replacement": "true", "enable-bpf-masquerade": "true"}, broken: true,
			links: map[string]string{"vpn/hq": ""},
			want:  []string{"FAIL VPNGateway vpn/hq with native routing", "set bpf.hostLegacyRouting=true"},
		},
		"past the routes, perhaps": {
			version: "1.20.2",
			config:  map[string]string{"routing-mode": "native", "kube-proxy-replacement": "true", "enable-bpf-masquerade": "true"},
			links:   map[string]string{"vpn/hq": ""},
			want:    []string{"note VPNGateway vpn/hq was not tried with this Cilium"},
		},
		"by the kernel's routes": {
			config: map[string]string{"routing-mode": "native", "kube-proxy-replacement": "true", "enable-bpf-masquerade": "true", "enable-host-legacy-routing": "true"},
			links:  map[string]string{"vpn/hq": ""},
			want:   []string{"ok Cilium: enable-bpf-masquerade true"},
		},
		"masquerades at what it finds": {
			config: map[string]string{"kube-proxy-replacement": "true", "enable-bpf-masquerade": "true"},
			links:  map[string]string{"vpn/hq": ""},
			want:   []string{"ok Cilium: enable-bpf-masquerade true"},
		},
		"masquerades at the uplink": {
			config: map[string]string{"kube-proxy-replacement": "true", "enable-bpf-masquerade": "true", "devices": "eth0"},
			links:  map[string]string{"vpn/hq": ""},
			want:   []string{"true: services Translate works"},
		},
		"the endpoint's way without tunnels": {
			version: "1.15.19", broken: true,
			config: map[string]string{"routing-mode": "native"},
			links:  map[string]string{"vpn/edge": "CiliumEndpoint", "vpn/hq": "Encapsulated"},
			want:   []string{"FAIL VPNGateway vpn/edge nodeLink CiliumEndpoint is refused", "set Encapsulated"},
		},
		"the endpoint's way with slices": {
			version: "1.20.2",
			config:  map[string]string{"enable-cilium-endpoint-slice": "true"},
			links:   map[string]string{"vpn/hq": "CiliumEndpoint"},
			want:    []string{"ok VPNGateway vpn/hq nodeLink CiliumEndpoint: the agent", "note Cilium: enable-cilium-endpoint-slice"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var text strings.Builder
			for _, f := range judgeCilium(c.config, c.version, c.links, c.encrypts) {
				text.WriteString(f.Result + " " + f.Check + " " + f.Message + "\n")
				if f.Result == findingFail && !c.broken {
					t.Errorf("%s is called broken: %s", f.Check, f.Message)
				}
			}
			rest := text.String()
			for _, want := range c.want {
				_, after, found := strings.Cut(rest, want)
				if !found {
					t.Fatalf("no %q in\n%s", want, text.String())
				}
				rest = after
			}
		})
	}
}
