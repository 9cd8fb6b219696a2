package netlab

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/culvert-vpn/culvert/test/strongswan"
)

// needles are the forms in which a secret could show.
func needles(secret string) []string {
	list := []string{secret, base64.StdEncoding.EncodeToString([]byte(secret)), hex.EncodeToString([]byte(secret))}
	if raw, err := base64.StdEncoding.DecodeString(secret); err == nil && len(raw) == 32 {
		list = append(list, string(raw), hex.EncodeToString(raw), strings.ToUpper(hex.EncodeToString(raw)))
	}
	return list
}

// Secrets stay where they belong: everything that the gateway says is searched for every
// one that it was told, or made (FAULTS 26).
func TestSecretsDoNotShow(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	ca := strongswan.NewAuthority(t)
	cert, tlsKey := ca.Issue(2, "vpn.example.com", -time.Hour, time.Hour)
	preshared, devicePSK := newKey(t).String(), newKey(t).String()
	const psk, badPSK = "planted-ipsec-key-7f3a9c", "planted-bad-key-1b2c3d"
	secrets := map[string]string{
		"IPsec pre-shared key": psk, "WireGuard pre-shared key": preshared, "device's pre-shared key": devicePSK, "bad pre-shared key": badPSK,
		"TLS key": strings.Split(tlsKey, "\n")[1],
	}
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", "10.10.0.0/24", psk))
	g.write("rome.yaml", certificateSite("rome", "10.10.1.0/24", cert, tlsKey, ca.PEM, ""))
	oslo := newDevice(t, n.dialler("oslo").host)
	g.write("oslo.yaml", siteYAML("oslo", "10.20.0.0/17", "wireguard: {publicKey: "+oslo.key()+", presharedKeySecretRef: {name: oslo, key: psk}}")+secretYAML("oslo", "psk", preshared))
	g.write("bad.yaml", siteYAML("bad", "10.20.128.0/17", "wireguard: {publicKey: "+newKey(t).PublicKey().String()+", presharedKeySecretRef: {name: bad, key: psk}}")+secretYAML("bad", "psk", badPSK))
	g.write("device-psk.yaml", deviceYAML("psk", newKey(t).PublicKey().String(), "presharedKeySecretRef: {name: dev, key: psk}")+secretYAML("dev", "psk", devicePSK))
	g.write("broken.yaml", "apiVersion: v1\nkind: Secret\nmetadata: {name: broken}\nstringData: {psk: ["+badPSK+"]}\n---\n{{ "+badPSK+"\n")
	g.start("--log-level", "debug")
	if _, errs, code := g.culvert("device", "add", "made", "--manifests", g.manifests, "--state", g.state); code != 0 {
		t.Fatalf("device add: %s", errs)
	}
	g.awaitProblem("Site default/bad", nil)
	oslo.up(g.public, public+":51820", []string{"10.20.0.5"}, "PresharedKey = "+preshared)
	reaches(t, oslo.Host, "udp", at(web1, port), "web-1", 8*time.Second)
	host := n.dialler("berlin").host
	inside(t, host, berlin4)
	s := newStrongSwan(t, host, pskConf("berlin", "10.10.0.0/24", psk))
	reachesFrom(t, host, "tcp", berlin4, at(web1, port), "web-1", 10*time.Second)
	s.Conf = strings.ReplaceAll(s.Conf, psk, "another one")
	s.Kill()
	s.Start() // fails: more is logged
	time.Sleep(1500 * time.Millisecond)
	for name, file := range map[string]string{"the gateway's key": "wireguard.key", "the key of a device that was made": "devices/default.made.key"} {
		b, err := os.ReadFile(filepath.Join(g.state, file))
		if err != nil {
			t.Fatal(err)
		}
		secrets[name] = strings.TrimSpace(string(b))
		if st, _ := os.Stat(filepath.Join(g.state, file)); st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %s", file, st.Mode())
		}
	}

	texts := map[string]string{}
	command := func(args ...string) {
		out, errs, _ := g.culvert(args...)
		texts["culvert "+strings.Join(args, " ")] = out + errs
	}
	for _, o := range []string{"text", "json", "yaml"} {
		command("status", "--state", g.state, "-o", o)
		command("plan", "gateway", "-f", g.manifests, "-o", o)
		command("plan", "gateway", "-f", g.manifests, "--state", g.state, "--diff", "-o", o)
		command("device", "list", "--manifests", g.manifests, "--state", g.state, "-o", o)
	}
	command("validate", "-f", g.manifests)
	for _, r := range []string{"/v1/status", "/v1/facts", "/v1/plan", "/metrics", "/healthz", "/readyz"} {
		_, texts[r], _ = g.get(r)
	}
	for _, f := range []string{g.log, filepath.Join(g.state, "objects.json"), filepath.Join(g.state, "endpoints.json")} {
		b, _ := os.ReadFile(f)
		texts[f] = string(b)
	}
	run, _ := filepath.Glob(filepath.Join(g.state, "run", "*", "*"))
	for _, f := range run {
		b, _ := os.ReadFile(f)
		texts[f] = string(b)
	}
	texts["nft"] = n.gateway.Run("nft", "list", "ruleset")
	texts["swanctl"], _ = g.swanctl("--list-conns")
	for _, pid := range strings.Fields(n.gateway.Run("ip", "netns", "pids", n.gateway.Namespace)) {
		for _, f := range []string{"cmdline", "environ"} {
			b, _ := os.ReadFile("/proc/" + pid + "/" + f)
			texts["/proc/"+pid+"/"+f] = string(b)
		}
	}
	if len(texts) < 20 || !strings.Contains(texts[g.log], "level=DEBUG") && !strings.Contains(texts[g.log], "level=INFO") {
		t.Fatalf("only %d texts, or no log", len(texts))
	}
	searched := 0
	for where, text := range texts {
		searched += len(text)
		for name, secret := range secrets {
			for _, needle := range needles(secret) {
				if strings.Contains(text, needle) {
					t.Errorf("%s: %s shows", where, name)
				}
			}
		}
	}
	t.Logf("%d texts, %d bytes: none of %d secrets shows", len(texts), searched, len(secrets))

	// Control: the same search finds them where they belong.
	texts = map[string]string{}
	files, _ := filepath.Glob(filepath.Join(g.manifests, "*.yaml"))
	files = append(files, filepath.Join(g.state, "wireguard.key"), filepath.Join(g.state, "devices", "default.made.key"))
	all := ""
	for _, f := range files {
		b, _ := os.ReadFile(f)
		all += string(b)
	}
	for name, secret := range secrets {
		if !strings.Contains(all, secret) {
			t.Errorf("the search does not find %s where it belongs", name)
		}
	}
}

