package model

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/netstate"
)

const parseGateway = "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: gw}\nspec: {deviceCIDRs: [10.200.0.0/24], cluster: {podCIDRs: [10.244.0.0/16]}}\n---\n"

func siteYAML(name, created, cidr string, key int) string {
	return fmt.Sprintf("apiVersion: culvert.dev/v1alpha1\nkind: Site\nmetadata: {name: %s, creationTimestamp: %s}\nspec: {gatewayRef: {name: gw}, cidrs: [%s], wireguard: {publicKey: %s}}\n---\n", name, created, cidr, testKey(key))
}

// FAULTS 12: the first one stays, whatever the order of the files; the newcomer is refused
// with both named.
func TestFirstComeStays(t *testing.T) {
	const older, newer = `"2026-01-01T00:00:00Z"`, `"2026-01-02T00:00:00Z"`
	for _, c := range []struct{ name, a, b, refused string }{
		{"equal, newer first in the file", siteYAML("a", newer, "172.16.0.0/16", 1), siteYAML("b", older, "172.16.0.0/16", 2), "a equals b"},
		{"subset", siteYAML("a", older, "172.16.0.0/16", 1), siteYAML("b", newer, "172.16.5.0/24", 2), "b lies in a"},
		{"superset", siteYAML("a", older, "172.16.5.0/24", 1), siteYAML("b", newer, "172.16.0.0/16", 2), "b contains a"},
		{"without a time is new", siteYAML("a", "null", "172.16.0.0/16", 1), siteYAML("b", newer, "172.16.0.0/16", 2), "a equals b"},
		{"same time: order of the file", siteYAML("b", older, "172.16.0.0/16", 1), siteYAML("a", older, "172.16.0.0/16", 2), "a equals b"},
		{"apart", siteYAML("a", older, "172.16.0.0/16", 1), siteYAML("b", newer, "172.17.0.0/16", 2), ""},
		{"same key", siteYAML("a", older, "172.16.0.0/16", 1), siteYAML("b", newer, "172.17.0.0/16", 1), "b key a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := Parse(read(t, parseGateway+c.a+c.b), ParseOptions{})
			got := ""
			for _, p := range m.Problems {
				words := []string{"equals", "lies in", "contains", "key"}
				for _, w := range words {
					if strings.Contains(p.Message, " "+w+" ") {
						other := "a"
						if strings.Contains(p.Message, "Site default/b") {
							other = "b"
						}
						got = p.Object.Name + " " + w + " " + other
					}
				}
			}
			if got != c.refused {
				t.Errorf("refused %q, want %q: %v", got, c.refused, m.Problems)
			}
			if want := 2 - min(1, len(c.refused)); len(m.Gateways[0].Sites) != want {
				t.Errorf("%d sites in effect, want %d", len(m.Gateways[0].Sites), want)
			}
		})
	}
}

// A change of an older object does not take away what a newer one has already.
func TestInEffectStays(t *testing.T) {
	objects := read(t, parseGateway+
		siteYAML("a", `"2026-01-01T00:00:00Z"`, "172.16.0.0/12", 1)+siteYAML("b", `"2026-01-02T00:00:00Z"`, "172.16.5.0/24", 2))
	b := Ref{KindSite, ID{"default", "b"}}
	m := Parse(objects, ParseOptions{InEffect: map[Ref]bool{b: true}})
	if len(m.Problems) != 1 || m.Problems[0].Object.Name != "a" {
		t.Errorf("problems %v, want one of a", m.Problems)
	}
	gateway := strings.Replace(parseGateway, "10.200.0.0/24", "172.16.0.0/16", 1)
	m = Parse(read(t, gateway+siteYAML("b", "null", "172.16.5.0/24", 2)), ParseOptions{InEffect: map[Ref]bool{b: true}})
	if len(m.Problems) == 0 || m.Problems[0].Kind != KindGateway || !strings.Contains(m.Problems[0].Message, "Site default/b") {
		t.Errorf("problems %v, want the gateway's, which names the site", m.Problems)
	}
}

