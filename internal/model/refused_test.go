package model

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	yaml "go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write what is said into testdata")

// certificates makes an authority, a certificate of gw.example.com and a revocation list,
// in PEM.
func certificates(t testing.TB) map[string]string {
	t.Helper()
	must := func(b []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	newKey := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	caKey, key := newKey(), newKey()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotAfter: time.Unix(1<<32, 0), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{1},
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "gateway"}, DNSNames: []string{"gw.example.com"},
		NotAfter: time.Unix(1<<32, 0), BasicConstraintsValid: true,
	}
	return map[string]string{
		"ca.crt":  encode("CERTIFICATE", must(x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey))),
		"tls.crt": encode("CERTIFICATE", must(x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey))),
		"tls.key": encode("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(key))),
		"crl.pem": encode("X509 CRL", must(x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1)}, ca, caKey))),
	}
}

// base is testdata/base.yaml, one tree per document, with certificates.
func base(t testing.TB, certs map[string]string) []map[string]any {
	t.Helper()
	data, err := os.ReadFile("testdata/base.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var out []map[string]any
	for _, doc := range strings.Split(string(data), "\n---\n") {
		var m map[string]any
		if err := yaml.Unmarshal([]byte(doc), &m); err != nil {
			t.Fatal(err)
		}
		if nameOf(m) == "Secret tls" {
			for k, v := range certs {
				m["stringData"].(map[string]any)[k] = v
			}
		}
		out = append(out, m)
	}
	return out
}

func nameOf(m map[string]any) string {
	meta, _ := m["metadata"].(map[string]any)
	return fmt.Sprint(m["kind"], " ", meta["name"])
}

// encode writes trees as a YAML stream.
func encode(t testing.TB, docs []map[string]any) string {
	t.Helper()
	var parts []string
	for _, d := range docs {
		b, err := yaml.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, string(b))
	}
	return strings.Join(parts, "---\n")
}

// set changes the field at a path such as "spec.targets[0].cidrs"; no value removes it.
// Keys of a Secret's data may have dots.
func set(tree any, path string, value any, present bool) any {
	if path == "" {
		return value
	}
	if rest, ok := strings.CutPrefix(path, "["); ok {
		number, rest, _ := strings.Cut(rest, "]")
		i, _ := strconv.Atoi(number)
		list := tree.([]any)
		list[i] = set(list[i], strings.TrimPrefix(rest, "."), value, present)
		return list
	}
	m, ok := tree.(map[string]any)
	if !ok {
		m = map[string]any{}
	}
	name, rest := path, ""
	if i := strings.IndexAny(path, ".["); i >= 0 && m[path] == nil {
		name, rest = path[:i], strings.TrimPrefix(path[i:], ".")
		if strings.HasSuffix(name, "ata") && name != "metadata" {
			rest = path[i+1:]
			if sub, ok := m[name].(map[string]any); ok {
				if present {
					sub[rest] = value
				} else {
					delete(sub, rest)
				}
				return m
			}
		}
	}
	if rest == "" && !present {
		delete(m, name)
		return m
	}
	m[name] = set(m[name], rest, value, present)
	return m
}

func TestBaseIsAccepted(t *testing.T) {
	docs := base(t, certificates(t))
	m := Parse(read(t, encode(t, docs)), ParseOptions{})
	for _, p := range m.Problems {
		t.Errorf("problem: %s", line(p))
	}
	if len(m.Gateways) != 1 || len(m.Gateways[0].Sites) != 3 || len(m.Gateways[0].Devices) != 2 || len(m.Gateways[0].Ports) != 1 ||
		len(m.RemoteClusters) != 1 || m.NodeEncryption == nil || len(m.NodeEncryption.Nodes) != 2 {
		t.Errorf("the model lacks something: %+v", m)
	}
	api := newAPIServer(t)
	for _, d := range docs {
		_, refused := api.admit(t, d)
		for _, why := range refused {
			t.Errorf("%s: the API server would say: %s", nameOf(d), why)
		}
	}
}

