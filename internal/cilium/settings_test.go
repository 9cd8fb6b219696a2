package cilium

import (
	"strings"
	"testing"
)

func TestEncryptionBesideSettings(t *testing.T) {
	for name, c := range map[string]struct {
		settings Settings
		overlay  uint16
		refused  string // the reason has it; empty: not refused
	}{
		"none":                   {nil, 8472, ""},
		"tunnel":                 {Settings{"routing-mode": "tunnel", "tunnel-protocol": "vxlan", "ipam": "kubernetes"}, 8472, ""},
		"Geneve":                 {Settings{"tunnel-protocol": "geneve"}, 6081, ""},
		"a port of its own":      {Settings{"tunnel-protocol": "geneve", "tunnel-port": "7000"}, 7000, ""},
		"before 1.14":            {Settings{"tunnel": "geneve", "kube-proxy-replacement": "strict"}, 6081, "kubeProxyReplacement=false"},
		"native before 1.14":     {Settings{"tunnel": "disabled"}, 0, ""},
		"native":                 {Settings{"routing-mode": "native", "tunnel-protocol": "vxlan"}, 0, ""},
		"WireGuard":              {Settings{"enable-wireguard": "true"}, 8472, "encryption.enabled"},
		"IPsec":                  {Settings{"enable-ipsec": "true"}, 8472, "encryption.enabled"},
		"cluster pool":           {Settings{"ipam": "cluster-pool"}, 8472, "ipam.mode=cluster-pool"},
		"in place of kube-proxy": {Settings{"kube-proxy-replacement": "true", "routing-mode": "native"}, 0, "kubeProxyReplacement=false"},
		"node ports":             {Settings{"kube-proxy-replacement": "false", "enable-node-port": "true"}, 8472, "kubeProxyReplacement=false"},
		"masquerade":             {Settings{"kube-proxy-replacement": "false", "enable-bpf-masquerade": "true"}, 8472, "bpf.masquerade"},
		"none of it":             {Settings{"kube-proxy-replacement": "false", "enable-bpf-masquerade": "false", "enable-node-port": "false"}, 8472, ""},
	} {
		if got := c.settings.OverlayPort(); got != c.overlay {
			t.Errorf("%s: overlay at UDP %d, want %d", name, got, c.overlay)
		}
		if why := c.settings.RefusesEncryption(); !strings.Contains(why, c.refused) || (why == "") != (c.refused == "") {
			t.Errorf("%s: refused %q, want %q", name, why, c.refused)
		}
	}
}

func TestEndpointsBesideSettings(t *testing.T) {
	for _, s := range []Settings{nil, {"routing-mode": "tunnel"}, {"kube-proxy-replacement": "true", "tunnel": "geneve"}} {
		if why := s.RefusesEndpoints(); why != "" {
			t.Errorf("%v: refused: %s", s, why)
		}
	}
	for _, s := range []Settings{{"routing-mode": "native"}, {"tunnel": "disabled"}} {
		if why := s.RefusesEndpoints(); !strings.Contains(why, "set Encapsulated") {
			t.Errorf("%v: refused %q", s, why)
		}
	}
}

func TestRefusesChain(t *testing.T) {
	if why := (Settings{"cni-exclusive": "true"}).RefusesChain(); !strings.Contains(why, "cni.exclusive=false") {
		t.Errorf("exclusive: %q", why)
	}
	for _, s := range []Settings{nil, {"cni-exclusive": "false"}} {
		if why := s.RefusesChain(); why != "" {
			t.Errorf("%v: %q", s, why)
		}
	}
}

func TestSkipsRoutes(t *testing.T) {
	with := func(more ...string) Settings {
		s := Settings{"routing-mode": "native", "kube-proxy-replacement": "true", "enable-bpf-masquerade": "true"}
		for _, m := range more {
			name, value, _ := strings.Cut(m, "=")
			s[name] = value
		}
		return s
	}
	for _, s := range []Settings{with(), with("devices=eth0"), with("enable-host-legacy-routing=false")} {
		if why := s.SkipsRoutes(); !strings.Contains(why, "bpf.hostLegacyRouting=true, or endpointRoutes.enabled=true") {
			t.Errorf("%v: %q", s, why)
		}
	}
	for _, s := range []Settings{
		nil, with("routing-mode=tunnel"), with("kube-proxy-replacement=false"), with("enable-bpf-masquerade=false"),
		with("enable-host-legacy-routing=true"), with("enable-endpoint-routes=true"), with("devices=eth0 eth1"),
	} {
		if why := s.SkipsRoutes(); why != "" {
			t.Errorf("%v: %q", s, why)
		}
	}
}
