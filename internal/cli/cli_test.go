package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// culvert runs one command line.
func culvert(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = Run(context.Background(), args, Streams{In: strings.NewReader(""), Out: &out, Err: &err})
	return code, out.String(), err.String()
}

const gatewayManifest = `apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: default}
spec:
  cluster: {podCIDRs: [10.244.0.0/16], serviceCIDRs: [10.96.0.0/16]}
  deviceCIDRs: [10.99.0.0/24]
  expose: {address: vpn.example.com}
`

func manifests(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestExitCodes(t *testing.T) {
	good := manifests(t, map[string]string{"gateway.yaml": gatewayManifest})
	bad := manifests(t, map[string]string{"gateway.yaml": strings.Replace(gatewayManifest, "10.99.0.0/24", "127.0.0.0/24", 1)})
	for _, c := range []struct {
		args []string
		code int
		says string // on either stream
	}{
		{nil, 0, "culvert device add"},
		{[]string{"--version"}, 0, "culvert "},
		{[]string{"nonsense"}, 2, `no command "nonsense"`},
		{[]string{"statu"}, 2, `did you mean "status"`},
		{[]string{"validate"}, 2, "-f FILE"},
		{[]string{"validate", "--nonsense"}, 2, "--help"},
		{[]string{"validate", "-f", good, "-o", "xml"}, 2, "text, json or yaml"},
		{[]string{"validate", "-f", good}, 0, "1 objects, 0 errors"},
		{[]string{"validate", "-f", bad}, 1, "spec.deviceCIDRs[0]"},
		{[]string{"validate", "-f", good + "/none.yaml"}, 1, "no such file"},
		{[]string{"plan", "gateway", "-f", good}, 0, "link cvtwg0"},
		{[]string{"plan", "gateway", "-f", good, "--name", "other"}, 1, `"other"`},
		{[]string{"plan", "gateway", "-f", good, "--diff", "--state", t.TempDir()}, 1, "--socket"},
		{[]string{"status", "--state", t.TempDir()}, 1, "is one running?"},
		{[]string{"gateway"}, 2, "--manifests is missing"},
		{[]string{"gateway", "--manifests", good, "--wireguard", "fast"}, 2, "auto, kernel or userspace"},
		{[]string{"gateway", "--manifests", good, "--log-level", "loud", "--state", t.TempDir()}, 2, "loud"},
		{[]string{"device", "add"}, 2, "NAME is missing"},
		{[]string{"device", "config", "a", "b"}, 2, "one argument too many"},
	} {
		code, out, errs := culvert(t, c.args...)
		if code != c.code || !strings.Contains(out+errs, c.says) {
			t.Errorf("culvert %s: exit code %d, want %d; want %q in:\n%s%s", strings.Join(c.args, " "), code, c.code, c.says, out, errs)
		}
		if code == 2 && out != "" {
			t.Errorf("culvert %s: a wrong command line prints on standard output: %s", strings.Join(c.args, " "), out)
		}
	}
}

func TestValidateJSON(t *testing.T) {
	bad := manifests(t, map[string]string{"gateway.yaml": strings.Replace(gatewayManifest, "10.99.0.0/24", "127.0.0.0/24", 1)})
	code, out, _ := culvert(t, "validate", "-f", bad, "-o", "json")
	var items []struct{ Object, Origin, Field, Reason, Message string }
	if err := json.Unmarshal([]byte(out), &items); err != nil || len(items) != 1 {
		t.Fatalf("%v in %s", err, out)
	}
	if it := items[0]; code != 1 || it.Object != "VPNGateway default/edge" || it.Field != "spec.deviceCIDRs[0]" || it.Reason == "" || !strings.HasSuffix(it.Origin, "gateway.yaml:1") {
		t.Errorf("exit code %d, %+v", code, it)
	}
}

func TestDeviceLifecycle(t *testing.T) {
	dir, state := manifests(t, map[string]string{"gateway.yaml": gatewayManifest}), t.TempDir()
	run := func(want int, args ...string) (string, string) {
		t.Helper()
		code, out, errs := culvert(t, append(args, "--manifests", dir, "--state", state)...)
		if code != want {
			t.Fatalf("culvert %s: exit code %d, want %d:\n%s%s", strings.Join(args, " "), code, want, out, errs)
		}
		return out, errs
	}
	if out, _ := run(0, "device", "add", "phone"); !strings.Contains(out, "10.99.0.2") {
		t.Errorf("add says %s", out)
	}
	if out, _ := run(0, "device", "add", "laptop", "--access", "Pods,Sites", "--expires", "24h"); !strings.Contains(out, "10.99.0.3") {
		t.Errorf("the second device: %s", out)
	}
	const key = "AQIDAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	run(0, "device", "add", "own", "--public-key", key, "--address", "10.99.0.77")
	for _, bad := range [][]string{
		{"device", "add", "phone"}, {"device", "add", "x", "--address", "10.99.0.77"}, {"device", "add", "x", "--address", "10.1.1.1"},
		{"device", "add", "x", "--access", "Everything"}, {"device", "add", "x", "--public-key", "abc"}, {"device", "add", "x", "--public-key", key},
	} {
		_, errs := run(1, bad...)
		if strings.Count(errs, "\n") != 1 {
			t.Errorf("%v says %q, want one line", bad, errs)
		}
	}
	for _, bad := range [][]string{{"device", "add", "Not_A_Name"}, {"device", "add", "x", "--expires", "yesterday"}, {"device", "add", "x", "--expires", "2020-01-01T00:00:00Z"}} {
		run(2, bad...)
	}
	if files, _ := filepath.Glob(filepath.Join(dir, "*")); len(files) != 4 {
		t.Errorf("files after refused additions: %v", files)
	}
	if keys, _ := filepath.Glob(filepath.Join(state, "devices", "*x*")); len(keys) != 0 {
		t.Errorf("keys of refused devices: %v", keys)
	}
	if code, out, _ := culvert(t, "validate", "-f", dir); code != 0 {
		t.Errorf("the manifests that add wrote are refused: %s", out)
	}

	out, _ := run(0, "device", "list", "-o", "json")
	var items []deviceItem
	if err := json.Unmarshal([]byte(out), &items); err != nil || len(items) != 3 {
		t.Fatalf("%v in %s", err, out)
	}
	for _, it := range items {
		if (it.Expires != nil) != (it.Name == "default/laptop") || it.State != "active" {
			t.Errorf("listed: %+v", it)
		}
	}

	if _, errs := run(1, "device", "config", "phone"); !strings.Contains(errs, "culvert keygen") {
		t.Errorf("without the gateway's key: %s", errs)
	}
	code, pub, _ := culvert(t, "keygen", "--state", state)
	if code != 0 || !regexp.MustCompile(`^[A-Za-z0-9+/]{43}=\n$`).MatchString(pub) {
		t.Fatalf("keygen: %d %q", code, pub)
	}
	if _, again, _ := culvert(t, "keygen", "--state", state); again != pub {
		t.Errorf("a second keygen gives %q, not %q", again, pub)
	}
	config, _ := run(0, "device", "config", "phone")
	for _, want := range []string{"PublicKey = " + pub, "Address = 10.99.0.2/32\n", "Endpoint = vpn.example.com:51820\n", "\nPrivateKey = "} {
		if !strings.Contains(config, want) {
			t.Errorf("the configuration lacks %q:\n%s", want, config)
		}
	}
	if again, _ := run(0, "device", "config", "phone"); again != config {
		t.Error("the configuration differs the second time")
	}
	if own, _ := run(0, "device", "config", "own"); strings.Contains(own, "\nPrivateKey") {
		t.Errorf("a private key for a device that brought its own:\n%s", own)
	}
	file := filepath.Join(state, "phone.conf")
	run(0, "device", "config", "phone", "--file", file)
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v %v", st, err)
	}
	run(1, "device", "config", "phone", "--file", file) // never overwritten
	run(2, "device", "config", "phone", "--file", file, "--qr")

	run(0, "device", "rm", "phone")
	run(1, "device", "rm", "phone")
	run(1, "device", "config", "phone")
	if keys, _ := filepath.Glob(filepath.Join(state, "devices", "*phone*")); len(keys) != 0 {
		t.Errorf("the key of a removed device is still there: %v", keys)
	}
	if out, _ := run(0, "device", "add", "next"); !strings.Contains(out, "10.99.0.2") {
		t.Errorf("the address of a removed device is not free again: %s", out)
	}
}

