// Package docs holds the documentation to the code: every manifest in it is one that a
// gateway accepts, and every link in it leads somewhere.
package docs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/source"
)

// edge is the gateway that examples refer to and need not repeat.
const edge = `apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: default}
spec:
  cluster:
    podCIDRs: [10.244.0.0/16]
    serviceCIDRs: [10.96.0.0/16]
  deviceCIDRs: [10.99.0.0/24]
  expose: {address: vpn.example.com}
`

// block is one fenced block of a page.
type block struct {
	file string
	line int    // of its first line of text
	info string // "yaml", "sh", "yaml fragment"
	text string
}

func (b block) String() string { return fmt.Sprintf("%s:%d", b.file, b.line) }

// pages lists README.md and all pages below docs, relative to the root.
func pages(t *testing.T) []string {
	t.Helper()
	out := []string{"README.md"}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) == ".md" {
			out = append(out, filepath.Join("docs", path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func read(t *testing.T, page string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", page))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// split separates a page's fenced blocks from its prose; line numbers of the prose stay.
func split(page, text string) (prose []string, blocks []block) {
	var open *block
	for i, line := range strings.Split(text, "\n") {
		fence := strings.HasPrefix(line, "```")
		switch {
		case fence && open == nil:
			open = &block{file: page, line: i + 2, info: strings.TrimSpace(strings.TrimPrefix(line, "```"))}
		case fence:
			blocks = append(blocks, *open)
			open = nil
		case open != nil:
			open.text += line + "\n"
		}
		if fence || open != nil {
			line = ""
		}
		prose = append(prose, line)
	}
	return prose, blocks
}

var heredoc = regexp.MustCompile(`(?ms)<<'?EOF'?[^\n]*\n(apiVersion: .*?)^EOF$`)

// manifests finds the complete manifests and the fragments among a page's blocks; those
// that a shell command writes count too.
func manifests(blocks []block) (whole, fragments []block) {
	for _, b := range blocks {
		switch {
		case b.info == "yaml" && strings.HasPrefix(b.text, "spec:"):
			fragments = append(fragments, b)
		case b.info == "yaml":
			whole = append(whole, b)
		case b.info == "sh":
			for _, m := range heredoc.FindAllStringSubmatch(b.text, -1) {
				if !strings.Contains(m[1], "$(") { // else only the shell knows what it says
					whole = append(whole, block{b.file, b.line, "yaml", m[1]})
				}
			}
		}
	}
	return whole, fragments
}

// Every complete manifest is accepted, given a gateway named edge and the Secrets that it
// refers to.
func TestManifests(t *testing.T) {
	stubs := newStubs(t)
	n := 0
	for _, page := range pages(t) {
		_, blocks := split(page, read(t, page))
		whole, fragments := manifests(blocks)
		for _, b := range whole {
			n++
			for _, p := range check(b, stubs) {
				t.Errorf("%s: %s %s: %s: %s", b, p.Kind, p.Object, p.Field, p.Message)
			}
		}
		for _, b := range fragments {
			n++
			if why := checkFragment(b); why != "" {
				t.Errorf("%s: %s", b, why)
			}
		}
	}
	if n < 12 {
		t.Errorf("only %d manifests found: something is wrong with the test", n)
	}
}

// check parses a block as "culvert validate" does, and completes what it leaves out.
func check(b block, stubs *stubs) []model.Problem {
	var objects model.Objects
	decoded, problems := source.Decode([]byte(b.text), b.file)
	have := map[model.Ref]bool{}
	for _, d := range decoded {
		objects.Add(d)
		have[d.Ref()] = true
	}
	if len(decoded) == 0 && len(problems) == 0 {
		return []model.Problem{{Message: "the block holds no manifest: mark it 'yaml fragment' if it is none"}}
	}
	if !have[model.Ref{Kind: model.KindGateway, ID: model.ID{Namespace: "default", Name: "edge"}}] {
		gateway, _ := source.Decode([]byte(edge), "edge")
		objects.Add(gateway[0])
	}
	for _, d := range decoded {
		for _, ref := range d.Secrets() {
			if !have[ref] {
				objects.Add(model.Decoded{Object: stubs.secret(ref.ID, d)})
				have[ref] = true
			}
		}
	}
	return append(problems, model.Parse(objects, model.ParseOptions{Complete: true}).Problems...)
}

// checkFragment decodes a spec as one of the kinds that have such a field.
func checkFragment(b block) string {
	var why []string
	for _, kind := range []string{model.KindGateway, model.KindSite, model.KindDevice, model.KindRemoteCluster, model.KindNodeEncryption} {
		_, problems := source.Decode([]byte("apiVersion: culvert.dev/v1alpha1\nkind: "+kind+"\nmetadata: {name: x}\n"+b.text), b.file)
		if len(problems) == 0 {
			return ""
		}
		why = append(why, kind+": "+problems[0].Field+": "+problems[0].Message)
	}
	return "fits no kind: " + strings.Join(why, "; ")
}

// stubs are credentials that examples refer to and do not show.
type stubs struct {
	ca    *x509.Certificate
	caPEM []byte
	key   *ecdsa.PrivateKey
	crl   []byte
}

func newStubs(t *testing.T) *stubs {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "stub"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCRLSign | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := &stubs{key: key, caPEM: pemBlock("CERTIFICATE", der)}
	if s.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
	}, s.ca, key)
	if err != nil {
		t.Fatal(err)
	}
	s.crl = pemBlock("X509 CRL", crl)
	return s
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// secret is a Secret that fits every reference that an object makes to its name.
func (s *stubs) secret(id model.ID, user model.Decoded) *corev1.Secret {
	out := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: id.Name, Namespace: id.Namespace}, Data: map[string][]byte{}}
	shared := func(ref *v1alpha1.SecretKeyReference) {
		if ref != nil && ref.Name == id.Name {
			out.Data[ref.Key] = []byte(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)))
		}
	}
	switch o := user.Object.(type) {
	case *v1alpha1.Device:
		shared(o.Spec.PresharedKeySecretRef)
	case *v1alpha1.Site:
		if o.Spec.WireGuard != nil {
			shared(o.Spec.WireGuard.PresharedKeySecretRef)
		}
		if o.Spec.IPsec != nil {
			shared(o.Spec.IPsec.Auth.PresharedKeySecretRef)
			s.certificate(out, o.Spec.IPsec)
		}
	}
	return out
}