// TestRefused goes through testdata/refused.txt: every case must be refused, with a
// field path, in one line and without a secret; the objects that are not concerned stay
// in effect; and what an API server refuses is refused here, too.
func TestRefused(t *testing.T) {
	const file = "testdata/refused.txt"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	certs := certificates(t)
	api := newAPIServer(t)
	var out strings.Builder
	for _, text := range strings.Split(string(data), "\n") {
		if strings.HasPrefix(text, "    ") || text == "" && out.Len() == 0 {
			continue
		}
		out.WriteString(text + "\n")
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		for _, l := range refusedCase(t, text, certs, api) {
			out.WriteString("    " + l + "\n")
		}
	}
	got := strings.TrimRight(out.String(), "\n") + "\n"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != string(data) {
		t.Errorf("%s is not what is said now; look at the difference after -update:\n%s", file, firstDifference(string(data), got))
	}
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range g {
		if i >= len(w) || w[i] != g[i] {
			return fmt.Sprintf("line %d\nwant %s\n got %s", i+1, strings.Join(w[min(i, len(w)):min(i+1, len(w))], ""), g[i])
		}
	}
	return "it is longer"
}

func refusedCase(t *testing.T, text string, certs map[string]string, api apiServer) []string {
	t.Helper()
	f := strings.SplitN(text, " ", 4)
	if len(f) < 3 {
		t.Fatalf("case %q: want KIND NAME PATH VALUE", text)
	}
	var value any
	if len(f) == 4 {
		if err := yaml.Unmarshal([]byte(f[3]), &value); err != nil {
			t.Fatalf("case %q: %v", text, err)
		}
	}
	docs := base(t, certs)
	found := false
	var target map[string]any
	for i, d := range docs {
		if nameOf(d) == f[0]+" "+f[1] {
			found = true
			target = set(d, f[2], value, len(f) == 4).(map[string]any)
			docs[i] = target
		}
	}
	if !found {
		t.Fatalf("case %q: no such object", text)
	}
	objects, problems := decodeAll(encode(t, docs))
	problems = append(problems, Parse(objects, ParseOptions{}).Problems...)
	var lines []string
	waiting := 0
	for _, p := range problems {
		checkProblem(t, text, p)
		if p.Kind != f[0] && p.Pending && strings.HasPrefix(p.Field, "spec.gatewayRef") {
			waiting++
			continue
		}
		l := fmt.Sprintf("%s %s: %s: %s: %s", p.Kind, p.Object, p.Field, p.Reason, p.Message)
		if p.Pending {
			l += " (pending)"
		}
		lines = append(lines, l)
	}
	if waiting > 0 {
		lines = append(lines, fmt.Sprintf("(and %d objects that refer to it wait)", waiting))
	}
	if len(problems) == 0 {
		t.Errorf("case %q is not refused", text)
	}
	_, says := api.admit(t, target)
	if len(says) > 0 && len(problems) == 0 {
		t.Errorf("case %q: an API server refuses it, the model does not: %s", text, says)
	}
	if len(says) > 0 {
		lines = append(lines, "an API server with the CRDs refuses it, too")
	}
	return lines
}

// checkProblem checks what every problem must be.
func checkProblem(t *testing.T, what string, p Problem) {
	t.Helper()
	if strings.ContainsAny(p.Message+p.Field+p.Kind+p.Object.String(), "\n\r\x00") {
		t.Errorf("%q: more than one line: %q", what, p.Field+p.Message)
	}
	if p.Reason == "" || p.Message == "" {
		t.Errorf("%q: without reason or message: %+v", what, p)
	}
	if p.Field == "" && p.Reason != ReasonInvalidManifest && p.Reason != ReasonIgnored {
		t.Errorf("%q: without a field path: %+v", what, p)
	}
	for _, secret := range []string{"correct horse", "c2VjcmV0IHdpcmVndWFyZCBwcmU", "BEGIN PRIVATE"} {
		if strings.Contains(p.Message, secret) {
			t.Errorf("%q: the message has a secret in it: %s", what, p.Message)
		}
	}
}