func TestQRCodeHasQuietZoneAndIsRectangular(t *testing.T) {
	dir, state := manifests(t, map[string]string{"gateway.yaml": gatewayManifest}), t.TempDir()
	culvert(t, "keygen", "--state", state)
	culvert(t, "device", "add", "phone", "--manifests", dir, "--state", state)
	code, out, errs := culvert(t, "device", "config", "phone", "--qr", "--manifests", dir, "--state", state)
	if code != 0 {
		t.Fatal(errs)
	}
	lines := strings.Split(strings.TrimSpace(regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString(out, "")), "\n")
	width := len([]rune(strings.Split(regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString(out, ""), "\n")[0]))
	if width < 25 || len(lines) < width/2-1 || len(lines) > width/2+1 {
		t.Errorf("%d columns by %d lines", width, len(lines))
	}
	if strings.TrimSpace(lines[0]) != "" && !strings.HasPrefix(out, "\x1b[30;47m ") {
		t.Errorf("no light border: %q", lines[0])
	}
}

// Every command teaches: a sentence, and an example that is about itself.
func TestEveryCommandHasHelp(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return
		}
		if c.Short == "" || (c.Runnable() && !c.HasSubCommands() && c.Long == "" && c.Example == "" && c.Name() != "down") {
			t.Errorf("%s has no help", c.CommandPath())
		}
		if c.Example != "" && !strings.Contains(c.Example, c.CommandPath()) {
			t.Errorf("the example of %s is about something else: %s", c.CommandPath(), c.Example)
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s --%s has no help", c.CommandPath(), f.Name)
			}
		})
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot(Streams{}))
}
