package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const status = `Package: libc6
Status: install ok installed
Source: glibc
Architecture: amd64
Version: 2.36-9+deb12u10
Description: GNU C Library
 Version: of the description
 not a field

Package: removed
Status: deinstall ok config-files
Architecture: all
Version: 1
`

// root is a root file system as mmdebstrap writes it, made at the given time.
func root(t *testing.T, made time.Time) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	old := time.Date(2022, 12, 1, 10, 0, 0, 0, time.UTC)
	for _, f := range []struct {
		tar.Header
		text string
	}{
		{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: made}, ""},
		{tar.Header{Name: "./dev/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: made}, ""},
		{tar.Header{Name: "./dev/null", Typeflag: tar.TypeChar, Mode: 0o666, ModTime: made}, ""},
		{tar.Header{Name: "./etc/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: made}, ""},
		{tar.Header{Name: "./etc/hostname", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: made}, made.String()},
		{tar.Header{Name: "./usr/bin/su", Typeflag: tar.TypeReg, Mode: 0o4755, ModTime: old, Uname: "root"}, "program"},
		{tar.Header{Name: "./usr/bin/sg", Typeflag: tar.TypeLink, Mode: 0o755, ModTime: old, Linkname: "./usr/bin/su"}, ""},
		{tar.Header{Name: "./usr/share/doc/x/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: old}, ""},
		{tar.Header{Name: "./usr/share/doc/x/README", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: old}, "text"},
		{tar.Header{Name: "./usr/share/doc/x/copyright", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: old}, "licence"},
		{tar.Header{Name: "./var/cache/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: made}, ""},
		{tar.Header{Name: "./var/cache/x", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: made}, made.String()},
		{tar.Header{Name: "./" + statusFile, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: made}, status},
	} {
		f.Size = int64(len(f.text))
		if err := w.WriteHeader(&f.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// files reads a tar.
func files(t *testing.T, in io.Reader) (map[string]*tar.Header, map[string][]byte) {
	t.Helper()
	headers, contents := map[string]*tar.Header{}, map[string][]byte{}
	for r := tar.NewReader(in); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return headers, contents
		}
		if err != nil {
			t.Fatal(err)
		}
		headers[h.Name] = h
		if contents[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDebianLayer(t *testing.T) {
	var first, second bytes.Buffer
	if err := debianLayer(bytes.NewReader(root(t, time.Now())), &first); err != nil {
		t.Fatal(err)
	}
	if err := debianLayer(bytes.NewReader(root(t, time.Now().Add(time.Hour))), &second); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the same packages, installed at another time, give another layer")
	}
	headers, contents := files(t, &first)
	for _, name := range []string{"dev/null", "etc/hostname", "usr/share/doc/x/README", "var/cache/x"} {
		if headers[name] != nil {
			t.Errorf("%s is in the image", name)
		}
	}
	for _, name := range []string{"dev/", "etc/", "usr/bin/su", "usr/bin/sg", "usr/share/doc/x/copyright", "var/cache/", statusFile} {
		if headers[name] == nil {
			t.Fatalf("%s is missing", name)
		}
	}
	su := headers["usr/bin/su"]
	if su.Mode != 0o755 || su.Uname != "" || su.ModTime.Year() != 2022 || string(contents["usr/bin/su"]) != "program" {
		t.Errorf("su is %o of %q, %s", su.Mode, su.Uname, su.ModTime)
	}
	if l := headers["usr/bin/sg"].Linkname; l != "usr/bin/su" {
		t.Errorf("sg links to %q", l)
	}
	if m := headers[statusFile].ModTime; !m.Equal(newest) {
		t.Errorf("a file that the installation wrote is of %s", m)
	}
}

func TestDebianLayerRefuses(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "./var/cache/a", Typeflag: tar.TypeReg}, {Name: "./usr/a", Typeflag: tar.TypeLink, Linkname: "./var/cache/a"},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := debianLayer(&b, io.Discard); err == nil || !strings.Contains(err.Error(), "usr/a is another name of var/cache/a") {
		t.Errorf("a link into nothing: %v", err)
	}
	if err := debianLayer(bytes.NewReader(make([]byte, 1024)), io.Discard); err == nil || !strings.Contains(err.Error(), statusFile) {
		t.Errorf("an empty archive: %v", err)
	}
}

// packed packs an image in a directory of its own, with this package's program.
func packed(t *testing.T) packing {
	t.Helper()
	dir := t.TempDir()
	p := packing{
		debian: filepath.Join(dir, "debian.tar"), programs: filepath.Join(dir, "bin"), license: filepath.Join(dir, "LICENSE"),
		name: "culvert.dev/culvert:dev", version: "v1", revision: "abc", created: 1_700_000_000,
		out: filepath.Join(dir, "image.tar"), sbom: filepath.Join(dir, "sbom.json"),
	}
	var layer bytes.Buffer
	if err := debianLayer(bytes.NewReader(root(t, time.Now())), &layer); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(p.programs, "culvert"), ".")
	out, err := build.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %s", err, out)
	}
	if err := errors.Join(os.WriteFile(p.debian, layer.Bytes(), 0o600), os.WriteFile(p.license, []byte("licence"), 0o600), p.pack()); err != nil {
		t.Fatal(err)
	}
	return p
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func decode[T any](t *testing.T, b []byte) (v T) {
	t.Helper()
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestPackTwice(t *testing.T) {
	first, second := packed(t), packed(t)
	if !bytes.Equal(read(t, first.out), read(t, second.out)) {
		t.Error("the same content gives another image")
	}
	if !bytes.Equal(read(t, first.sbom), read(t, second.sbom)) {
		t.Error("the same content gives another SBOM")
	}
}

// TestPack follows the archive's references as containerd and docker do.
func TestPack(t *testing.T) {
	p := packed(t)
	_, contents := files(t, bytes.NewReader(read(t, p.out)))
	get := func(d descriptor) []byte {
		b := contents["blobs/sha256/"+strings.TrimPrefix(d.Digest, "sha256:")]
		sum := sha256.Sum256(b)
		if int64(len(b)) != d.Size || "sha256:"+hex.EncodeToString(sum[:]) != d.Digest {
			t.Fatalf("%s: %d bytes, digest %x; want %d bytes, %s", d.MediaType, len(b), sum, d.Size, d.Digest)
		}
		return b
	}
	index := decode[struct{ Manifests []descriptor }](t, contents["index.json"])
	if n := index.Manifests[0].Annotations["io.containerd.image.name"]; n != p.name {
		t.Errorf("named %q", n)
	}
	manifest := decode[struct {
		Config descriptor
		Layers []descriptor
	}](t, get(index.Manifests[0]))
	config := decode[struct {
		Config struct{ Entrypoint []string }
		RootFS struct {
			IDs []string `json:"diff_ids"`
		}
	}](t, get(manifest.Config))
	if !slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/culvert"}) {
		t.Errorf("entry point %q", config.Config.Entrypoint)
	}
	docker := decode[[]struct {
		Config           string
		RepoTags, Layers []string
	}](t, contents["manifest.json"])[0]
	if !slices.Equal(docker.RepoTags, []string{p.name}) || !strings.HasSuffix(manifest.Config.Digest, filepath.Base(docker.Config)) {
		t.Errorf("docker's manifest names %q, config %q", docker.RepoTags, docker.Config)
	}
	for i, l := range manifest.Layers {
		get(l)
		if config.RootFS.IDs[i] != l.Digest || !strings.HasSuffix(l.Digest, filepath.Base(docker.Layers[i])) {
			t.Errorf("layer %d is %s, in the configuration %s, in docker's manifest %s", i, l.Digest, config.RootFS.IDs[i], docker.Layers[i])
		}
	}
	headers, _ := files(t, bytes.NewReader(get(manifest.Layers[1])))
	if h := headers["usr/bin/culvert"]; h == nil || h.Mode != 0o755 {
		t.Errorf("culvert is %+v", h)
	}
}

func TestSBOM(t *testing.T) {
	p := packed(t)
	sbom := decode[struct {
		SPDXVersion string
		Packages    []spdxPackage
	}](t, read(t, p.sbom))
	have := map[string]string{}
	ids := map[string]bool{}
	for _, k := range sbom.Packages {
		if have[k.Name] = k.Version; ids[k.ID] {
			t.Errorf("%s is there twice", k.ID)
		}
		ids[k.ID] = true
	}
	if sbom.SPDXVersion != "SPDX-2.3" || have["libc6"] != "2.36-9+deb12u10" || have["removed"] != "" || have["stdlib"] == "" {
		t.Errorf("%s: %v", sbom.SPDXVersion, have)
	}
}