// payloads are what could end one directive and begin another.
func payloads(include string) []string {
	return []string{
		"evil\"; }\n}\ninclude " + include + "\nconnections { evil { remote_addrs = 192.0.2.66 } }\n",
		"evil' } include " + include + " {",
		"evil\" accept; }; add table inet evil; #",
		"evil; flush ruleset\nadd table inet evil",
		"$(nft add table inet evil)`nft add table inet evil`",
	}
}

// Hostile text in every string of every kind ends nowhere as a directive (FAULTS 25).
func TestHostileStrings(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	ca := strongswan.NewAuthority(t)
	cert, key := ca.Issue(2, "vpn.example.com", -time.Hour, time.Hour)
	include := filepath.Join(g.dir, "evil.conf")
	if err := os.WriteFile(include, []byte("connections { evil { remote_addrs = 192.0.2.66 } }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.write("gateway.yaml", gatewayYAML())
	g.write("web.yaml", webYAML())
	g.write("berlin.yaml", pskSiteYAML("berlin", "10.10.0.0/24", "a pre-shared key of berlin"))
	g.run()
	phone, _ := n.dialIn(g, "phone", 2)
	reaches(t, phone.Host, "udp", at(web1, port), "web-1", 8*time.Second)
	conf := func() string {
		b, err := os.ReadFile(filepath.Join(g.state, "run", "ipsec", "strongswan.conf"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	connections := func() string {
		out, err := g.swanctl("--list-conns")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	tables := func() string { return n.gateway.Run("nft", "list", "tables") }
	ruleset := func() string { return normal(n.gateway.Run("nft", "-s", "list", "ruleset")) }
	confBefore, connectionsBefore, rulesetBefore, tablesBefore := conf(), connections(), ruleset(), tables()

	seeds := gatewayYAML("clusterTraffic: {services: Translate, source: Preserve}", "dns: [10.96.0.10]", "ipsec: {localID: vpn.example.com}", "allowedSites: [{namespaces: [default], cidrs: [10.0.0.0/8]}]") +
		deviceYAML("d", newKey(t).PublicKey().String(), "addresses: [10.99.7.7]", "access: {to: [Pods]}", `expirationTime: "2036-01-01T00:00:00Z"`, "presharedKeySecretRef: {name: s, key: psk}") +
		siteYAML("w", "10.20.0.0/24", "wireguard: {publicKey: "+newKey(t).PublicKey().String()+", endpoint: \"192.0.2.1:51820\"}") +
		siteYAML("i", "10.20.1.0/24", "ipsec: {address: 192.0.2.7, localAddress: 203.0.113.10, localID: a.example.com, remoteID: b.example.com, initiate: Never, childSAs: PerPair, proposals: {ike: [aes256gcm16-prfsha384-x25519], esp: [aes256gcm16-x25519], allowWeak: [sha1]}, auth: {presharedKeySecretRef: {name: berlin, key: psk}}}") +
		certificateSite("c", "10.20.2.0/24", cert, key, ca.PEM, "") + secretYAML("s", "psk", newKey(t).String()) +
		serviceYAML("svc", []string{"10.96.9.9"}, "sessionAffinity: ClientIP") + sliceYAML("svc", "IPv4", web1)
	var files []string
	dec := yaml.NewDecoder(strings.NewReader(seeds))
	for {
		var doc any
		if err := dec.Decode(&doc); err != nil {
			break
		}
		if doc == nil {
			continue
		}
		for _, leaf := range leaves(doc) {
			for _, p := range payloads(include) {
				old := leaf.get()
				leaf.set(p)
				b, err := json.Marshal(doc)
				leaf.set(old)
				if err != nil {
					t.Fatal(err)
				}
				files = append(files, string(b))
			}
		}
	}
	if len(files) < 300 {
		t.Fatalf("only %d hostile objects", len(files))
	}
	p := watch(t, phone.Host, at(web1, port), 10*time.Millisecond)
	// Each alone, so that none hides behind another's name; in batches, so that it takes
	// seconds. Twice: as a newcomer, and as an edit of what is in effect.
	const batch = 40
	check := func(what string) {
		t.Helper()
		if got := tables(); got != tablesBefore {
			t.Fatalf("%s: tables:\n%s", what, got)
		}
		if got := conf(); got != confBefore {
			t.Fatalf("%s: strongswan.conf:\n%s", what, got)
		}
		for _, line := range strings.Split(connections(), "\n") {
			if name, _, ok := strings.Cut(line, ": IKEv2"); ok && !strings.HasPrefix(name, " ") && !strings.HasPrefix(name, "default.") {
				t.Fatalf("%s: the daemon has the connection %q", what, name)
			}
		}
	}
	problems := 0
	for start := 0; start < len(files); start += batch {
		part := files[start:min(start+batch, len(files))]
		for i, f := range part {
			// One per file: a List would end at the first broken item.
			if err := os.WriteFile(filepath.Join(g.manifests, fmt.Sprintf("x%02d.json", i)), []byte(f), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(250 * time.Millisecond)
		check(fmt.Sprintf("batch at %d", start))
		r, err := g.report()
		if err != nil {
			t.Fatal(err)
		}
		problems += len(r.Problems)
		for _, x := range r.Problems {
			if strings.ContainsAny(x.Message+x.Field+x.Object+x.Origin, "\n\r") {
				t.Errorf("a problem of more than one line: %+v", x)
			}
		}
		for i := range part {
			g.remove(fmt.Sprintf("x%02d.json", i))
		}
	}
	t.Logf("%d hostile objects, %d problems", len(files), problems)
	eventually(t, 5*time.Second, "everything is as before", func() error {
		if ruleset() != rulesetBefore || connections() != connectionsBefore {
			return fmt.Errorf("ruleset:\n%s\nbefore:\n%s\nconnections:\n%s\nbefore:\n%s", ruleset(), rulesetBefore, connections(), connectionsBefore)
		}
		return nil
	})
	p.unharmed()
}

// leaf is one string of a document.
type leaf struct {
	get func() any
	set func(any)
}

// leaves finds all strings of a document but apiVersion and kind.
func leaves(doc any) []leaf {
	var out []leaf
	var walk func(v any, get func() any, set func(any))
	walk = func(v any, get func() any, set func(any)) {
		switch v := v.(type) {
		case map[string]any:
			for k := range v {
				if k != "apiVersion" && k != "kind" {
					walk(v[k], func() any { return v[k] }, func(x any) { v[k] = x })
				}
			}
		case []any:
			for i := range v {
				walk(v[i], func() any { return v[i] }, func(x any) { v[i] = x })
			}
		case string:
			out = append(out, leaf{get, set})
		}
	}
	walk(doc, nil, nil)
	return out
}