func (s *stubs) certificate(out *corev1.Secret, x *v1alpha1.SiteIPsec) {
	c := x.Auth.Certificate
	if c == nil {
		return
	}
	if c.CertificateSecretRef.Name == out.Name {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "stub"}, DNSNames: []string{string(x.LocalID)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		}
		der, err := x509.CreateCertificate(rand.Reader, template, s.ca, s.key.Public(), s.key)
		if err != nil {
			panic(err)
		}
		key, err := x509.MarshalPKCS8PrivateKey(s.key)
		if err != nil {
			panic(err)
		}
		out.Data[corev1.TLSCertKey], out.Data[corev1.TLSPrivateKeyKey] = pemBlock("CERTIFICATE", der), pemBlock("PRIVATE KEY", key)
	}
	if c.CASecretRef.Name == out.Name {
		out.Data[c.CASecretRef.Key] = s.caPEM
	}
	if r := c.CRLSecretRef; r != nil && r.Name == out.Name {
		out.Data[r.Key] = s.crl
	}
}

var (
	link     = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	external = regexp.MustCompile(`^[a-z][a-z+.-]*:`)
)

// Every relative link leads to a file, and its anchor to a heading there.
func TestLinks(t *testing.T) {
	n := 0
	for _, page := range pages(t) {
		prose, _ := split(page, read(t, page))
		for i, line := range prose {
			for _, m := range link.FindAllStringSubmatch(line, -1) {
				if external.MatchString(m[1]) {
					continue
				}
				n++
				if why := follow(t, page, m[1]); why != "" {
					t.Errorf("%s:%d: link %s: %s", page, i+1, m[1], why)
				}
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d links found: something is wrong with the test", n)
	}
}

func follow(t *testing.T, page, target string) string {
	t.Helper()
	path, anchor, _ := strings.Cut(target, "#")
	file := page
	if path != "" {
		file = filepath.Join(filepath.Dir(page), path)
	}
	st, err := os.Stat(filepath.Join("..", file))
	if err != nil {
		return "no such file"
	}
	if anchor == "" {
		return ""
	}
	if st.IsDir() {
		return "an anchor in a directory"
	}
	prose, _ := split(file, read(t, file))
	for _, line := range prose {
		if h := strings.TrimLeft(line, "#"); h != line && strings.HasPrefix(h, " ") && slug(h) == anchor {
			return ""
		}
	}
	return "no such heading"
}

var notInSlug = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)

// slug is the anchor that GitHub gives a heading.
func slug(heading string) string {
	s := notInSlug.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
	return strings.ReplaceAll(s, " ", "-")
}

// The checks are seen to fail.
func TestChecksFail(t *testing.T) {
	stubs := newStubs(t)
	site := "apiVersion: culvert.dev/v1alpha1\nkind: Site\nmetadata: {name: s}\nspec:\n  gatewayRef: {name: edge}\n  cidrs: [10.10.0.0/24]\n"
	psk := "  ipsec:\n    address: 198.51.100.7\n    auth: {presharedKeySecretRef: {name: s, key: k}}\n"
	for name, c := range map[string]struct {
		text string
		good bool
	}{
		"whole":            {site + psk, true},
		"unknown field":    {site + psk + "  colour: red\n", false},
		"overlap":          {strings.Replace(site, "10.10.0.0/24", "10.244.1.0/24", 1) + psk, false},
		"other gateway":    {strings.Replace(site, "edge", "ghost", 1) + psk, false},
		"nothing in there": {"# only a remark\n", false},
	} {
		if problems := check(block{text: c.text}, stubs); (len(problems) == 0) != c.good {
			t.Errorf("%s: %v", name, problems)
		}
	}
	if why := checkFragment(block{text: "spec:\n  access: {too: [Pods]}\n"}); why == "" {
		t.Error("a fragment with an unknown field is accepted")
	}
	for target, want := range map[string]bool{
		"adr/": true, "sites.md": true, "../README.md#limits": true, "nowhere.md": false, "../README.md#nowhere": false,
	} {
		if got := follow(t, "docs/devices.md", target) == ""; got != want {
			t.Errorf("link %s: %t, want %t", target, got, want)
		}
	}
}
