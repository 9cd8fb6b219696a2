package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
)

// The images that every node has. Nodes reach no registry: pods must not want to pull
// (a tag other than "latest", or imagePullPolicy Never).
const (
	// PauseImage holds a pod's namespaces.
	PauseImage = "culvert.dev/pause:dev"
	// TestImage has the program /server (see package server; it is the entry point, and a
	// client too) and some of BusyBox's programs in /bin: sh, ping, nc, ip, …. Those that
	// resolve names crash: they are linked statically against glibc.
	TestImage = "culvert.dev/test:dev"
	dnsImage  = "culvert.dev/coredns:dev"
)

// Image is a container image of one layer that is written without a registry or a
// container engine.
type Image struct {
	Reference  string
	Files      []File
	Entrypoint []string
}

// File is a file of an Image: Content, or that of the file From, or a symbolic link to
// Link.
type File struct {
	Path    string // without a leading slash
	Content []byte
	From    string
	Link    string
	Mode    int64 // 0 means 0755
}

// Write writes the image as a docker-archive (the format of "docker save"), the same
// bytes for the same content.
func (i Image) Write(w io.Writer) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Reference, err)
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": epoch,
		"config": map[string]any{"Entrypoint": i.Entrypoint, "Env": []string{"PATH=/bin:/usr/bin:/sbin:/usr/sbin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]map[string]any{{
		"Config": digest(config) + ".json", "RepoTags": []string{i.Reference}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	return errors.Join(
		add(t, digest(config)+".json", config, 0o644),
		add(t, "layer.tar", layer, 0o644),
		add(t, "manifest.json", manifest, 0o644),
		t.Close(),
	)
}

var epoch = time.Unix(0, 0).UTC()

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func add(t *tar.Writer, name string, content []byte, mode int64) error {
	if err := t.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(content)), ModTime: epoch}); err != nil {
		return err
	}
	_, err := t.Write(content)
	return err
}

func (i Image) layer() ([]byte, error) {
	var b bytes.Buffer
	t := tar.NewWriter(&b)
	var errs []error
	for _, f := range i.Files {
		if f.Mode == 0 {
			f.Mode = 0o755
		}
		switch {
		case f.Link != "":
			errs = append(errs, t.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: f.Path, Linkname: f.Link, Mode: 0o777, ModTime: epoch}))
		case f.From != "":
			content, err := os.ReadFile(f.From)
			errs = append(errs, err, add(t, f.Path, content, f.Mode))
		default:
			errs = append(errs, add(t, f.Path, f.Content, f.Mode))
		}
	}
	errs = append(errs, t.Close())
	return b.Bytes(), errors.Join(errs...)
}

// Load puts an image into every node's containerd, unless it was prepared (see Prepare). The file is
// an archive of an image with its name in it, of docker's or of the OCI's kind, not compressed.
func (c *Cluster) Load(ctx context.Context, archive string) error {
	if there, err := c.isPrepared(archive); there || err != nil {
		return err
	}
	errs := make([]error, len(c.Nodes))
	var wg sync.WaitGroup
	for i, n := range c.Nodes {
		wg.Go(func() { errs[i] = n.load(ctx, archive) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (n *Node) load(ctx context.Context, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := n.Enter(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("load %s on %s: %w: %s", archive, n.Name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// LoadImage writes an image and puts it into every node's containerd.
func (c *Cluster) LoadImage(ctx context.Context, i Image) error {
	f, err := os.CreateTemp(c.path(), "image-*.tar")
	if err != nil {
		return err
	}
	defer removeIfThere(f.Name()) //nolint:errcheck // goes with the directory
	if err := errors.Join(f.Close(), i.writeTo(f.Name())); err != nil {
		return err
	}
	return c.Load(ctx, f.Name())
}

// writeTo writes the image to a file.
func (i Image) writeTo(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(i.Write(f), f.Close())
}

// TestServer is the program of TestImage as a file of this machine, to run outside the
// cluster.
func (c *Cluster) TestServer() string { return c.path("server") }

func (c *Cluster) loadOwnImages(ctx context.Context) error {
	if c.prepared {
		return run("cp", "-a", filepath.Join(prepared(), preparedServer), c.TestServer())
	}
	if err := build(ctx, "internal/lab/cluster/server", c.TestServer(), mark(c.Name)); err != nil {
		return err
	}
	images, err := ownImages(c.TestServer(), c.Program("coredns"))
	if err != nil {
		return err
	}
	for _, i := range images {
		err = errors.Join(err, c.LoadImage(ctx, i))
	}
	return err
}

// ownImages are those that every node has, given their programs.
func ownImages(server, coredns string) ([]Image, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	files := []File{{Path: "server", From: server}, {Path: "bin/busybox", From: busybox}}
	for _, applet := range []string{
		"sh", "cat", "dd", "env", "grep", "head", "hostname", "id", "ip", "ls", "nc", "netstat",
		"ping", "ping6", "ps", "route", "sha256sum", "sleep", "tail", "traceroute", "traceroute6", "true", "wc",
	} {
		files = append(files, File{Path: "bin/" + applet, Link: "busybox"})
	}
	return []Image{
		{Reference: PauseImage, Files: files[:1], Entrypoint: []string{"/server", "pause"}},
		{Reference: TestImage, Files: files, Entrypoint: []string{"/server"}},
		{Reference: dnsImage, Files: []File{{Path: "coredns", From: coredns}}, Entrypoint: []string{"/coredns"}},
	}, nil
}
