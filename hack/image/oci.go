package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Media types of the OCI image specification 1.0.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// packing is one run of "image pack".
type packing struct {
	debian, programs, license string // input
	name, version, revision   string
	created                   int64 // Unix seconds
	out, sbom                 string
}

// blob is a piece of the image: its bytes, or the file that has them.
type blob struct {
	file   string
	data   []byte
	digest string // sha256:…
	size   int64
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// pack writes the image's archive and its SBOM, and prints the image's digest.
func (p *packing) pack() error {
	debian, err := fileBlob(p.debian)
	if err != nil {
		return err
	}
	var programs bytes.Buffer
	names, err := p.programLayer(&programs)
	if err != nil {
		return err
	}
	own := dataBlob(programs.Bytes())
	config, err := p.config(names, debian, own)
	if err != nil {
		return err
	}
	manifest, err := jsonBlob(map[string]any{
		"schemaVersion": 2, "mediaType": typeManifest,
		"config": descriptor{MediaType: typeConfig, Digest: config.digest, Size: config.size},
		"layers": []descriptor{
			{MediaType: typeLayer, Digest: debian.digest, Size: debian.size},
			{MediaType: typeLayer, Digest: own.digest, Size: own.size},
		},
	})
	if err != nil {
		return err
	}
	if err := writeFile(p.out, func(f *os.File) error { return p.archive(f, manifest, config, debian, own) }); err != nil {
		return err
	}
	if err := p.writeSBOM(names, manifest.digest); err != nil {
		return err
	}
	fmt.Printf("%s@%s\n", p.name, manifest.digest)
	return nil
}

// config is the image's configuration. The first of our programs in alphabetical order is
// the entry point.
func (p *packing) config(programs []string, layers ...blob) (blob, error) {
	var ids []string
	for _, l := range layers {
		ids = append(ids, l.digest)
	}
	created := time.Unix(p.created, 0).UTC().Format(time.RFC3339)
	return jsonBlob(map[string]any{
		"created": created, "architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{
			"Env":        []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
			"Entrypoint": []string{"/usr/bin/" + programs[0]},
			"WorkingDir": "/",
			"Labels": map[string]string{
				"org.opencontainers.image.title":       "culvert",
				"org.opencontainers.image.description": "A VPN that lives in Kubernetes",
				"org.opencontainers.image.source":      "https://github.com/culvert-vpn/culvert",
				"org.opencontainers.image.licenses":    "Apache-2.0",
				"org.opencontainers.image.version":     p.version,
				"org.opencontainers.image.revision":    p.revision,
			},
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids},
		"history": []map[string]any{
			{"created": newest.Format(time.RFC3339), "created_by": "mmdebstrap: images/packages"},
			{"created": created, "created_by": "go build ./cmd/..."},
		},
	})
}

// programLayer writes the upper layer: our programs, our licence and the directories that
// are mounted over. It returns the programs' names, sorted.
func (p *packing) programLayer(out io.Writer) ([]string, error) {
	entries, err := os.ReadDir(p.programs)
	if err != nil {
		return nil, err
	}
	w := tar.NewWriter(out)
	for _, d := range []string{"run/culvert/", "usr/bin/", "usr/share/doc/culvert/", "var/lib/culvert/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755, ModTime: newest, Format: tar.FormatPAX}); err != nil {
			return nil, err
		}
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
		if err := p.add(w, filepath.Join(p.programs, e.Name()), "usr/bin/"+e.Name(), 0o755); err != nil {
			return nil, err
		}
	}
	if !slices.Contains(names, "culvert") {
		return nil, fmt.Errorf("%s has no program culvert: build it first", p.programs)
	}
	if err := p.add(w, p.license, "usr/share/doc/culvert/LICENSE", 0o644); err != nil {
		return nil, err
	}
	return names, w.Close()
}

func (p *packing) add(w *tar.Writer, file, name string, mode int64) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	h := &tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: int64(len(b)), Mode: mode,
		ModTime: time.Unix(p.created, 0).UTC(), Format: tar.FormatPAX,
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// archive writes one tar that is an OCI layout and a docker-archive at once: containerd,
// podman, skopeo and docker all take it.
func (p *packing) archive(out io.Writer, manifest, config blob, layers ...blob) error {
	index, err := jsonBlob(map[string]any{
		"schemaVersion": 2, "mediaType": typeIndex,
		"manifests": []descriptor{{
			MediaType: typeManifest, Digest: manifest.digest, Size: manifest.size,
			Platform: &platform{Architecture: runtime.GOARCH, OS: "linux"},
			Annotations: map[string]string{
				"io.containerd.image.name":          p.name,
				"org.opencontainers.image.ref.name": p.name[strings.LastIndex(p.name, ":")+1:],
			},
		}},
	})
	if err != nil {
		return err
	}
	var paths []string
	for _, l := range layers {
		paths = append(paths, l.path())
	}
	docker, err := jsonBlob([]map[string]any{{"Config": config.path(), "RepoTags": []string{p.name}, "Layers": paths}})
	if err != nil {
		return err
	}
	w := tar.NewWriter(out)
	for _, b := range append([]blob{manifest, config}, layers...) {
		if err := b.write(w, b.path()); err != nil {
			return err
		}
	}
	for _, f := range []struct {
		name string
		blob
	}{{"index.json", index}, {"manifest.json", docker}, {"oci-layout", dataBlob([]byte(`{"imageLayoutVersion":"1.0.0"}`))}} {
		if err := f.write(w, f.name); err != nil {
			return err
		}
	}
	return w.Close()
}

func (b blob) path() string { return "blobs/sha256/" + strings.TrimPrefix(b.digest, "sha256:") }

func (b blob) write(w *tar.Writer, name string) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: b.size, Mode: 0o644, ModTime: newest, Format: tar.FormatPAX}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	var in io.Reader = bytes.NewReader(b.data)
	if b.file != "" {
		f, err := os.Open(b.file)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	_, err := io.Copy(w, in)
	return err
}

func dataBlob(data []byte) blob {
	sum := sha256.Sum256(data)
	return blob{data: data, digest: "sha256:" + hex.EncodeToString(sum[:]), size: int64(len(data))}
}

func jsonBlob(v any) (blob, error) {
	data, err := json.Marshal(v)
	return dataBlob(data), err
}

func fileBlob(file string) (blob, error) {
	f, err := os.Open(file)
	if err != nil {
		return blob{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return blob{file: file, digest: "sha256:" + hex.EncodeToString(h.Sum(nil)), size: n}, err
}