// What is left out means the same with the defaults of the CRDs and without.
func TestDefaultsAgree(t *testing.T) {
	docs := []string{
		"apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: gw}\nspec: {deviceCIDRs: [10.200.0.0/24]}\n",
		"apiVersion: culvert.dev/v1alpha1\nkind: Site\nmetadata: {name: a}\nspec: {gatewayRef: {name: gw}, cidrs: [172.16.0.0/16], wireguard: {publicKey: " + testKey(1) + "}}\n",
		"apiVersion: culvert.dev/v1alpha1\nkind: Site\nmetadata: {name: b}\nspec: {gatewayRef: {name: gw}, cidrs: [172.17.0.0/16], ipsec: {address: 192.0.2.1, auth: {presharedKeySecretRef: {name: s, key: k}}}}\n",
		"apiVersion: culvert.dev/v1alpha1\nkind: Device\nmetadata: {name: d}\nspec: {gatewayRef: {name: gw}}\n",
		"apiVersion: culvert.dev/v1alpha1\nkind: RemoteCluster\nmetadata: {name: r}\nspec: {targets: [{names: [a.example.com], ports: [{port: 1}]}]}\n",
		"apiVersion: culvert.dev/v1alpha1\nkind: NodeEncryption\nmetadata: {name: cluster}\nspec: {enforcement: Strict}\n",
	}
	const key = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {k: 0123456789abcdef}\n"
	api := newAPIServer(t)
	var stored []string
	for _, doc := range docs {
		var tree map[string]any
		if err := yamlTree(doc, &tree); err != nil {
			t.Fatal(err)
		}
		object, refused := api.admit(t, tree)
		if len(refused) > 0 {
			t.Fatalf("%s: %v", doc, refused)
		}
		b, err := json.Marshal(object)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, string(b)+"\n")
	}
	raw := Parse(read(t, strings.Join(docs, "---\n")+key), ParseOptions{})
	defaulted := Parse(read(t, strings.Join(stored, "---\n")+key), ParseOptions{})
	if len(raw.Problems)+len(defaulted.Problems) > 0 {
		t.Fatalf("problems %v %v", raw.Problems, defaulted.Problems)
	}
	if len(raw.Gateways[0].Sites) != 2 || !reflect.DeepEqual(raw, defaulted) {
		a, _ := json.Marshal(raw)
		b, _ := json.Marshal(defaulted)
		t.Errorf("\nfrom a file       %s\nfrom an API server %s", a, b)
	}
}

func TestAllowedNamespaces(t *testing.T) {
	gateway := "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: gw}\nspec: {allowedSites: [{namespaces: [branch], cidrs: [172.16.0.0/16]}, {namespaces: ['*'], cidrs: [172.30.0.0/16]}]}\n---\n"
	for _, c := range []struct {
		namespace, cidr string
		allowed         bool
	}{
		{"branch", "172.16.5.0/24", true},
		{"branch", "172.17.5.0/24", false},
		{"branch", "172.16.0.0/12", false},
		{"other", "172.16.5.0/24", false},
		{"other", "172.30.5.0/24", true},
		{"default", "172.31.0.0/16", false},
	} {
		s := strings.Replace(siteYAML("a", "null", c.cidr, 1), "name: a,", "name: a, namespace: "+c.namespace+",", 1)
		s = strings.Replace(s, "name: gw", "name: gw, namespace: default", 1)
		m := Parse(read(t, gateway+s), ParseOptions{})
		if allowed := len(m.Problems) == 0; allowed != c.allowed {
			t.Errorf("%s %s: allowed %v, want %v: %v", c.namespace, c.cidr, allowed, c.allowed, m.Problems)
		}
	}
}

func TestAPIServersAddressAndFoundRanges(t *testing.T) {
	objects := read(t, "apiVersion: culvert.dev/v1alpha1\nkind: VPNGateway\nmetadata: {name: gw}\n---\n"+siteYAML("a", "null", "172.16.0.0/16", 1)+siteYAML("b", "null", "172.17.0.0/16", 2))
	m := Parse(objects, ParseOptions{
		APIServers: []netip.Addr{netip.MustParseAddr("172.16.9.9")},
		Found:      ClusterRanges{Nodes: []netip.Prefix{netip.MustParsePrefix("172.17.1.0/24")}},
	})
	if len(m.Problems) != 2 || len(m.Gateways[0].Nodes) != 1 {
		t.Errorf("problems %v, want one of each site", m.Problems)
	}
}

func TestWeakAlgorithmsWhenListed(t *testing.T) {
	objects := read(t, parseGateway+`apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: old}
spec:
  gatewayRef: {name: gw}
  cidrs: [172.16.0.0/16]
  access: {to: []}
  ipsec:
    address: 192.0.2.1
    auth: {presharedKeySecretRef: {name: s, key: k}}
    proposals: {ike: [aes128-sha1-modp1024], allowWeak: [sha1, modp1024]}
---
apiVersion: v1
kind: Secret
metadata: {name: s}
data: {k: MDEyMzQ1Njc4OWFiY2RlZg==}
`)
	m := Parse(objects, ParseOptions{})
	if len(m.Problems) > 0 {
		t.Fatal(m.Problems)
	}
	s := m.Gateways[0].Sites[0]
	if s.Access != 0 || s.IPsec.Initiate != netstate.InitiateAlways || string(s.IPsec.Auth.PresharedKey.Reveal()) != "0123456789abcdef" ||
		s.IPsec.IKEProposals[0] != "aes128-sha1-modp1024" || len(s.IPsec.ESPProposals) == 0 {
		t.Errorf("parsed as %+v %+v", s, s.IPsec)
	}
}
